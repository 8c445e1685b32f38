"""An estimate as plain text for people."""

from typing import Any

from cache_schema.format.card import format_bytes


def estimate_text(found: dict[str, Any]) -> str:
    """Render what `pipeline.estimate.sizes.estimate` found, without its warnings and without a final newline."""
    width = max(len(name) for name, _ in _facts(found))
    lines = [f"{name:<{width}}  {text}" for name, text in _facts(found)]
    return "\n".join([*lines, "", *_table(found), "", *_notes(found), *_memory(found.get("memory"))])


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    teacher, rows = found["teacher"], found["rows"]
    taps = ", ".join(f"{t['name']} {t['grid'][0]}×{t['grid'][1]} tokens × {t['channels']}" for t in found["taps"])
    blocks = found["blocks"] or {"run": 0, "of": 0}
    run, of = blocks["run"], blocks["of"]
    facts = [
        ("teacher", f"{teacher['source']} at {teacher['resolution']} px, from its {teacher['origin']}"),
        ("taps", taps),
        *([("pass", f"{run} of {of} blocks, about {run / of:.0%} of the time of a whole pass")] if of else []),
        ("timesteps", ", ".join(map(str, found["timesteps"]))),
        ("views", ", ".join(found["views"])),
        ("images", f"{rows['features']:,} with features, {rows['images']:,} student images"),
    ]
    if rows["images"]:
        facts.append(("student image", f"{format_bytes(found['image']['bytes'])} ({found['image']['basis']})"))
    return facts


def _table(found: dict[str, Any]) -> list[str]:
    sizes, asked = found["sizes"], found["encoding"]
    reductions = list(dict.fromkeys((s["pool"], s["pca"]) for s in sizes))
    at = {(s["kind"], s["pool"], s["pca"]): s for s in sizes}
    header = [["", _reduction(*reductions[0]), "", ""], ["encoding", "per image", "total", "read/s"]]
    header[0] += [_reduction(*other) for other in reductions[1:]]
    header[1] += ["total"] * (len(reductions) - 1)
    rows = []
    for kind in dict.fromkeys(s["kind"] for s in sizes):
        first = at[kind, *reductions[0]]
        cells = [("* " if kind == asked["kind"] else "  ") + kind]
        cells += [format_bytes(first["bytes_per_image"]), format_bytes(first["total"])]
        cells.append(format_bytes(first["read_per_second"]))
        cells += [_total(at[kind, *other]) for other in reductions[1:]]
        rows.append(cells)
    widths = [max(len(row[i]) for row in [*header, *rows]) for i in range(len(header[1]))]
    # The heading of what was asked for spans its three columns.
    span = sum(widths[1:4]) + 4
    rest = [f"{text:>{w}}" for text, w in zip(header[0][4:], widths[4:], strict=True)]
    top = "  ".join([" " * widths[0], f"{header[0][1]:^{span}}", *rest]).rstrip()
    body = [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in [header[1], *rows]
    ]
    return [top, *body]


def _reduction(pool: int, pca: int | None) -> str:
    parts = [f"pool {pool}"] if pool > 1 else []
    parts += [f"pca {pca}"] if pca else []
    return ", ".join(parts) or "all tokens, all channels"


def _total(size: dict[str, Any]) -> str:
    return "–" if size["total"] is None else format_bytes(size["total"])


def _notes(found: dict[str, Any]) -> list[str]:
    reading, disk, hours = found["reading"], found["disk"], found["teacher_time"]
    conditions = found["conditions"]
    steps = ", ".join(map(str, reading["timesteps"]))
    given = "" if reading["given"] is None else f"; --bandwidth gives {format_bytes(round(reading['given']))}/s"
    notes = [
        "* as asked; scales, student images and indices included, before compression",
        f"reading: tap {reading['tap']} at timesteps {steps}, {reading['batch']} rows × "
        f"{reading['steps_per_second']:g} steps/s: {format_bytes(reading['needed'])}/s{given}",
        f"conditions: up to {format_bytes(conditions['bytes'])} of latents and embeddings of "
        f"{conditions['captions']:,} captions beside the cache; may be deleted after the build",
        f"disk: {format_bytes(disk['needed'])} needed, {format_bytes(disk['free'])} free at {disk['path']}: "
        + ("fits" if disk["fits"] else "does not fit"),
    ]
    if hours is None:
        notes.append("teacher: unknown; give --images-per-second, or --measure 16 to time it here")
    else:
        notes.append(
            f"teacher: {hours['images']:,} images at {hours['images_per_second']:.3g}/s ({hours['basis']}): "
            f"{hours['hours']:.3g} hours of one device"
        )
    return notes


def _memory(budget: dict[str, Any] | None) -> list[str]:
    if budget is None:
        return []
    limit, bits = format_bytes(budget["limit"]), f", transformer {budget['quantize']}" if budget["quantize"] else ""
    rows = []
    for phase in budget["phases"]:
        verdict = "fits" if phase["fits"] else "does not fit"
        rows.append((phase["name"], format_bytes(phase["total"]), verdict))
        rows += [(f"  {what}", format_bytes(size), "") for what, size in phase["device"].items()]
        rows += [(f"  {what}", format_bytes(size), "in host memory") for what, size in phase["host"].items()]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [
        "",
        f"memory: what is resident on a device of {limit}, phase after phase; {budget['dtype']}{bits}",
        *(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {note}".rstrip() for name, size, note in rows),
        "weights are exact; activations are the peak of live tensors, measured on the meta device; the rounding of the "
        "allocator and CUDA itself come on top",
    ]
