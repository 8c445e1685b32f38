"""What an ablation found, as CSV, Markdown and a figure with error bars."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cache_schema.storage.files import write_file
from trainer.evaluation.intervals import Difference, Interval, class_bootstrap, paired_class_bootstrap
from trainer.evaluation.metrics import COLUMNS
from trainer.evaluation.tables import headline
from trainer.evaluation.worth import not_followed
from trainer.reports.ablation_plan import BASELINE, Variant
from trainer.reports.ablation_run import Scored, paired


@dataclass(frozen=True)
class Row:
    """A variant over its seeds; scores in 0..1."""

    variant: Variant
    runs: list[Scored]
    recall: Interval  # R@1 over classes
    gain: Difference | None  # over the baseline's, query by query; None for the baseline itself

    def column(self, name: str) -> list[float]:
        """A score of each seed."""
        return [headline(run.scores)[name] for run in self.runs]

    @property
    def about(self) -> str:
        """What the variant is, and whether its runs followed their teacher."""
        without = sum(not_followed(run.result) is not None for run in self.runs)
        if not without:
            return self.variant.about
        return f"{self.variant.about}; the teacher not followed in {without} of {len(self.runs)}, as not worth it"

    def auxiliary(self, name: str) -> list[float]:
        """R@1 of an auxiliary embedding, averaged over timesteps, of each seed that has one."""
        found = [(run.scores["auxiliary"] or {}).get(name) for run in self.runs]
        return [part["mean"]["recall_at_1"] for part in found if part]


def tabulate(runs: Sequence[Scored], variants: Sequence[Variant]) -> list[Row]:
    """A row for each variant that has runs; gains are paired over the seeds that both it and the baseline have."""
    rows = []
    base = {run.cell.config.seed: run for run in runs if run.cell.variant.name == BASELINE}
    for variant in variants:
        own = sorted((run for run in runs if run.cell.variant == variant), key=lambda run: run.cell.config.seed)
        if not own:
            continue
        ids = sorted(own[0].hits)
        labels = _labels(own[0], ids)
        shared = [run for run in own if run.cell.config.seed in base]
        gain = None
        if variant.name != BASELINE and shared and set(ids) == set(base[shared[0].cell.config.seed].hits):
            against = paired([base[run.cell.config.seed] for run in shared], ids)
            gain = paired_class_bootstrap(paired(shared, ids), against, labels)
        rows.append(Row(variant, own, class_bootstrap(paired(own, ids), labels), gain))
    return rows


def _labels(run: Scored, ids: Sequence[str]) -> np.ndarray:
    return np.array([run.labels[name] for name in ids])


def as_markdown(rows: Sequence[Row]) -> str:
    """A table in percent: mean ± deviation over seeds, in brackets 95 % intervals by bootstrap over classes."""
    others = [title for name, title in COLUMNS.items() if name != "recall_at_1"]
    about = ["variant", "what it is", "seeds", "R@1 [95 %]", "R@1 − baseline [95 %]"]
    titles = [*about, *others, "with the teacher: E_D R@1", "the same, E_R masked", "s"]
    lines = [f"| {' | '.join(titles)} |", f"| --- | --- |{' ---: |' * (len(titles) - 2)}"]
    for row in rows:
        scores = [_spread(row.column(name)) for name in COLUMNS if name != "recall_at_1"]
        auxiliary = [_spread(row.auxiliary(name)) for name in ("unmasked", "masked")]
        seconds = f"{mean(run.result['seconds'] for run in row.runs):.0f}"
        recall = f"{_spread(row.column('recall_at_1'))} {_bounds(row.recall)}"
        gain = "–" if row.gain is None else f"{100 * row.gain.value:+.1f} {_bounds(row.gain)}"
        cells = [row.variant.name, row.about, str(len(row.runs)), recall, gain, *scores, *auxiliary, seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_csv(rows: Sequence[Row]) -> str:
    """One line a run; the intervals of its variant are on each."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    bounds = ["recall_low", "recall_high", "gain", "gain_low", "gain_high"]
    fields = ["seconds", "student_updates", "images_seen"]
    writer.writerow(["variant", "method", "seed", "run", *COLUMNS, "ed_unmasked", "ed_masked", *bounds, *fields])
    for row in rows:
        gain = ["", "", ""] if row.gain is None else [row.gain.value, row.gain.low, row.gain.high]
        for run in row.runs:
            auxiliary = run.scores["auxiliary"] or {}
            found = [auxiliary[n]["mean"]["recall_at_1"] if n in auxiliary else "" for n in ("unmasked", "masked")]
            config = run.cell.config
            writer.writerow([
                row.variant.name, run.result["method"], config.seed, run.cell.name,
                *(headline(run.scores)[name] for name in COLUMNS), *found,
                row.recall.low, row.recall.high, *gain, *(run.result[name] for name in fields),
            ])  # fmt: skip
    return out.getvalue()


def draw(rows: Sequence[Row]) -> Figure:
    """R@1 of each variant with its interval, and its gain over the baseline with its own."""
    with matplotlib.rc_context({"svg.hashsalt": "ablation"}):
        figure = Figure(figsize=(10, 1.2 + 0.35 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for place, row in enumerate(rows):
            _bar(left, place, row.recall)
            if row.gain is not None:
                _bar(right, place, row.gain)
        left.set_yticks(range(len(rows)), [row.variant.name for row in rows])
        left.invert_yaxis()
        left.set_xlabel("R@1, percent")
        right.set_xlabel("R@1 − baseline, points (paired)")
        right.axvline(0, color="0.6", linewidth=0.8)
    return figure


def _bar(axes: Axes, place: int, interval: Interval | Difference) -> None:
    below, above = interval.value - interval.low, interval.high - interval.value
    error = [[100 * max(0.0, below)], [100 * max(0.0, above)]]
    axes.errorbar(100 * interval.value, place, xerr=error, fmt="o", color="C0", capsize=3, markersize=4)


def write_tables(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ablation.csv, ablation.md and ablation.png; returns the files."""
    files = [folder / name for name in ("ablation.csv", "ablation.md", "ablation.png")]
    picture = io.BytesIO()
    draw(rows).savefig(picture, format="png", dpi=120)
    contents = (as_csv(rows).encode(), (as_markdown(rows) + "\n").encode(), picture.getvalue())
    for file, content in zip(files, contents, strict=True):
        write_file(file, content)
    return files


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _bounds(interval: Interval | Difference) -> str:
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
