"""Where a student puts the test images: its embeddings laid out on a plane, with how much of them the plane keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from trainer.reports.figures import STYLE, data_uri
from trainer.retrieval.gallery import fitted

MOST = 2000  # images: whole classes of them, for a lone image has no neighbours to keep
NEIGHBOURS = 10
_COLOURED = 8  # classes, more than which no eye tells apart
_COLOURS = ("#1f6feb", "#d97706", "#0f9d6c", "#dc2626", "#a855f7", "#0891b2", "#be185d", "#65a30d")
_OTHERS = "#c9d0d8"


@dataclass(frozen=True)
class Layout:
    """Places of images on a plane, (N, 2), and the share of each one's nearest that are nearest there too."""

    points: np.ndarray
    method: str
    kept: float


def map_figure(embeddings: Mapping[str, Tensor], labels: np.ndarray, names: Sequence[str], wrong: np.ndarray) -> str:
    """A map for each run by name, of the same images: embeddings (N, C), labels (N,), the names of classes by label.

    Coloured are the classes that most images of are `wrong` (N,) bool, in the run that the others are held against.
    """
    rows = _some_classes(labels)
    shown = labels[rows]
    mixed = np.bincount(labels[wrong], minlength=len(names))
    worst = [c for c in np.argsort(-mixed, kind="stable") if mixed[c] and c in set(shown.tolist())][:_COLOURED]
    layouts = {name: lay_out(part[torch.from_numpy(rows)]) for name, part in embeddings.items()}
    with matplotlib.rc_context(STYLE):
        columns = min(3, len(layouts))
        lines = math.ceil(len(layouts) / columns)
        figure = Figure(figsize=(10, 10 / columns * lines + 0.3 * math.ceil(len(worst) / 2)), layout="constrained")
        every = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in every:
            axes.set_axis_off()
        for axes, (name, layout) in zip(every, layouts.items(), strict=False):
            axes.set_title(f"{name}\n{layout.method}; keeps {layout.kept:.0%} of the {NEIGHBOURS} nearest", fontsize=9)
            others = ~np.isin(shown, worst)
            axes.scatter(*layout.points[others].T, s=7, color=_OTHERS, linewidths=0)
            for colour, label in zip(_COLOURS, worst, strict=False):
                own = layout.points[shown == label].T
                axes.scatter(*own, s=16, color=colour, linewidths=0, label=_shortened(names[label]))
        if worst:
            handles, texts = every[0].get_legend_handles_labels()
            figure.legend(handles, texts, loc="outside lower left", ncols=2, fontsize=8)
        return data_uri(figure, "png")


def lay_out(embeddings: Tensor) -> Layout:
    """Embeddings (N, C) by t-SNE of their cosines where scikit-learn is installed, else their first two components.

    Sources: van der Maaten & Hinton, "Visualizing Data using t-SNE", JMLR 2008; that a map says how far it can be
    trusted: Venna & Kaski, "Neighborhood preservation in nonlinear projection methods", ICANN 2001.
    """
    unit = F.normalize(embeddings.double(), dim=-1)
    found = _by_tsne(unit.numpy())
    method = "principal components" if found is None else "t-SNE"
    points = _principal(unit) if found is None else found
    place = torch.from_numpy(points).double()
    there = min(NEIGHBOURS, len(points) - 1)
    if there < 1:
        return Layout(points, method, 1.0)
    close = (unit @ unit.T).fill_diagonal_(-torch.inf).topk(there).indices
    near = (-torch.cdist(place, place)).fill_diagonal_(-torch.inf).topk(there).indices
    kept = (close[:, :, None] == near[:, None, :]).any(2).double().mean()
    return Layout(points, method, float(kept))


def _by_tsne(unit: np.ndarray) -> np.ndarray | None:
    """None where scikit-learn is missing, or there are too few images."""
    if len(unit) < 2 * NEIGHBOURS:
        return None
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None
    perplexity = min(30.0, (len(unit) - 1) / 3)
    # Of unit vectors, whose distances rank as their cosines do; from the principal components, so that what is far
    # apart stays so (Kobak & Linderman, Nature Biotechnology 2021).
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=0, n_jobs=1)
    return tsne.fit_transform(unit.astype(np.float32))


def _principal(unit: Tensor) -> np.ndarray:
    centred = unit - unit.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ directions[:2].T
    return F.pad(points, (0, 2 - points.shape[1])).numpy()


def _some_classes(labels: np.ndarray) -> np.ndarray:
    """The rows of all classes or, where these have too many images, of classes evenly spaced among them."""
    if len(labels) <= MOST:
        return np.arange(len(labels))
    count = labels.max() + 1
    wanted = max(2, int(count * MOST / len(labels)))
    return np.flatnonzero(np.isin(labels, np.linspace(0, count - 1, wanted).astype(int)))


def _shortened(name: str) -> str:
    return fitted(name, lambda text: len(text) <= 48)
