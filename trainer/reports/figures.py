"""The figures of a report, as SVG data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.evaluation.metrics import COLUMNS
from trainer.evaluation.tables import auxiliary_about, headline

LINES = ("-", "--", ":", "-.")  # the losses of one panel
COLOURS = ("#7a8794", "#1f6feb", "#d97706", "#0f9d6c", "#a855f7", "#dc2626")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#c3cad2", "axes.labelcolor": "#46505a", "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "text.color": "#1d2329", "xtick.color": "#46505a", "ytick.color": "#46505a",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e8ebee", "legend.frameon": False,
    "svg.hashsalt": "dit-distill",
}  # fmt: skip


def recall_figure(scores: dict[str, dict[str, float]]) -> str:
    """Grouped bars of R@1, 2, 4, 8 and mAP@R, percent; `scores` by run name."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(scores)
        for i, (name, values) in enumerate(scores.items()):
            heights = [100 * values[metric] for metric in COLUMNS]
            places = np.arange(len(COLUMNS)) + (i - (len(scores) - 1) / 2) * width
            bars = axes.bar(places, heights, width * 0.92, label=name, color=_colour(i))
            axes.bar_label(bars, fmt="%.1f", fontsize=8 if len(scores) <= 4 else 6, padding=2)
        axes.set_xticks(np.arange(len(COLUMNS)), list(COLUMNS.values()))
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 108)
        axes.set_ylabel("percent")
        axes.legend(loc="upper left", ncols=min(4, len(scores)), bbox_to_anchor=(0, 1.14), borderaxespad=0)
        return data_uri(figure)


def loss_figure(logs: dict[str, list[dict[str, Any]]], panels: Mapping[str, Mapping[str, str]]) -> str:
    """Loss curves of each run by name, smoothed, over the raw values; recall during training where it was logged.

    `panels` are titles → {loss: what it is measured on}; where none of them was logged, the total loss is drawn.
    """
    measured = {name: [record for record in log if "eval" in record] for name, log in logs.items()}
    followed = any(len(records) > 1 for records in measured.values())
    shown = {title: parts for title, parts in panels.items() if any(_has(log, parts) for log in logs.values())}
    if not shown:
        shown = {"Loss": {"loss": ""}}
    with matplotlib.rc_context(STYLE):
        count = len(shown) + followed
        lines = math.ceil(count / 2)  # two titles are as long as a line has room for
        figure = Figure(figsize=(10, 3.2 * lines), layout="constrained")
        every = figure.subplots(lines, min(2, count), squeeze=False).ravel()
        for spare in every[count:]:
            spare.remove()
        every = every[:count]
        for axes, (title, parts) in zip(every, shown.items(), strict=False):
            axes.set_title(title)
            _plot_losses(axes, parts, logs)
        if followed:
            _plot_recall(every[-1], measured)
        for axes in every:
            axes.set_xlabel("student updates")
            if axes.get_legend_handles_labels()[0]:  # none where the log of a run is gone
                axes.legend(fontsize=8)
        return data_uri(figure)


def _plot_losses(axes: Axes, parts: Mapping[str, str], logs: dict[str, list[dict[str, Any]]]) -> None:
    for i, (name, log) in enumerate(logs.items()):
        for style, (part, where) in zip(cycle(LINES), parts.items(), strict=False):
            points = [(record["update"], record["losses"][part]) for record in log if part in record.get("losses", {})]
            if not points:
                continue
            updates, values = np.array(points).T
            axes.plot(updates, values, color=_colour(i), alpha=0.15, linewidth=0.8)
            label = f"{name} {where}".strip()
            axes.plot(updates, _smooth(values), style, color=_colour(i), linewidth=1.6, label=label)
    axes.set_ylim(bottom=0)


def _plot_recall(axes: Axes, measured: dict[str, list[dict[str, Any]]]) -> None:
    axes.set_title("R@1 on validation classes, percent")
    for i, (name, records) in enumerate(measured.items()):
        for style, (whose, points) in zip(cycle(LINES), recall_curves(records).items(), strict=False):
            updates, recalls = zip(*points, strict=True)
            label = f"{name} {whose}".strip()
            axes.plot(updates, [100 * recall for recall in recalls], f"o{style}", color=_colour(i), markersize=3,
                      label=label)  # fmt: skip
    axes.set_ylim(bottom=0)


def recall_curves(records: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """R@1 after each number of updates, of what a run is compared by ("") and of the others, by their symbols."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        update, scores = record["update"], record["eval"]
        curves.setdefault("", []).append((update, headline(scores)["recall_at_1"]))
        for name, by in (scores.get("auxiliary") or {}).items():
            if name != scores.get("scored", "student"):
                curves.setdefault(auxiliary_about(scores, name), []).append((update, by["mean"]["recall_at_1"]))
    return curves


def _has(log: list[dict[str, Any]], parts: Mapping[str, str]) -> bool:
    return any(part in record.get("losses", {}) for record in log for part in parts)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over 5 % of the run, shorter at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    start = np.clip(np.arange(len(values)) - half, 0, None)
    stop = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def data_uri(figure: Figure, kind: Literal["svg", "png"] = "svg") -> str:
    """A figure as a page holds it; png where it is of pixels or of thousands of points."""
    buffer = io.BytesIO()
    if kind == "svg":
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    else:
        figure.savefig(buffer, format="png", dpi=150)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
