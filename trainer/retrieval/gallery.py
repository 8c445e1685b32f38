"""The hits of a search as a picture: one HTML page that needs nothing else, or a PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont, ImageOps

from cache_schema.errors import printable
from trainer.errors import TrainError
from trainer.retrieval.images import Images
from trainer.retrieval.search import Found

TILE = 160  # pixels
_GAP, _TEXT = 12, 46
_INK, _SOFT, _PAPER = "#1d2329", "#5c6670", "#ffffff"
_HIT, _MISS, _NONE = "#16a34a", "#dc2626", "#d5dae0"

STYLE = """
:root { --ink: #1d2329; --soft: #5c6670; --line: #d5dae0; --hit: #16a34a; --miss: #dc2626; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 15px/1.45 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 22px; margin: 0 0 16px; overflow-wrap: anywhere; } h2 { font-size: 16px; margin: 0 0 12px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin-top: 16px; }
.soft { color: var(--soft); font-weight: 400; } p { margin: 8px 0 0; }
.query img { max-width: 260px; max-height: 260px; border-radius: 8px; display: block; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 14px; }
figure { margin: 0; } figcaption { font-size: 12.5px; line-height: 1.35; margin-top: 5px; overflow-wrap: anywhere; }
figure img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #eef0f3; border-radius: 8px;
  border: 3px solid var(--line); display: block; }
img.hit { border-color: var(--hit); } img.miss { border-color: var(--miss); }
"""


@dataclass(frozen=True)
class Query:
    """What was searched with: its name, its picture, and its class where it is known."""

    name: str
    picture: Image.Image
    class_name: str = ""


def render_html(query: Query, found: Sequence[Found], images: Sequence[Images]) -> str:
    """A page with a section per index; `images` are those of each."""
    sections = "".join(_section(query, each, own) for each, own in zip(found, images, strict=True))
    known = f'<p class="soft">{escape(query.class_name)}</p>' if query.class_name else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(query.name)}: nearest images</title><style>{STYLE}</style></head><body><main>
<h1>Nearest to {escape(query.name)}</h1>
<section class="query"><img alt="the query" src="{_data_uri(query.picture, 2 * TILE)}">{known}</section>
{sections}</main></body></html>
"""


def render_png(query: Query, found: Sequence[Found], images: Sequence[Images]) -> bytes:
    """The query at the left, and a row of hits for each index."""
    columns = max([1, *(len(each.hits) for each in found)])
    row_height = 28 + TILE + _TEXT
    width = _GAP + (TILE + _GAP) * (columns + 1) + _GAP
    canvas = Image.new("RGB", (width, _GAP + row_height * len(found)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _tile(canvas, draw, query.picture, (_GAP, _GAP + 28), _NONE, [_short(query.name), query.class_name or "query"])
    left = 2 * _GAP + TILE + _GAP
    for number, (each, own) in enumerate(zip(found, images, strict=True)):
        top = _GAP + number * row_height
        title = f"{each.index.label}: {len(each.hits)} nearest of {len(each.index):,} images"
        draw.text((left, top + 4), title, fill=_INK, font=_font(15))
        if not each.hits and each.note:
            draw.text((left, top + 40), each.note, fill=_SOFT, font=_font(13))
        for place, hit in enumerate(each.hits):
            colour = {"hit": _HIT, "miss": _MISS, "": _NONE}[_mark(query, hit.class_name)]
            lines = [hit.class_name or _short(hit.name), f"distance {1 - hit.similarity:.3f}"]
            _tile(canvas, draw, own.picture(hit.name), (left + place * (TILE + _GAP), top + 28), colour, lines)
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    return buffer.getvalue()


def thumbnail(picture: Image.Image, side: int) -> bytes:
    """A picture as a JPEG file of at most `side` pixels a side."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def _section(query: Query, found: Found, images: Images) -> str:
    cards = []
    for rank, hit in enumerate(found.hits, 1):
        try:
            source = _data_uri(images.picture(hit.name), TILE * 2)
        except TrainError as error:
            shown = f'<p class="soft">{escape(str(error))}</p>'
        else:
            shown = f'<img class="{_mark(query, hit.class_name)}" alt="hit {rank}" src="{source}">'
        named = f"{escape(hit.class_name)}<br>" if hit.class_name else ""
        place = escape(_short(hit.name))
        said = f'{rank}. {named}<span class="soft">distance {1 - hit.similarity:.3f}<br>{place}</span>'
        cards.append(f'<figure title="{escape(hit.name)}">{shown}<figcaption>{said}</figcaption></figure>')
    note = f'<p class="soft">{escape(found.note)}</p>' if found.note else ""
    title = f'{escape(found.index.label)} <span class="soft">{len(found.index):,} images</span>'
    return f'<section><h2>{title}</h2><div class="hits">{"".join(cards)}</div>{note}</section>\n'


def _mark(query: Query, class_name: str) -> str:
    """Whether a hit is of the query's class; "" where that is not known."""
    if not query.class_name:
        return ""
    return "hit" if class_name == query.class_name else "miss"


def _data_uri(picture: Image.Image, side: int) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(thumbnail(picture, side)).decode()


def _tile(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image, at: tuple[int, int], colour: str,
    lines: Sequence[str],
) -> None:  # fmt: skip
    """Draw a picture in a square with a coloured frame and two lines of text under it."""
    left, top = at
    draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill="#eef0f3", outline=colour, width=3)
    inside = ImageOps.contain(picture, (TILE - 6, TILE - 6), Image.Resampling.BICUBIC)
    canvas.paste(inside, (left + (TILE - inside.width) // 2, top + (TILE - inside.height) // 2))
    font = _font(12)
    for number, line in enumerate(lines):
        # Names of files and classes may hold line breaks.
        line = fitted(printable(line), lambda text: draw.textlength(text, font=font) <= TILE)
        draw.text((left, top + TILE + 4 + 16 * number), line, fill=_INK if number == 0 else _SOFT, font=font)


def fitted(text: str, fits: Callable[[str], bool]) -> str:
    """As much of a text as fits, less of its middle: names of sub-categories often differ in their ends."""
    kept, shown = len(text), text
    while not fits(shown) and kept > 4:
        kept -= 1
        shown = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return shown


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _short(name: str) -> str:
    return name.rpartition("/")[2]
