"""Scores as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.evaluation.metrics import COLUMNS, DETAILED

SHOWN = 3  # confusions

# What the teacher's features are scored as, without a method.
POOLED, LINEAR = "pooled", "linear"
FROZEN = {POOLED: "frozen features, mean over tokens", LINEAR: "linear head on them, of the training classes"}


def headline(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores that a run is compared by: its student's, or those of the embedding it says it is scored by."""
    name = scores.get("scored", "student")
    return scores["student"] if name == "student" else scores["auxiliary"][name]["mean"]


def reads_teacher(scores: Mapping[str, Any]) -> bool:
    """Whether what a run is compared by needs the teacher's features of every image at test time."""
    return bool(scores.get("scored", "student") != "student")


def format_scores(scores: dict[str, Any]) -> str:
    """The table a person reads: one line per kind of embedding, percent."""
    lines = {"student (E_R)": scores["student"]}
    for name, by_timestep in (scores.get("auxiliary") or {}).items():
        about = auxiliary_about(scores, name)
        for timestep, values in by_timestep.items():
            where = "mean over timesteps" if timestep == "mean" else f"timestep {timestep}"
            lines[f"auxiliary ({about})" + (f", {where}" if len(by_timestep) > 1 else "")] = values
    for name, by_timestep in (scores.get("frozen") or {}).items():
        lines[FROZEN[name]] = by_timestep["mean"]
    table = format_table(list(lines.items()))
    if not reads_teacher(scores):
        return table
    about = auxiliary_about(scores, scores["scored"])
    return f"{table}\nscored by {about}: below are its intervals, not those of the student alone"


def auxiliary_about(scores: dict[str, Any], name: str) -> str:
    """What a reader is told an auxiliary embedding is; scores of an older version only have its name."""
    return str(scores.get("auxiliary_names", {}).get(name, name))


def auxiliary_condition(scores: dict[str, Any], name: str) -> str:
    """The same without the symbol before the first comma, for tables that say it elsewhere."""
    return auxiliary_about(scores, name).partition(", ")[2] or auxiliary_about(scores, name)


def format_table(lines: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Lay out names and scores as text: a header, then a line each, percent; several may have one name."""
    width = max(len(name) for name, _ in lines)
    rows = [f"{'':{width}}" + "".join(f"{title:>8}" for title in COLUMNS.values())]
    for name, scores in lines:
        rows.append(f"{name:{width}}" + "".join(f"{100 * scores[column]:8.1f}" for column in COLUMNS))
    return "\n".join(rows)


def remark_on(scores: Mapping[str, Any]) -> str | None:
    """What a reader should know of scores whose embedding of the teacher's features is behind the features."""
    frozen, name = scores.get("frozen"), scores.get("made_of_teacher")
    if not frozen or not scores.get("auxiliary") or name not in scores["auxiliary"]:
        return None
    own = scores["auxiliary"][name]["mean"]["recall_at_1"]
    plain, linear = (frozen[kind]["mean"]["recall_at_1"] for kind in (POOLED, LINEAR))
    about = f"{scores['auxiliary_names'][name]} has R@1 {100 * own:.1f}"
    what = "it is not worth following as it is: train it faster (optim.gim_lr_scale) or longer"
    if own < plain:
        return f"warning: {about}, the frozen features that it reads have {100 * plain:.1f}; {what}"
    if own < linear:
        return f"note: {about}, a linear head on the features that it reads has {100 * linear:.1f}"
    return None


def format_details(scores: dict[str, Any], per_class: bool = False) -> str:
    """The student's scores with their intervals, against another run where there is one, and the worst confusions."""
    lines = [f"{'95 % interval':14}{'score':>7}{'over classes':>16}{'over queries':>16}"]
    against = scores.get("against")
    if against:
        lines[0] += f"{'difference':>12}{'interval':>16}{'p':>8}   from {against['run']}"
    for name, found in scores["intervals"].items():
        classes, queries = found["over_classes"], found["over_queries"]
        line = f"{DETAILED[name]:14}{100 * classes['value']:7.1f}{_interval(classes):>16}{_interval(queries):>16}"
        if against:
            by = against["difference"][name]
            line += f"{100 * by['value']:+12.1f}{_interval(by):>16}{by['p']:8.4f}"
        lines.append(line)
    for confusion in scores["confusions"][:SHOWN]:
        lines.append(f"{confusion['images']} of {confusion['class']} nearest to {confusion['taken_for']}")
    if per_class:
        width = max(len(line["class"]) for line in scores["per_class"])
        lines.append(f"{'class':{width}}{'images':>8}" + "".join(f"{title:>12}" for title in DETAILED.values()))
        for of in scores["per_class"]:
            values = "".join(f"{'-' if of[name] is None else f'{100 * of[name]:.1f}':>12}" for name in DETAILED)
            lines.append(f"{of['class']:{width}}{of['images']:8}{values}")
    return "\n".join(lines)


def _interval(found: dict[str, float]) -> str:
    return f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"
