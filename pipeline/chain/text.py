"""A forecast as plain text for people."""

from typing import Any

from cache_schema.format.card import format_bytes


def forecast_text(found: dict[str, Any]) -> str:
    """Render what `pipeline.chain.forecast.forecast` found, without a final newline."""
    data = found["dataset"]
    splits = ", ".join(f"{count:,} {split}" for split, count in data["splits"].items())
    rows = [["step", "state", "hours", "size", "what"]]
    rows += [[s["step"], s["state"], _hours(s), _size(s), s["work"]] for s in found["steps"]]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    table = [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}"
        for row in rows
    ]
    paths = [
        f"  {s['step']:<{widths[0]}}  {' + '.join(s['inputs'])} → {s['output']}"
        for s in found["steps"]
        if s["step"] != "verify"
    ]
    lines = [f"{data['name']} ({data['protocol']}): {splits}; teacher {found['teacher']}", "", *table, "", *paths, ""]
    return "\n".join([*lines, *_notes(found)])


def _hours(step: dict[str, Any]) -> str:
    if step["state"] == "done":
        return "–"
    return "unknown" if step["hours"] is None else f"{step['hours']:.2g}"


def _size(step: dict[str, Any]) -> str:
    return "" if step["bytes"] is None or step["step"] == "verify" else format_bytes(step["bytes"])


def _notes(found: dict[str, Any]) -> list[str]:
    notes = []
    for step in found["steps"]:
        if step["differing"]:
            notes.append(f"{step['step']} was made otherwise: {'; '.join(step['differing'])}")
    if disk := found["disk"]:
        conditions = format_bytes(found["conditions"]["bytes"])
        notes.append(
            f"disk: {format_bytes(disk['needed'])} needed, {format_bytes(disk['free'])} free at {disk['path']}: "
            + ("fits" if disk["fits"] else "does not fit")
            + f"; up to {conditions} of it are conditions, which may be deleted afterwards"
        )
    known = [s for s in found["steps"] if s["state"] != "done" and s["hours"]]
    if known:
        basis = "; ".join(f"{s['step']}: {s['basis']}" for s in known)
        notes.append(f"hours: {found['hours']:.2g} of one device ({basis})")
    for step in found["steps"]:
        if step["step"] in found["unknown"]:
            notes.append(f"hours of {step['step']}: unknown; give {step['basis']}")
    if "build" in found["unknown"]:
        notes.append("`dit-cache estimate --measure 16` measures --images-per-second")
    notes += found["warnings"]
    return notes or ["everything is done"]
