"""Pictures of a cache: what the teacher saw and what it made of it, at every noise level. Needs the cache alone."""

import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache_schema import Cache
from cache_schema.errors import CacheRequestError, CacheUnsealed, DitDistillError
from cache_schema.format.card import described_view
from cache_schema.format.square import square_around
from cache_schema.format.vocabulary import CROP_VIEW
from cache_schema.storage.files import write_file
from pipeline.preview.page import Box, FeatureRow, SampleBlock, draw_block, draw_page
from pipeline.preview.token_colours import TokenColours, fit_colours

# Suffix → how Pillow is asked for it; words and squares need more than the usual quality.
_LOSSY = {"quality": 92}
FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "subsampling": 0, **_LOSSY},
    ".jpeg": {"format": "JPEG", "subsampling": 0, **_LOSSY},
    ".webp": {"format": "WEBP", **_LOSSY},
}
_MAX_HEIGHT = 16_000  # pixels; WebP allows no more, and nobody scrolls that far
# Enough for stable colours; at FLUX's size 2048 tokens of four timesteps take 200 MB.
_REFERENCE_SAMPLES, _REFERENCE_TOKENS = 32, 2048


def preview(cache: Cache, rows: Sequence[int], output: Path) -> Image.Image:
    """Draw the samples of the given rows below each other, write the picture to `output` and return it.

    Raises DitDistillError for a file format that cannot be written, CacheRequestError or CacheUnsealed, naming the
    sample, for rows without features.
    """
    check_format(output)
    for row in rows:
        _check_readable(cache, row)
    colours = {tap.name: fit_colours(_reference_tokens(cache, tap.name)) for tap in cache.manifest.taps}
    steps = cache.manifest.curriculum
    columns = [f"p = {p}, σ = {sigma:.2f}" for p, sigma in zip(steps.timesteps, steps.sigmas, strict=True)]
    panels: list[Image.Image] = []
    for row in rows:
        panels.append(draw_block(_block(cache, row, colours), columns))
        height = panels[0].height * len(rows)
        if height > _MAX_HEIGHT:
            fit = max(1, _MAX_HEIGHT // panels[0].height)
            raise DitDistillError(f"{len(rows)} samples make a picture {height} pixels high; ask for {fit} or fewer")
    page = draw_page(_title(cache), panels, _legend(cache))
    buffer = io.BytesIO()
    page.save(buffer, **FORMATS[output.suffix.lower()])
    write_file(output, buffer.getvalue())
    return page


def check_format(output: Path) -> None:
    """Raise DitDistillError unless the suffix is one of a picture format that can be written."""
    if output.suffix.lower() not in FORMATS:
        suffix = output.suffix or "no suffix"
        raise DitDistillError(f"{output}: cannot write {suffix}; end the name in {', '.join(FORMATS)}")


def find_rows(cache: Cache, names: Sequence[str]) -> list[int]:
    """Return the rows of samples named by id, or by row number where no id is that number.

    Raises CacheRequestError for an unknown sample, with the ids that look like it.
    """
    ids = cache.samples["id"].to_pylist()
    place = {sample_id: row for row, sample_id in enumerate(ids)}
    rows = []
    for name in names:
        if name in place:
            rows.append(place[name])
        elif name.isdecimal() and int(name) < len(ids):
            rows.append(int(name))
        elif name.isdecimal():
            raise CacheRequestError(
                f"cache {cache.manifest.label} has no row {name}: it has the rows 0 to {len(ids) - 1}"
            )
        else:
            near = difflib.get_close_matches(name, ids, n=3, cutoff=0.5) or ids[:3]
            raise CacheRequestError(f"cache {cache.manifest.label} has no sample {name!r}; it has {', '.join(near)}")
    return rows


def random_rows(cache: Cache, count: int, seed: int) -> list[int]:
    """Return `count` different rows that have features, ascending, the same for the same seed."""
    have = cache.feature_rows
    if not have:
        raise CacheUnsealed(f"cache {cache.folder} has no features yet; run the build again, it resumes")
    chosen = np.random.default_rng(seed).choice(len(have), size=min(count, len(have)), replace=False)
    return sorted(int(have[i]) for i in chosen)


def _check_readable(cache: Cache, row: int) -> None:
    sample = _sample(cache, row)
    name = f"sample {sample['id']} (row {row}) of cache {cache.manifest.label}"
    if sample["state"] != "ok":
        raise CacheRequestError(f"{name} is quarantined: {sample['reason']}")
    if row >= cache.manifest.dataset.feature_rows:
        splits = ", ".join(cache.manifest.dataset.feature_splits)
        raise CacheRequestError(f"{name} is of the split {sample['split']}; the cache has features of {splits} alone")
    # The reader knows why: not built yet, or the teacher failed on it.
    cache.read([row], tap=cache.manifest.taps[0].name)


def _sample(cache: Cache, row: int) -> dict[str, Any]:
    return cache.samples.slice(row, 1).to_pylist()[0]


def _tokens(cache: Cache, row: int, tap: str, view: int) -> np.ndarray:
    """Tokens of one sample in the teacher's channels, (T, L, C), timesteps as in the manifest."""
    return cache.restore(tap, cache.read([row], tap=tap, view=view).decode())[0].numpy()


def _reference_tokens(cache: Cache, tap: str) -> Iterator[np.ndarray]:
    """Yield evenly spread tokens of evenly spread samples, from the noisiest timestep to the clearest."""
    have = cache.feature_rows
    rows = [have[i * len(have) // _REFERENCE_SAMPLES] for i in range(_REFERENCE_SAMPLES)]
    rows = list(dict.fromkeys(rows))
    clearest_last = np.argsort(cache.manifest.curriculum.timesteps)
    for row in rows:
        tokens = _tokens(cache, row, tap, 0)[clearest_last]
        step = -(-tokens.shape[1] * len(rows) // _REFERENCE_TOKENS)
        yield tokens[:, ::step]


def _block(cache: Cache, row: int, colours: Mapping[str, TokenColours]) -> SampleBlock:
    sample = _sample(cache, row)
    image, note = _student_image(cache, row)
    label = f"class {sample['label']}" if sample["label"] >= 0 else "no label"
    return SampleBlock(
        heading=sample["id"],
        facts=[
            f"row {row}, {sample['split']}",
            f"{label} {sample['class_name']}".rstrip(),
            f"{sample['width']} × {sample['height']} px, box: {sample['box_source'] or 'none'}",
        ],
        caption=sample["caption"],
        image=image,
        note=note,
        box=_box(sample),
        rows=[
            FeatureRow(
                label=_row_label(cache, tap.name, view),
                mirrored=view == "hflip",
                shown=_shown(cache, sample, row, view),
                maps=_maps(cache, row, tap.name, number, colours[tap.name]),
            )
            for number, view in enumerate(cache.manifest.views)
            for tap in cache.manifest.taps
        ],
    )


def _shown(cache: Cache, sample: dict[str, Any], row: int, view: str) -> Box | None:
    """What a view shows of the image, as shares of width and height; None: the box."""
    if view.startswith(CROP_VIEW):
        x0, y0, x1, y1 = cache.crops[row, int(view.removeprefix(CROP_VIEW))].tolist()
        return x0, y0, x1, y1
    teacher = cache.manifest.teacher
    if teacher.input == "image":
        return 0.0, 0.0, 1.0, 1.0
    if teacher.crop == "square" and _box(sample) is not None:
        width, height = sample["width"], sample["height"]
        x0, y0, x1, y1 = square_around(tuple(sample["box"]), (width, height))
        return x0 / width, y0 / height, x1 / width, y1 / height
    return None


def _box(sample: dict[str, Any]) -> Box | None:
    """The box as shares of width and height; None where there is none or nothing of it is inside the image."""
    if not (sample["box"] and sample["width"] and sample["height"]):
        return None
    size = (sample["width"], sample["height"]) * 2
    x0, y0, x1, y1 = (min(max(value / side, 0.0), 1.0) for value, side in zip(sample["box"], size, strict=True))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _maps(cache: Cache, row: int, tap: str, view: int, colours: TokenColours) -> list[Image.Image]:
    """One picture per timestep with a pixel per token, in the order of the manifest."""
    info = cache.manifest.tap(tap)
    assert info is not None
    order = np.argsort(cache.manifest.curriculum.timesteps)
    coloured = np.empty((len(order), info.tokens, 3), dtype=np.uint8)
    coloured[order] = colours(_tokens(cache, row, tap, view)[order])
    return [Image.fromarray(tokens.reshape(*info.grid, 3)) for tokens in coloured]


def _row_label(cache: Cache, tap: str, view: str) -> str:
    info = cache.manifest.tap(tap)
    assert info is not None
    return f"{tap}, {view}: {info.grid[0]} × {info.grid[1]} tokens, {info.channels} channels"


def _student_image(cache: Cache, row: int) -> tuple[Image.Image | None, str]:
    """The student image, or what to say in its place."""
    if cache.manifest.images is None:
        return None, "this cache has no images"
    try:
        data = cache.images([row])[0]
    except CacheUnsealed:
        return None, "image not built yet"
    try:
        image = Image.open(io.BytesIO(data))
        if max(image.size) > cache.manifest.images.longest_side:
            # Decoding it could take any amount of memory.
            return None, "image is larger than the manifest says"
        return image.convert("RGB"), ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None, "image cannot be decoded"


def _title(cache: Cache) -> str:
    manifest = cache.manifest
    state = "" if manifest.sealed else ", partial"
    teacher = manifest.teacher
    return f"{manifest.label}{state}: teacher {teacher.source} at {teacher.resolution} px, {manifest.encoding.kind}"


def _legend(cache: Cache) -> str:
    clearest = max(cache.manifest.curriculum.timesteps)
    crops = ", or the random crop beside them" if cache.manifest.crops else ""
    return (
        f"Maps cover {described_view(cache.manifest.teacher)}{crops}. "
        "Colours: the three strongest directions in which tokens differ at "
        f"p = {clearest}, the clearest timestep; grey is the mean token, so a map greys out as its features know less "
        "of what the clearest show."
    )
