"""Scores as tables of text."""

from __future__ import annotations

from typing import Any

from trainer.evaluation.metrics import COLUMNS


def format_scores(scores: dict[str, Any]) -> str:
    """The table a person reads: one line per kind of embedding, percent."""
    lines = {"student (E_R)": scores["student"]}
    for name, by_timestep in (scores.get("auxiliary") or {}).items():
        about = auxiliary_about(scores, name)
        for timestep, values in by_timestep.items():
            where = "mean over timesteps" if timestep == "mean" else f"timestep {timestep}"
            lines[f"auxiliary ({about})" + (f", {where}" if len(by_timestep) > 1 else "")] = values
    return format_table(lines)


def auxiliary_about(scores: dict[str, Any], name: str) -> str:
    """What a reader is told an auxiliary embedding is; scores of an older version only have its name."""
    return str(scores.get("auxiliary_names", {}).get(name, name))


def auxiliary_condition(scores: dict[str, Any], name: str) -> str:
    """The same without the symbol before the first comma, for tables that say it elsewhere."""
    return auxiliary_about(scores, name).partition(", ")[2] or auxiliary_about(scores, name)


def format_table(lines: dict[str, dict[str, float]]) -> str:
    """Lay out scores by name as text: a header, then a line each, percent."""
    width = max(len(name) for name in lines)
    rows = [f"{'':{width}}" + "".join(f"{title:>8}" for title in COLUMNS.values())]
    for name, scores in lines.items():
        rows.append(f"{name:{width}}" + "".join(f"{100 * scores[column]:8.1f}" for column in COLUMNS))
    return "\n".join(rows)
