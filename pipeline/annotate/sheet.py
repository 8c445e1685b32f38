"""The picture sheet: images with their boxes drawn and their captions below, to look at before a long run."""

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pipeline.datasets.base import Dataset, Sample
from pipeline.inputs.decoding import UNREADABLE, decode_with_box
from pipeline.inputs.pictures import save_picture

_COLUMNS = 6
_PICTURE, _GAP = (240, 200), 12
_LINE, _LINES, _CHARACTERS = 15, 10, 38
_COLOURS = {"detector": (230, 30, 30), "none-found": (240, 150, 0), "full": (120, 120, 120)}
_OTHER = (20, 110, 230)  # boxes that came with the data
# Pillow's own font has no others; typographic signs have plain equivalents.
_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


def draw_sheet(dataset: Dataset, rows: Sequence[Mapping[str, Any]], images: int, path: Path) -> None:
    """Write a PNG of up to `images` evenly spread rows of an annotation of this data set; `rows` in its order."""
    count = min(images, len(rows))
    places = [round(k * (len(rows) - 1) / max(1, count - 1)) for k in range(count)]
    cells = [_draw_cell(dataset, dataset.samples[place], rows[place]) for place in places]
    lines = [cells[k : k + _COLUMNS] for k in range(0, count, _COLUMNS)]
    heights = [max(cell.height for cell in line) + _GAP for line in lines]
    sheet = Image.new("RGB", (min(_COLUMNS, count) * (_PICTURE[0] + _GAP) + _GAP, sum(heights) + _GAP), "white")
    for k, line in enumerate(lines):
        for column, cell in enumerate(line):
            sheet.paste(cell, (_GAP + column * (_PICTURE[0] + _GAP), _GAP + sum(heights[:k])))
    save_picture(sheet, path)


def _draw_cell(dataset: Dataset, sample: Sample, row: Mapping[str, Any]) -> Image.Image:
    picture = Image.new("RGB", _PICTURE, "white")
    text = row["reason"] or row["caption"] or "(no caption)"
    if row["box"] is None:
        ImageDraw.Draw(picture).rectangle((0, 0, _PICTURE[0] - 1, _PICTURE[1] - 1), outline="grey")
    else:
        try:
            _draw_image(picture, dataset.read(sample), row)
        except UNREADABLE as error:
            text = f"cannot be read any more: {error}"
    score = "" if row["box_score"] is None else f" {row['box_score']:.2f}"
    leak = f", {row['leak']}" if row["leak"] not in ("", "clean") else ""
    wrapped = textwrap.wrap(plain(text), _CHARACTERS)
    if len(wrapped) > _LINES:
        wrapped = [*wrapped[: _LINES - 1], wrapped[_LINES - 1][: _CHARACTERS - 4] + " ..."]
    lines = [plain(sample.id)[-_CHARACTERS:], f"{row['box_source']}{score}{leak}", *wrapped]
    cell = Image.new("RGB", (_PICTURE[0], _PICTURE[1] + 4 + len(lines) * _LINE), "white")
    cell.paste(picture, (0, 0))
    pen, font = ImageDraw.Draw(cell), ImageFont.load_default(12)
    for k, line in enumerate(lines):
        pen.text((0, _PICTURE[1] + 4 + k * _LINE), line, fill="black" if k > 1 else (90, 90, 90), font=font)
    return cell


def _draw_image(picture: Image.Image, encoded: bytes, row: Mapping[str, Any]) -> None:
    image, box = decode_with_box(encoded, tuple(row["box"]))
    scale = min(_PICTURE[0] / image.width, _PICTURE[1] / image.height)
    small = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (_PICTURE[0] - small.width) // 2, (_PICTURE[1] - small.height) // 2
    picture.paste(small, (left, top))
    x0, y0, x1, y1 = (round(v * scale) for v in box)
    corners = (left + x0, top + y0, left + max(x0 + 1, min(x1, small.width) - 1), top + max(y0 + 1, y1 - 1))
    pen = ImageDraw.Draw(picture)
    # White around the colour, so that it shows on any background.
    pen.rectangle(corners, outline="white", width=4)
    pen.rectangle(corners, outline=_COLOURS.get(row["box_source"], _OTHER), width=2)


def plain(text: str) -> str:
    """Text in the signs that Pillow's own font has; others become a question mark."""
    text = unicodedata.normalize("NFKD", text.translate(_PLAIN))
    kept = "".join(c for c in text if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in kept)
