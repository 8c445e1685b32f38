"""How a preview is laid out: fonts, panels and pages. Knows pictures and words, nothing of caches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from cache_schema.errors import printable

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Box = tuple[float, float, float, float]

# Found by name among the system's fonts; Pillow's own has no Greek letters and no accents.
_FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "Arial Unicode.ttf")
_ASCII = str.maketrans({"σ": "sigma", "×": "x", "–": "-", "…": "..."})
_TEXT_SIZE, _HEADING_SIZE, _LINE = 13, 15, 18
_CELL, _IMAGE, _GAP, _MARGIN = 148, 272, 10, 18
_INK, _FAINT, _PAPER, _EMPTY = "#1d2329", "#5b6670", "#ffffff", "#eef0f2"
_BOX_COLOURS = ("#101418", "#ffd60a")  # a light line inside a dark one is seen on every photograph


@dataclass(frozen=True)
class FeatureRow:
    """One row of maps, one pixel per token; mirrored: whether its view mirrors the image.

    shown: what the maps cover, as shares of width and height, maybe beyond the image; None: the box of the sample.
    """

    label: str
    mirrored: bool
    maps: Sequence[Image.Image]
    shown: Box | None = None


@dataclass(frozen=True)
class SampleBlock:
    """Everything shown of one sample.

    image: square, or None, and `note` says why in its place. box: x0, y0, x1, y1 as shares of width and height.
    """

    heading: str
    facts: Sequence[str]
    caption: str
    image: Image.Image | None
    note: str
    box: Box | None
    rows: Sequence[FeatureRow]


def draw_block(block: SampleBlock, columns: Sequence[str]) -> Image.Image:
    """Draw one sample: image, box and words on the left, a row of maps per view and tap on the right."""
    words = _words(block)
    left = _IMAGE + _GAP + _LINE * len(words)
    row_height = _LINE + _CELL + _GAP
    right = _LINE + row_height * len(block.rows)
    width = _IMAGE + 2 * _GAP + (_CELL + _GAP) * (1 + len(columns))
    panel = Image.new("RGB", (width, max(left, right)), _PAPER)
    draw = ImageDraw.Draw(panel)
    panel.paste(_image_with_box(block), (0, 0))
    for i, (text, size, colour) in enumerate(words):
        _write(draw, (0, _IMAGE + _GAP + i * _LINE), text, size, colour)
    x0 = _IMAGE + 2 * _GAP
    for i, title in enumerate(("object view", *columns)):
        _write(draw, (x0 + i * (_CELL + _GAP), 0), title, _TEXT_SIZE, _INK)
    for number, row in enumerate(block.rows):
        y = _LINE + number * row_height
        _write(draw, (x0, y), row.label, _TEXT_SIZE, _FAINT)
        for i, cell in enumerate((_object_view(block, row), *(_enlarge(m) for m in row.maps))):
            panel.paste(cell, (x0 + i * (_CELL + _GAP), y + _LINE))
    return panel


def draw_page(title: str, panels: Sequence[Image.Image], legend: str) -> Image.Image:
    """Put the panels of samples below each other, with a title and a legend."""
    width = max(panel.width for panel in panels)
    lines = wrap(legend, width, _TEXT_SIZE)
    height = 2 * _LINE + sum(panel.height + _GAP + _MARGIN for panel in panels) + _LINE * len(lines)
    page = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, (_MARGIN, _MARGIN), title, _HEADING_SIZE, _INK)
    y = _MARGIN + 2 * _LINE - _GAP
    for panel in panels:
        draw.line((_MARGIN, y, _MARGIN + width, y), fill=_EMPTY, width=2)
        page.paste(panel, (_MARGIN, y + _GAP))
        y += panel.height + _GAP + _MARGIN
    for i, line in enumerate(lines):
        _write(draw, (_MARGIN, y + i * _LINE), line, _TEXT_SIZE, _FAINT)
    return page


def wrap(text: str, width: int, size: int) -> list[str]:
    """Break text into lines of at most `width` pixels, between words where that is possible."""
    lines: list[str] = []
    for word in printable(" ".join(text.split())).split(" "):
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _length(joined, size) <= width:
            lines[-1] = joined
            continue
        while _length(word, size) > width:
            fit = max(
                1, next(n for n in range(min(len(word), width), 0, -1) if n == 1 or _length(word[:n], size) <= width)
            )
            lines.append(word[:fit])
            word = word[fit:]
        if word:
            lines.append(word)
    return lines


@cache
def _font(size: int) -> tuple[Font, bool]:
    """A font of the system with Greek letters, or Pillow's own, and whether it has them."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size), True
        except OSError:
            continue
    return ImageFont.load_default(size), False


def _shown(text: str, greek: bool) -> str:
    # Control characters make some fonts fail.
    text = printable(text)
    return text if greek else text.translate(_ASCII).encode("ascii", "replace").decode("ascii")


def _length(text: str, size: int) -> float:
    font, greek = _font(size)
    return font.getlength(_shown(text, greek))


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: str) -> None:
    font, greek = _font(size)
    draw.text(place, _shown(text, greek), font=font, fill=colour)


def _words(block: SampleBlock) -> list[tuple[str, int, str]]:
    """The lines below the image: text, size and colour."""
    heading = [(line, _HEADING_SIZE, _INK) for line in wrap(block.heading, _IMAGE, _HEADING_SIZE)]
    facts = [(line, _TEXT_SIZE, _FAINT) for fact in block.facts for line in wrap(fact, _IMAGE, _TEXT_SIZE)]
    caption = wrap(f"“{block.caption}”", _IMAGE, _TEXT_SIZE) if block.caption else ["no caption"]
    return [*heading, *facts, *((line, _TEXT_SIZE, _INK) for line in caption)]


def _image_with_box(block: SampleBlock) -> Image.Image:
    square = _placeholder(_IMAGE, block.note) if block.image is None else _resized(block.image, _IMAGE)
    if block.box is not None:
        draw = ImageDraw.Draw(square)
        x0, y0, x1, y1 = (round(share * (_IMAGE - 1)) for share in block.box)
        for inset, colour in zip((0, 1, 2, 3), (_BOX_COLOURS[0], *_BOX_COLOURS[1:] * 2, _BOX_COLOURS[0]), strict=True):
            if x1 - x0 > 2 * inset and y1 - y0 > 2 * inset:
                draw.rectangle((x0 + inset, y0 + inset, x1 - inset, y1 - inset), outline=colour)
    return square


def _object_view(block: SampleBlock, row: FeatureRow) -> Image.Image:
    """What the maps cover: a part of the student image, as large as a map, in its mean colour where it is beyond it."""
    if block.image is None:
        return _placeholder(_CELL, block.note)
    x0, y0, x1, y1 = row.shown or block.box or (0.0, 0.0, 1.0, 1.0)
    width, height = block.image.size
    box = (x0 * width, y0 * height, max(x1 * width, x0 * width + 1e-3), max(y1 * height, y0 * height + 1e-3))
    if min(x0, y0) < 0 or max(x1, y1) > 1:
        mean = block.image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        crop = block.image.transform((_CELL, _CELL), Image.Transform.EXTENT, box, fillcolor=mean)
    else:
        crop = block.image.resize((_CELL, _CELL), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(crop) if row.mirrored else crop


def _resized(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _enlarge(tokens: Image.Image) -> Image.Image:
    return tokens.resize((_CELL, _CELL), Image.Resampling.NEAREST)


def _placeholder(side: int, note: str) -> Image.Image:
    square = Image.new("RGB", (side, side), _EMPTY)
    draw = ImageDraw.Draw(square)
    lines = wrap(note, side - 2 * _GAP, _TEXT_SIZE)
    for i, line in enumerate(lines):
        _write(draw, (_GAP, (side - _LINE * len(lines)) // 2 + i * _LINE), line, _TEXT_SIZE, _FAINT)
    return square
