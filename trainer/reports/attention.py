"""What of an image a method looks at: where its readers read the teacher's tokens, drawn over what the teacher saw."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from trainer.data.features import FeatureSource, open_sources
from trainer.data.regions import Regions
from trainer.device import full_precision
from trainer.evaluation.embed import read_features
from trainer.methods.method import Method
from trainer.reports.figures import STYLE, data_uri

if TYPE_CHECKING:
    from cache_schema import Cache

EXAMPLES = 5  # images drawn, of different classes
MEASURED = 64  # images over which it is measured how widely is read
_MOST_TIMESTEPS, _SINGLE = 6, 3  # columns: timesteps, and readers of their own at the clearest of them
_TOKEN = 16  # pixels of a token in the figure
_VIEW = "canonical"


@dataclass(frozen=True)
class Look:
    """A figure of what one run's readers look at, how widely each reads, and how far they differ.

    `spread`: the share of all places by timestep; `apart`: the share of a reader's attention that lies elsewhere than
    that of the mean reader.
    """

    run: str
    readers: str
    figure: str
    spread: dict[int, float]
    apart: float


def look(run: str, method: Method, cache: Cache, device: torch.device) -> list[Look]:
    """What a method looks at in images of a cache, a figure for each of the features that it reads.

    Empty where it has no readers, or where no image has the features, as those of its own pixels.
    """
    if not method.readers:
        return []
    sources = open_sources(cache, method.needed)
    if any(_VIEW not in source.cache.manifest.views for source in sources.values()):
        return []
    if any(need.shuffled is not None for need in method.needed.features.values()):
        return []
    rows = _rows(cache, list(sources.values()))
    if not len(rows):
        return []
    method.eval()
    with torch.inference_mode(), full_precision(device):
        features = {name: read_features(source, rows, device) for name, source in sources.items()}
        weights = {name: found.float().cpu() for name, found in method.attention(features).items()}
    return [
        Look(
            run,
            method.readers,
            _figure(found, sources[name], cache, rows),
            _spread(found, sources[name]),
            float(_apart(found).mean()),
        )
        for name, found in weights.items()
    ]


def _rows(cache: Cache, sources: Sequence[FeatureSource]) -> np.ndarray:
    """Images with features, of the test split where it has any, the drawn ones first and of different classes."""
    splits, labels = np.array(cache.samples["split"].to_pylist()), cache.samples["label"].to_numpy()
    for split in ("test", "train"):
        rows = np.flatnonzero(splits == split)
        for source in sources:
            rows = rows[source.has_features(rows)]
        if len(rows):
            first = rows[np.unique(labels[rows], return_index=True)[1]]
            drawn = first[np.linspace(0, len(first) - 1, min(EXAMPLES, len(first))).astype(int)]
            others = np.setdiff1d(rows, drawn)
            some = others[np.unique(np.linspace(0, len(others) - 1, MEASURED).astype(int))] if len(others) else others
            return np.concatenate([drawn, some])
    return np.zeros(0, dtype=np.int64)


def _spread(weights: Tensor, source: FeatureSource) -> dict[int, float]:
    """Of how many places a reader reads, by timestep: exp(entropy) / L, mean over images and readers; 1 is evenly."""
    entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1)  # (N, P, K)
    shares = (entropy.exp() / weights.shape[-1]).mean((0, 2))
    return dict(zip(source.shape.timesteps, shares.tolist(), strict=True))


def _apart(weights: Tensor) -> Tensor:
    """The total variation distance of each reader from the mean one: (N, P, K, L) -> (N, P, K)."""
    return (weights - weights.mean(2, keepdim=True)).abs().sum(-1) / 2


def _figure(weights: Tensor, source: FeatureSource, cache: Cache, rows: np.ndarray) -> str:
    """Rows are images; columns the picture, the mean reader at each timestep, and those that differ most from it."""
    shape, curriculum = source.shape, source.cache.manifest.curriculum
    sigma = dict(zip(curriculum.timesteps, curriculum.sigmas, strict=True))
    steps = list(range(len(shape.timesteps)))[-_MOST_TIMESTEPS:]
    clearest = min(steps, key=lambda step: sigma[shape.timesteps[step]])
    every = weights * shape.tokens  # times an even share
    drawn, mean = every[: min(EXAMPLES, len(rows))], every.mean(2)
    apart = _apart(weights)[:, clearest].mean(0)  # (K,)
    single = apart.topk(min(_SINGLE, len(apart) - 1)).indices.tolist()
    heat = [(f"timestep {t}\n(σ {sigma[t]:.2f})", mean[:, step]) for step, t in
            ((step, shape.timesteps[step]) for step in steps)]  # fmt: skip
    at = f"at {shape.timesteps[clearest]}"
    heat += [(f"reader {reader + 1}\n{at}", every[:, clearest, reader]) for reader in single]
    top = max(2.0, float(torch.cat([values[: len(drawn)].flatten() for _, values in heat]).quantile(0.99)))
    pictures = _pictures(cache, source, rows[: len(drawn)])
    with matplotlib.rc_context(STYLE):
        columns = 1 + len(heat)
        side = min(1.6, 10 / columns)
        figure = Figure(figsize=(10, side * len(drawn) + 0.5), layout="constrained")
        panels = figure.subplots(len(drawn), columns, squeeze=False)
        for axes in panels.ravel():
            axes.set_axis_off()
        for line, picture in zip(panels, pictures, strict=True):
            line[0].imshow(picture)
        for column, (title, values) in enumerate(heat, 1):
            panels[0, column].set_title(title, fontsize=8, fontweight="normal", loc="center")
            for line, picture, each in zip(panels, pictures, values, strict=False):
                shown = _draw(line[column], picture, each.reshape(shape.grid).numpy(), top)
        figure.colorbar(shown, ax=panels, shrink=0.6, aspect=30, label="times an even share")
        return data_uri(figure, "png")


def _draw(axes: Axes, picture: np.ndarray, heat: np.ndarray, top: float) -> matplotlib.image.AxesImage:
    """Heat of the token grid, each token as the square it is of, over the picture in grey."""
    height, width = picture.shape[:2]
    axes.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255)
    return axes.imshow(
        heat, cmap="inferno", alpha=0.6, vmin=0, vmax=top, interpolation="nearest", extent=(0, width, height, 0)
    )


def _pictures(cache: Cache, source: FeatureSource, rows: np.ndarray) -> list[np.ndarray]:
    """What the teacher saw of images, of the stored ones and as square as its tokens lie: (H, W, 3) uint8 each."""
    height, width = (_TOKEN * side for side in source.shape.grid)
    frames = Regions(cache, {"": source}, (_VIEW,)).frames(rows)
    shown = []
    for data, frame in zip(cache.images(rows.tolist()), frames, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            left, top, right, bottom = (frame * np.tile(image.size, 2)).round().tolist()
            seen = image.convert("RGB").crop((left, top, max(right, left + 1), max(bottom, top + 1)))
            shown.append(np.asarray(seen.resize((width, height), Image.Resampling.BICUBIC)))
    return shown
