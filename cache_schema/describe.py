"""What `dit-cache info` says about a cache: one dictionary for scripts, one text for people."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cache_schema import layout
from cache_schema.card import format_bytes, format_encoding
from cache_schema.journal import committed_shards, read_record
from cache_schema.manifest import Manifest
from cache_schema.manifest_file import load_manifest
from cache_schema.reader import local_path


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return everything there is to say about the cache at `path`, sealed or not, as plain JSON values.

    Keys: `path`, `state` ("sealed" or "partial"), `manifest` (the whole document), `shards` (done and total, of
    features and images), `samples_with_features`, `quarantined` (list of id and reason), `failed` (list of row and
    reason, of the samples that the teacher failed on), `shapes` (of the arrays).
    """
    root = local_path(path)
    manifest = load_manifest(root)
    store = manifest.store
    features, images = committed_shards(root, "features"), committed_shards(root, "images")
    failed = _failed(root, manifest, features)
    per_shard, rows = store.samples_per_shard, manifest.dataset.feature_rows
    return {
        "path": str(root),
        "state": "sealed" if manifest.sealed else "partial",
        "manifest": manifest.model_dump(mode="json"),
        "shards": {
            "features": {"done": len(features), "total": store.feature_shards},
            "images": {"done": len(images), "total": store.image_shards},
        },
        "samples_with_features": sum(len(layout.rows_of_shard(shard, per_shard, rows)) for shard in features)
        - len(failed),
        "quarantined": _quarantined(root / layout.SAMPLES_NAME),
        "failed": failed,
        "shapes": _shapes(manifest),
    }


def describe_text(path: str | os.PathLike[str]) -> str:
    """Return the description of the cache at `path` as plain text, one fact to a line, without a final newline."""
    description = describe(path)
    document, shards = description["manifest"], description["shards"]
    manifest = Manifest.model_validate(document)
    facts = [
        ("cache", f"{manifest.label} at {description['path']}"),
        ("id", manifest.cache_id),
        ("state", _state(description)),
        *_content_facts(manifest),
        (
            "shards of features",
            f"{_progress(shards['features'])}, {manifest.store.samples_per_shard} samples each",
        ),
        ("shards of images", f"{_progress(shards['images'])}, {manifest.store.images_per_shard} images each"),
        (
            "size",
            f"features {format_bytes(manifest.bytes_features)}, images {format_bytes(manifest.bytes_images)}",
        ),
    ]
    facts += [(f"array {name}", f"{tuple(shape)}") for name, shape in description["shapes"].items()]
    facts += _fidelity_facts(manifest) + _provenance_facts(manifest)
    quarantined = description["quarantined"]
    facts.append(("quarantined", str(len(quarantined))))
    facts += [(f"  {item['id']}", item["reason"]) for item in quarantined]
    facts.append(("the teacher failed on", str(len(description["failed"]))))
    facts += [(f"  row {item['row']}", item["reason"]) for item in description["failed"]]
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in facts)


def _progress(shards: dict[str, int]) -> str:
    return f"{shards['done']} of {shards['total']}"


def _state(description: dict[str, Any]) -> str:
    if description["state"] == "sealed":
        return "sealed"
    total = description["manifest"]["dataset"]["feature_rows"]
    return f"partial: {description['samples_with_features']} of {total} samples have features"


def _content_facts(manifest: Manifest) -> list[tuple[str, str]]:
    data, teacher, curriculum = manifest.dataset, manifest.teacher, manifest.curriculum
    counts = ", ".join(f"{count} {split}" for split, count in sorted(data.counts.items()))
    steps = ", ".join(f"{p} (sigma {s:.4f})" for p, s in zip(curriculum.timesteps, curriculum.sigmas, strict=True))
    images = manifest.images
    return [
        ("data set", f"{data.name}, protocol {data.protocol}, super-class {data.superclass}; {counts}"),
        ("features of", f"{', '.join(data.feature_splits) or 'no split'}: {data.feature_rows} samples"),
        ("teacher", f"{teacher.family} {teacher.source} ({teacher.pipeline_class}, {teacher.dtype})"),
        ("resolution", f"{teacher.resolution} px, text: {teacher.text}, guidance: {teacher.guidance}"),
        ("refined", f"LoRA {teacher.lora_digest[:12]}" if teacher.lora_digest else "no"),
        ("timesteps", f"{steps} of {curriculum.num_steps}; seed {curriculum.seed}"),
        ("views", ", ".join(manifest.views)),
        ("store", manifest.store.kind),
        ("encoding", format_encoding(manifest.encoding)),
        ("images", "none" if images is None else f"{images.size} px {images.format}"),
    ]


def _fidelity_facts(manifest: Manifest) -> list[tuple[str, str]]:
    return [
        (
            f"fidelity {item.tap} at {item.timestep}",
            f"cosine {item.cosine_mean:.6f} (least {item.cosine_min:.6f}), relative error {item.relative_error:.2e}, "
            f"per channel {item.channel_error:.2e}",
        )
        for item in manifest.fidelity
    ]


def _provenance_facts(manifest: Manifest) -> list[tuple[str, str]]:
    source = manifest.provenance
    versions = ", ".join(f"{name} {version}" for name, version in sorted(source.versions.items()))
    seconds = None if source.seconds is None else f"{source.seconds:.0f} s"
    facts = {
        "created": source.created,
        "device": source.device,
        "took": seconds,
        "versions": versions,
        "command": source.command,
        "converted": source.converted,
    }
    return [(name, text) for name, text in facts.items() if text]


def _shapes(manifest: Manifest) -> dict[str, list[int]]:
    shapes = {}
    for array in layout.all_layouts(manifest):
        shapes[array.name] = [*array.outer, *array.inner]
    return shapes


def _failed(root: Path, manifest: Manifest, shards: Iterable[int]) -> list[dict[str, Any]]:
    if manifest.sealed:
        # Of a large cache, only the records that have something to say are read.
        shards = {row // manifest.store.samples_per_shard for row in manifest.failed_rows}
    records = (read_record(root, "features", shard) for shard in sorted(shards))
    return [item.model_dump() for record in records if record is not None for item in record.failed]


def _quarantined(path: Path) -> list[dict[str, str]]:
    import pyarrow.compute as pc

    from cache_schema.samples import load_samples

    if not path.exists():
        # A build that died before it wrote its table has nothing to list yet.
        return []
    table = load_samples(path)
    return table.filter(pc.equal(table["state"], "quarantined")).select(["id", "reason"]).to_pylist()
