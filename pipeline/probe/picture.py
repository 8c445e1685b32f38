"""The heat maps of a probe: a row per tap, a column per timestep, one map per measure."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from pipeline.probe.scores import Score

_CELL, _LEFT, _TOP, _GAP = (46, 24), 84, 44, 28
# Dark blue to yellow, even in lightness: three anchors of the cividis map.
_COLOURS = ((0, 34, 78), (124, 123, 120), (254, 232, 56))


def draw_heat_maps(scores: Sequence[Score]) -> Image.Image:
    """Draw R@1, linear accuracy (both in %) and the high-frequency ratio side by side; the best cell is framed."""
    taps, steps = list(dict.fromkeys(s.name for s in scores)), sorted({s.timestep for s in scores})
    font = ImageFont.load_default(12)
    left = max(_LEFT, *(math.ceil(font.getlength(tap)) + 8 for tap in taps))
    panel = left + len(steps) * _CELL[0]
    size = (3 * panel + 4 * _GAP, _TOP + len(taps) * _CELL[1] + _GAP)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for place, (title, name, factor) in enumerate(
        (
            ("R@1 %", "recall_at_1", 100),
            ("linear accuracy %", "linear", 100),
            ("high-frequency ratio", "high_frequency", 1),
        )
    ):
        x0 = _GAP + place * (panel + _GAP)
        values = {(s.name, s.timestep): factor * getattr(s, name) for s in scores}
        low, high = min(values.values()), max(values.values())
        pen.text((x0 + left, 4), title, fill="black", font=font)
        for column, p in enumerate(steps):
            pen.text((x0 + left + column * _CELL[0] + 6, _TOP - 18), f"p={p}", fill="black", font=font)
        for row, tap in enumerate(taps):
            y = _TOP + row * _CELL[1]
            pen.text((x0, y + 5), tap, fill="black", font=font)
            for column, p in enumerate(steps):
                x, value = x0 + left + column * _CELL[0], values[tap, p]
                share = (value - low) / (high - low) if high > low else 0.5
                box = (x, y, x + _CELL[0] - 2, y + _CELL[1] - 2)
                pen.rectangle(box, fill=_colour(share), outline="red" if value == high else None, width=2)
                text = f"{value:.1f}" if factor == 100 else f"{value:.3f}"
                pen.text((x + 6, y + 5), text, fill="black" if share > 0.5 else "white", font=font)
    return image


def _colour(share: float) -> tuple[int, int, int]:
    low, high = (_COLOURS[0], _COLOURS[1]) if share < 0.5 else (_COLOURS[1], _COLOURS[2])
    part = 2 * share if share < 0.5 else 2 * share - 1
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(low, high, strict=True))
    return red, green, blue
