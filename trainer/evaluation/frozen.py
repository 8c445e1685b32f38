"""What the teacher's features tell without a method: what an embedding that is made of them has to be ahead of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.data.features import FeatureSource
from trainer.data.splits import Split
from trainer.evaluation.embed import (
    BATCH,
    Auxiliary,
    TestSplit,
    UntellingError,
    feature_sources,
    read_features,
    refuse_untelling,
)
from trainer.evaluation.tables import FROZEN, LINEAR, POOLED
from trainer.models.discriminant import Discriminant

MOST_TRAINED = 4096  # images that the linear head is made of: it costs no more than to score the test images
COMPONENTS = 512


@torch.inference_mode()
def embed_frozen(auxiliary: Auxiliary, test: TestSplit, trained: Split, device: torch.device) -> dict[str, Tensor]:
    """The first features that `auxiliary` reads, of the test images, by the names of `FROZEN`: (N, P, C_t), (N, P, K).

    `trained`: rows and labels of which the linear head is made, in closed form, so that it is the same each time.
    Empty where features are lacking, or tell no image from another.
    """
    source = next(iter((feature_sources(auxiliary, test) or {}).values()), None)
    if source is None:
        return {}
    has = np.flatnonzero(source.has_features(trained.rows))
    chosen = has[:: max(1, -(-len(has) // MOST_TRAINED))]
    if not len(chosen):
        return {}
    head = Discriminant(len(source.shape.timesteps), source.shape.channels, min(COMPONENTS, source.shape.channels))
    head = head.to(device)
    labels = torch.from_numpy(trained.labels[chosen]).to(device)
    features = pooled_features(source, trained.rows[chosen], device)
    head.fit((part, labels[start : start + BATCH]) for start, part in features)
    pooled = torch.cat([part.cpu() for _, part in pooled_features(source, test.split.rows, device)])
    found = {POOLED: pooled, LINEAR: head.cpu()(pooled)}
    try:
        for name, embeddings in found.items():
            refuse_untelling(embeddings, FROZEN[name])
    except UntellingError:
        return {}
    return found


def pooled_features(source: FeatureSource, rows: np.ndarray, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Where a part of the rows begins, and its features as means over tokens: (n, P, C_t)."""
    for start in range(0, len(rows), BATCH):
        yield start, read_features(source, rows[start : start + BATCH], device).mean(2)
