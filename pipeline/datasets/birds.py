"""Procedural birds: a fine-grained world small enough to render on the fly.

One super-class, and sub-categories that differ only in combinations of small attributes. `render_scene` is a pure
function of (attributes, seed): pose, scale, lighting and a distracting background come from the seed alone, so the
background never tells the class.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageDraw

SCENE_SIZE = 96  # pixels, both sides
_SUPERSAMPLE = 2

COLOURS = {
    "red": (196, 52, 44),
    "orange": (226, 134, 48),
    "yellow": (224, 204, 76),
    "green": (78, 148, 70),
    "blue": (58, 98, 182),
    "brown": (124, 86, 54),
    "grey": (140, 142, 146),
    "black": (38, 36, 40),
}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "body": tuple(COLOURS),
    "wing": tuple(COLOURS),
    "crown": tuple(COLOURS),
    "wing_pattern": ("plain", "barred", "spotted", "edged"),
    "breast": ("plain", "streaked", "bibbed", "banded"),
    "beak": ("short", "long", "hooked", "thick"),
    "tail": ("short", "long", "forked", "fanned"),
}


@dataclass(frozen=True, order=True)
class BirdAttributes:
    """A sub-category: one value of `ATTRIBUTES` per field."""

    body: str
    wing: str
    crown: str
    wing_pattern: str
    breast: str
    beak: str
    tail: str

    def distance(self, other: "BirdAttributes") -> int:
        """Number of attributes in which two sub-categories differ."""
        return sum(getattr(self, f.name) != getattr(other, f.name) for f in fields(self))

    @property
    def name(self) -> str:
        return "-".join(getattr(self, f.name) for f in fields(self))


def random_attributes(rng: np.random.Generator) -> BirdAttributes:
    """Draw a combination uniformly."""
    return BirdAttributes(**{k: v[int(rng.integers(len(v)))] for k, v in ATTRIBUTES.items()})


def describe(attributes: BirdAttributes, rng: np.random.Generator) -> str:
    """A short attribute caption without the class name: three of the seven attributes, as a hurried annotator would."""
    phrases = {
        "body": f"{attributes.body} body",
        "wing": f"{attributes.wing} wing",
        "crown": f"{attributes.crown} crown",
        "wing_pattern": f"{attributes.wing_pattern} wing",
        "breast": f"{attributes.breast} breast",
        "beak": f"{attributes.beak} beak",
        "tail": f"{attributes.tail} tail",
    }
    chosen = rng.choice(list(phrases), size=3, replace=False)
    return ", ".join(phrases[str(k)] for k in chosen)


Point = tuple[float, float]


def _ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, n: int = 20) -> list[Point]:
    a = math.radians(angle)
    turn = [2 * math.pi * i / n for i in range(n)]
    return [
        (
            cx + rx * math.cos(s) * math.cos(a) - ry * math.sin(s) * math.sin(a),
            cy + rx * math.cos(s) * math.sin(a) + ry * math.sin(s) * math.cos(a),
        )
        for s in turn
    ]


class _Canvas:
    """Draws polygons given in bird coordinates (x forward, y down, body length about 2) under one affine pose."""

    def __init__(self, image: Image.Image, rng: np.random.Generator):
        self.draw = ImageDraw.Draw(image)
        self.size = image.width
        self.jitter = rng.normal(0, 7, 3)
        self.gain = float(rng.uniform(0.72, 1.2))
        self.rng = rng
        self.low, self.high = [math.inf, math.inf], [-math.inf, -math.inf]
        self.matrix = np.eye(2)
        self.offset = np.zeros(2)

    def shade(self, colour: tuple[float, float, float], factor: float = 1.0) -> tuple[int, int, int]:
        r, g, b = ((np.array(colour) + self.jitter) * self.gain * factor).clip(0, 255).astype(int).tolist()
        return r, g, b

    def polygon(self, points: list[Point], colour: tuple[float, float, float], factor: float = 1.0) -> None:
        xy = np.array(points) @ self.matrix.T + self.offset
        for axis in (0, 1):
            self.low[axis] = min(self.low[axis], float(xy[:, axis].min()))
            self.high[axis] = max(self.high[axis], float(xy[:, axis].max()))
        self.draw.polygon([(float(x), float(y)) for x, y in xy], fill=self.shade(colour, factor))


def _draw_tail(c: _Canvas, attributes: BirdAttributes) -> None:
    colour = COLOURS[attributes.wing]
    if attributes.tail == "short":
        c.polygon([(-0.7, -0.18), (-1.15, -0.12), (-1.15, 0.16), (-0.7, 0.2)], colour, 0.8)
    elif attributes.tail == "long":
        c.polygon([(-0.7, -0.12), (-1.85, 0.0), (-1.85, 0.16), (-0.7, 0.14)], colour, 0.8)
    elif attributes.tail == "forked":
        c.polygon([(-0.7, -0.16), (-1.6, -0.34), (-1.15, 0.02), (-1.6, 0.34), (-0.7, 0.16)], colour, 0.8)
    else:
        c.polygon([(-0.65, -0.05), (-1.3, -0.45), (-1.5, 0.0), (-1.3, 0.45), (-0.65, 0.12)], colour, 0.8)


def _draw_breast(c: _Canvas, attributes: BirdAttributes) -> None:
    dark = (52, 44, 42)
    if attributes.breast == "streaked":
        for x in (0.12, 0.3, 0.48, 0.64):
            c.polygon([(x, 0.16), (x + 0.06, 0.16), (x - 0.02, 0.46), (x - 0.08, 0.46)], dark)
    elif attributes.breast == "bibbed":
        c.polygon(_ellipse(0.62, 0.08, 0.2, 0.22, 20, 12), dark)
    elif attributes.breast == "banded":
        c.polygon([(0.42, -0.1), (0.56, -0.14), (0.6, 0.4), (0.44, 0.44)], dark)


def _draw_head(c: _Canvas, attributes: BirdAttributes, tilt: float) -> None:
    body, crown, horn = COLOURS[attributes.body], COLOURS[attributes.crown], (206, 168, 88)
    hx, hy = 0.86, -0.42 + tilt
    if attributes.beak == "short":
        c.polygon([(hx + 0.26, hy - 0.08), (hx + 0.5, hy + 0.02), (hx + 0.26, hy + 0.1)], horn)
    elif attributes.beak == "long":
        c.polygon([(hx + 0.26, hy - 0.05), (hx + 0.95, hy + 0.06), (hx + 0.26, hy + 0.08)], horn)
    elif attributes.beak == "hooked":
        c.polygon([(hx + 0.24, hy - 0.12), (hx + 0.58, hy - 0.02), (hx + 0.54, hy + 0.26), (hx + 0.42, hy + 0.08),
                   (hx + 0.24, hy + 0.12)], horn)  # fmt: skip
    else:
        c.polygon([(hx + 0.2, hy - 0.2), (hx + 0.58, hy + 0.02), (hx + 0.2, hy + 0.22)], horn)
    c.polygon(_ellipse(hx, hy, 0.32, 0.3), body, 1.05)
    c.polygon([(hx - 0.31, hy - 0.04), (hx - 0.2, hy - 0.28), (hx + 0.04, hy - 0.37), (hx + 0.24, hy - 0.24),
               (hx + 0.3, hy - 0.08)], crown)  # fmt: skip
    c.polygon(_ellipse(hx + 0.12, hy - 0.01, 0.06, 0.06, n=8), (16, 14, 16))


def _draw_wing(c: _Canvas, attributes: BirdAttributes, lift: float) -> None:
    wing, light = COLOURS[attributes.wing], (236, 232, 220)
    a = math.radians(lift)
    turn = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])

    def place(points: list[Point]) -> list[Point]:
        moved = (np.array(points) - (0.3, -0.1)) @ turn.T + (0.3, -0.1)
        return [(float(x), float(y)) for x, y in moved]

    outline = [
        (0.42, -0.18),
        (0.2, -0.36),
        (-0.3, -0.3),
        (-0.95, 0.02),
        (-0.55, 0.2),
        (-0.05, 0.24),
        (0.3, 0.1),
    ]
    if attributes.wing_pattern == "edged":
        c.polygon(place(outline), light)
        inner = [(0.02 + 0.76 * (x - 0.02) - 0.02, -0.06 + 0.7 * (y + 0.06)) for x, y in outline]
        c.polygon(place(inner), wing, 0.92)
        return
    c.polygon(place(outline), wing, 0.92)
    if attributes.wing_pattern == "barred":
        for x in (-0.36, 0.0):
            c.polygon(place([(x, -0.28), (x + 0.12, -0.3), (x + 0.04, 0.18), (x - 0.08, 0.18)]), light)
    elif attributes.wing_pattern == "spotted":
        for x, y in ((-0.5, 0.0), (-0.24, -0.14), (-0.2, 0.1), (0.06, -0.18), (0.1, 0.06)):
            c.polygon(place(_ellipse(x, y, 0.07, 0.07, n=8)), light)


def _draw_background(image: Image.Image, rng: np.random.Generator) -> None:
    """Gradient sky or ground, blobs in the birds' own colours, branches and leaves: clutter that carries no class."""
    size = image.width
    top, bottom = (np.array(list(COLOURS.values())[int(i)]) * 0.5 + rng.uniform(30, 130) for i in rng.integers(0, 8, 2))
    ramp = np.linspace(0, 1, size)[:, None, None]
    image.paste(
        Image.fromarray(
            np.broadcast_to(top * (1 - ramp) + bottom * ramp, (size, size, 3)).clip(0, 255).astype(np.uint8)
        )
    )
    draw = ImageDraw.Draw(image)
    palette = list(COLOURS.values())
    for _ in range(int(rng.integers(8, 20))):
        colour = (np.array(palette[int(rng.integers(len(palette)))]) * rng.uniform(0.6, 1.2)).clip(0, 255).astype(int)
        x, y, r = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0.03, 0.15) * size
        kind = int(rng.integers(3))
        angle, squeeze = rng.uniform(0, 360), rng.uniform(0.2, 1.0)
        if kind == 0:
            draw.polygon(_ellipse(x, y, r, r * squeeze, angle, 12), fill=tuple(colour.tolist()))
        elif kind == 1:
            a = math.radians(angle)
            reach = 4 * r * np.array([math.cos(a), math.sin(a)])
            ends = (x - reach[0], y - reach[1], x + reach[0], y + reach[1])
            draw.line(ends, fill=tuple(colour.tolist()), width=max(1, int(r * 0.4)))
        else:
            corners = rng.uniform(-r, r, (3, 2)) + np.array([x, y])
            draw.polygon([(float(px), float(py)) for px, py in corners], fill=tuple(colour.tolist()))


def render_scene(
    attributes: BirdAttributes, seed: int | list[int], size: int = SCENE_SIZE
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Render one photograph of a bird.

    Returns the RGB image (size × size) and the bird's exact box (x0, y0, x1, y1) in pixels, clipped to the frame.
    The same arguments give the same bytes.
    """
    rng = np.random.default_rng(seed)
    big = size * _SUPERSAMPLE
    image = Image.new("RGB", (big, big))
    _draw_background(image, rng)
    c = _Canvas(image, rng)
    angle, scale = math.radians(rng.uniform(-28, 28)), rng.uniform(0.235, 0.315) * big
    aspect, facing = rng.uniform(0.88, 1.12), 1 if rng.random() < 0.5 else -1
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    c.matrix = np.diag([facing, 1.0]) @ turn @ np.diag([aspect, 1 / aspect]) * scale
    centre = np.array([big / 2, big / 2]) + rng.uniform(-0.05, 0.05, 2) * big
    c.offset = centre + c.matrix @ np.array([0.2, 0.05])
    for x in (0.08, 0.24):  # legs
        c.polygon([(x, 0.45), (x + 0.05, 0.45), (x + 0.05, 0.85), (x, 0.85)], (92, 72, 60))
    _draw_tail(c, attributes)
    c.polygon(_ellipse(0, 0, 0.86, 0.52, -8), COLOURS[attributes.body])
    _draw_breast(c, attributes)
    _draw_head(c, attributes, float(rng.uniform(-0.08, 0.12)))
    _draw_wing(c, attributes, float(rng.uniform(-12, 26)))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    tint = rng.uniform(0.9, 1.1, 3)
    slope = np.linspace(-1, 1, size)[None, :, None] * rng.uniform(-0.18, 0.18)
    noise = rng.normal(0, 5, pixels.shape)
    lit = (pixels * tint * (1 + slope) + noise).clip(0, 255).astype(np.uint8)
    x0, y0 = (max(0.0, v / _SUPERSAMPLE) for v in c.low)
    x1, y1 = (min(float(size), v / _SUPERSAMPLE) for v in c.high)
    return Image.fromarray(lit), (x0, y0, x1, y1)
