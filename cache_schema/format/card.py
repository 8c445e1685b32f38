"""The card of a cache: its README.md, for people, written from the manifest and from nothing that changes."""

import re

from cache_schema.errors import printable
from cache_schema.format.licences import licence_of
from cache_schema.format.manifest import Encoding, Manifest, StoreKind, TeacherInfo

_KINDS = {"timm": "an image encoder", "vae": "the VAE of a diffusion transformer"}  # by family; else such a transformer
_STORES: dict[StoreKind, str] = {
    "zarr": "Each array under `features/` is an ordinary Zarr v3 array; what its numbers mean is in its attributes and "
    "in `manifest.json`.",
    "webdataset": "Each tar under `features/` is an ordinary WebDataset shard, with one `.npy` member per sample and "
    "array; what its numbers mean is in `manifest.json`.",
}


def format_bytes(count: int | None) -> str:
    """Return a byte count as people write it, in powers of 1000."""
    if count is None:
        return "unknown"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def format_encoding(encoding: Encoding) -> str:
    """Return how features are encoded, in the order in which it is done."""
    steps = [] if encoding.pool == 1 else [f"mean over {encoding.pool}x{encoding.pool} tokens"]
    if encoding.massive != "keep":
        done = "removed" if encoding.massive == "remove" else "standardised"
        steps.append(f"massive channels (from {encoding.massive_factor:g} times the median on) {done}")
    steps += [] if encoding.pca is None else [f"{encoding.pca} principal components"]
    return ", ".join([*steps, encoding.kind, f"compression {encoding.compression}"])


def described_view(teacher: TeacherInfo) -> str:
    """What a teacher is shown in all views but random crops, as people say it."""
    if teacher.input == "image":
        return "the whole image"
    return "the square around the box of the object" if teacher.crop == "square" else "the box of the object"


def render_card(manifest: Manifest) -> bytes:
    """Return the bytes of the card of a sealed cache; equal caches have equal cards."""
    parts = [_heading(manifest), _contents(manifest), _taps(manifest), _fidelity(manifest), _use(manifest)]
    return ("\n\n".join(parts) + "\n").encode()


def _heading(manifest: Manifest) -> str:
    data, teacher = manifest.dataset, manifest.teacher
    kind = _KINDS.get(teacher.family, "a diffusion transformer")
    return (
        f"# Teacher cache {plain(manifest.label)}\n\n"
        f"Features of {data.feature_rows - len(manifest.failed_rows)} images of {code(data.name)} as {kind} "
        f"({plain(teacher.family)}, {code(teacher.source)}) sees them. "
        "Students are distilled from this cache without the teacher."
    )


def _contents(manifest: Manifest) -> str:
    data, teacher, curriculum = manifest.dataset, manifest.teacher, manifest.curriculum
    counts = ", ".join(f"{count} {split}" for split, count in sorted(data.counts.items()))
    levels = ", ".join(f"{p} (sigma {s:.4f})" for p, s in zip(curriculum.timesteps, curriculum.sigmas, strict=True))
    images = "none"
    if manifest.images is not None:
        quality = "" if manifest.images.quality is None else f", quality {manifest.images.quality}"
        shape = "" if manifest.images.shape == "square" else " or more, aspect kept,"
        images = (
            f"{manifest.images.size} px{shape} {manifest.images.format}{quality}, {format_bytes(manifest.bytes_images)}"
        )
    facts = {
        "cache id": f"`{manifest.cache_id}`",
        "data set": plain(f"{data.name}, protocol {data.protocol}, super-class {data.superclass}"),
        "images": plain(counts),
        "features of": plain(", ".join(data.feature_splits)) or "no split",
        "without features": f"{len(manifest.failed_rows)} images that the teacher failed on",
        "teacher": plain(f"{teacher.family} at {teacher.resolution} px in {teacher.dtype}, text: {teacher.text}"),
        "teacher weights": ", ".join(f"{plain(name)} `{sha[:12]}`" for name, sha in sorted(teacher.digests.items())),
        "licence of the teacher": plain(licence_of(teacher)),
        "refined (LoRA)": f"`{teacher.lora_digest[:12]}`" if teacher.lora_digest else "no",
        "shown": described_view(teacher),
        "timesteps": f"{levels} of {curriculum.num_steps}; seed {curriculum.seed}",
        "views": plain(", ".join(manifest.views)),
        "encoding": format_encoding(manifest.encoding),
        "size of features": format_bytes(manifest.bytes_features),
        "student images": images,
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in facts.items())])


def _taps(manifest: Manifest) -> str:
    rows = [f"| `{tap.name}` | {tap.tokens} ({tap.grid[0]}x{tap.grid[1]}) | {tap.channels} |" for tap in manifest.taps]
    notes = []
    if manifest.encoding.pca is not None:
        before = " or ".join(sorted({str(tap.teacher_channels) for tap in manifest.taps}))
        notes += [
            "",
            f"Channels are principal components of the teacher's {before}: see `cache.restore(tap, features)`.",
        ]
    done = "zeros" if manifest.encoding.massive == "remove" else "standardised"
    for name, channels in manifest.massive_channels.items():
        numbers = ", ".join(map(str, channels)) or "none"
        notes += ["", f"Massive channels of `{name}`, {done} here: {numbers}."]
    return "\n".join(["## Taps", "", "| tap | tokens | channels |", "| --- | ---: | ---: |", *rows, *notes])


def _fidelity(manifest: Manifest) -> str:
    pool = manifest.encoding.pool
    reference = "what the teacher computed" if pool == 1 else f"the mean of {pool}x{pool} tokens of the teacher"
    rows = [
        f"| {code(item.tap)} | {item.timestep} | {item.cosine_mean:.6f} | {item.cosine_min:.6f} | "
        f"{item.relative_error:.2e} | {item.channel_error:.2e} |"
        for item in manifest.fidelity
    ]
    return "\n".join(
        [
            "## Fidelity",
            "",
            f"How close stored features are to {reference}, measured while the cache was built.",
            "",
            "| tap | timestep | mean cosine | least cosine | relative error | per channel |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *rows,
        ]
    )


def _use(manifest: Manifest) -> str:
    return (
        "## Use\n\n"
        "```python\n"
        "from cache_schema import open_cache\n\n"
        'cache = open_cache("path/to/this/directory")\n'
        f'batch = cache.read([0], tap="{manifest.taps[0].name}", timesteps={manifest.curriculum.timesteps})\n'
        "features = batch.decode()  # (samples, timesteps, tokens, channels)\n"
        "```\n\n"
        f"`dit-cache info` describes it, `dit-cache verify` checks every byte. {_STORES[manifest.store.kind]} "
        "The images keep the licence of the data set they come from."
    )


def plain(text: str) -> str:
    """Return text that stays text in Markdown: no link, no HTML, no table, no line of its own."""
    return re.sub(r"[\\\[\]<>|`*]", lambda letter: f"\\{letter[0]}", printable(" ".join(text.split())))


def code(text: str) -> str:
    return "`" + printable(" ".join(text.split())).replace("`", "'").replace("|", "/") + "`"
