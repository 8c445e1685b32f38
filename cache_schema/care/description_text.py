"""What `dit-cache info` prints: the description of a cache as facts and tables for people."""

from collections.abc import Iterator, Sequence
from typing import Any

from cache_schema.errors import printable
from cache_schema.format.card import described_view, format_bytes, format_encoding
from cache_schema.format.manifest import Manifest

# Of long lists, this many entries; `--json` has all of them.
_SHOWN = 10

Fact = tuple[str, str]


def render_description(description: dict[str, Any]) -> str:
    """Render what `cache_schema.care.describe.describe` found as plain text, without a final newline."""
    manifest = Manifest.model_validate(description["manifest"])
    facts = [
        ("cache", f"{manifest.label} at {description['path']}"),
        ("id", manifest.cache_id),
        ("state", _state(description)),
        *_content(manifest),
        *_storage(description, manifest),
        *_provenance(manifest),
    ]
    parts = [_aligned(facts), _table(*_arrays(description)), _table(*_splits(description))]
    parts += [_table(*_fidelity(description))] if description["fidelity"] else []
    parts.append(_listed("quarantined", [(item["id"], item["reason"]) for item in description["quarantined"]]))
    failed = [(f"row {item['row']}", item["reason"]) for item in description["failed"]]
    parts.append(_listed("the teacher failed on", failed))
    named = [
        (" = ".join(d["ids"]), f"in {' and '.join(d['splits'])}, class {' and '.join(d['classes'])}")
        for d in description["duplicates"]
    ]
    parts.append(_listed("the same file in several classes, or in training and test", named))
    parts += [_table(*_shards(description))] if "shard_table" in description else []
    return "\n\n".join(parts)


def _state(description: dict[str, Any]) -> str:
    if description["state"] == "sealed":
        return "sealed"
    total = description["manifest"]["dataset"]["feature_rows"]
    return f"partial: {description['samples_with_features']} of {total} samples have features"


def _content(manifest: Manifest) -> list[Fact]:
    data, teacher, curriculum = manifest.dataset, manifest.teacher, manifest.curriculum
    counts = ", ".join(f"{count} {split}" for split, count in sorted(data.counts.items()))
    steps = ", ".join(f"{p} (sigma {s:.4f})" for p, s in zip(curriculum.timesteps, curriculum.sigmas, strict=True))
    numbers = f"{teacher.dtype}, weights {teacher.quantization}" if teacher.quantization else teacher.dtype
    images = manifest.images
    return [
        ("data set", f"{data.name}, protocol {data.protocol}, super-class {data.superclass}; {counts}"),
        ("features of", f"{', '.join(data.feature_splits) or 'no split'}: {data.feature_rows} samples"),
        ("teacher", f"{teacher.family} {teacher.source} ({teacher.pipeline_class}, {numbers})"),
        (
            "resolution",
            f"{teacher.resolution} px, text: {teacher.text}, guidance: {teacher.guidance}, context: {teacher.context}",
        ),
        ("shown", described_view(teacher)),
        ("refined", f"LoRA {teacher.lora_digest[:12]}" if teacher.lora_digest else "no"),
        ("timesteps", f"{steps} of {curriculum.num_steps}; seed {curriculum.seed}"),
        ("views", ", ".join(manifest.views)),
        ("encoding", format_encoding(manifest.encoding)),
        *((f"massive in {name}", _some([str(c) for c in found])) for name, found in manifest.massive_channels.items()),
        ("images", "none" if images is None else f"{images.size} px {images.format}, {images.shape}"),
    ]


def _storage(description: dict[str, Any], manifest: Manifest) -> list[Fact]:
    store, shards, sizes = manifest.store, description["shards"], description["bytes"]
    return [
        ("store", store.kind),
        ("shards of features", f"{_progress(shards['features'])}, {store.samples_per_shard} samples each"),
        ("shards of images", f"{_progress(shards['images'])}, {store.images_per_shard} images each"),
        (
            "on disk",
            f"{format_bytes(sizes['total'])}: features {format_bytes(sizes['features'])}, "
            f"images {format_bytes(sizes['images'])}",
        ),
    ]


def _progress(shards: dict[str, int]) -> str:
    return f"{shards['done']} of {shards['total']}"


def _provenance(manifest: Manifest) -> list[Fact]:
    source = manifest.provenance
    facts = {
        "created": source.created,
        "device": source.device,
        "took": None if source.seconds is None else f"{source.seconds:.0f} s",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(source.versions.items())),
        "command": source.command,
        "converted": source.converted,
        "a part": source.pulled,
        "owner": source.owner,
    }
    return [(name, text) for name, text in facts.items() if text]


def _arrays(description: dict[str, Any]) -> Iterator[list[str]]:
    yield ["array", "shape", "type", ">on disk"]
    for name, array in description["arrays"].items():
        yield [name, "×".join(map(str, array["shape"])), array["dtype"], format_bytes(array["bytes"])]


def _splits(description: dict[str, Any]) -> Iterator[list[str]]:
    yield ["split", ">images", ">with features", ">features on disk", ">images on disk"]
    for name, split in description["splits"].items():
        yield [
            name,
            str(split["rows"]),
            str(split["rows_with_features"]),
            format_bytes(split["features"]),
            format_bytes(split["images"]),
        ]


def _fidelity(description: dict[str, Any]) -> Iterator[list[str]]:
    yield ["fidelity", ">timestep", ">mean cosine", ">least cosine", ">relative error", ">per channel"]
    for item in description["fidelity"]:
        yield [
            item["tap"],
            str(item["timestep"]),
            f"{item['cosine_mean']:.6f}",
            f"{item['cosine_min']:.6f}",
            f"{item['relative_error']:.2e}",
            f"{item['channel_error']:.2e}",
        ]


def _shards(description: dict[str, Any]) -> Iterator[list[str]]:
    yield ["shard", ">number", ">rows", "state", ">on disk", ">files", ">least cosine", "failed rows"]
    for entry in description["shard_table"]:
        first, end = entry["rows"]
        cells = [entry["kind"], str(entry["shard"]), f"{first}-{end - 1}"]
        if not entry["committed"]:
            yield [*cells, "missing", "", "", "", ""]
            continue
        cosine, failed = entry["cosine_min"], entry["failed"]
        yield [
            *cells,
            "committed",
            format_bytes(entry["bytes"]),
            str(entry["files"]),
            "" if cosine is None else f"{cosine:.6f}",
            _some([str(row) for row in failed]),
        ]


def _listed(title: str, items: Sequence[Fact]) -> str:
    """A count, and the first few samples with their reasons."""
    shown = _aligned([(f"  {name}", reason) for name, reason in items[:_SHOWN]]).splitlines()
    rest = [f"  and {len(items) - _SHOWN} more; --json lists all"] if len(items) > _SHOWN else []
    return "\n".join([f"{title}  {len(items)}", *shown, *rest])


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f", … ({len(items)})" if len(items) > _SHOWN else "")


def _aligned(facts: Sequence[Fact]) -> str:
    facts = [(printable(name), printable(text)) for name, text in facts]
    width = max((len(name) for name, _ in facts), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in facts)


def _table(header: Sequence[str], *rows: Sequence[str]) -> str:
    """Columns as wide as they need; those whose heading begins with `>` are set to the right."""
    right = [title.startswith(">") for title in header]
    lines = [[title.removeprefix(">") for title in header], *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            f"{cell:>{width}}" if to_right else f"{cell:<{width}}"
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )
