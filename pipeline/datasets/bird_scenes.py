"""Photographs of procedural birds, small enough to render on the fly.

`render_scene` is a pure function of (attributes, seed). Attributes decide which parts are drawn and in which colours;
everything else comes from the seed: viewpoint, how head, wings, tail and legs are held, where on a wing the bars and
spots lie, the light, what stands before the bird and behind it, and how loosely the box is drawn. So a class is what
its birds have in common, and not what lies where in the picture.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.datasets.birds import COLOURS, BirdAttributes

SCENE_SIZE = 96  # pixels, both sides
_SUPERSAMPLE = 2

Array = np.ndarray
Colour = tuple[float, float, float]
Box = tuple[float, float, float, float]
_PALETTE = list(COLOURS.values())
_DARK, _LIGHT, _HORN, _LEG = (52, 44, 42), (236, 232, 220), (206, 168, 88), (92, 72, 60)

# In bird coordinates: x forward, y down, the body about 2 long. The joints about which parts turn.
_NECK, _SHOULDER, _RUMP, _HIP = (0.52, -0.2), (0.34, -0.12), (-0.66, 0.0), (0.1, 0.4)
_TAILS = {
    "short": ((0.0, -0.18), (-0.48, -0.12), (-0.48, 0.16), (0.0, 0.2)),
    "long": ((0.0, -0.12), (-1.2, -0.03), (-1.2, 0.15), (0.0, 0.14)),
    "forked": ((0.0, -0.16), (-0.95, -0.36), (-0.48, 0.02), (-0.95, 0.36), (0.0, 0.16)),
    "fanned": ((0.04, -0.05), (-0.65, -0.45), (-0.85, 0.0), (-0.65, 0.45), (0.04, 0.12)),
}
# From the middle of the head.
_BEAKS = {
    "short": ((0.26, -0.08), (0.5, 0.02), (0.26, 0.1)),
    "long": ((0.26, -0.05), (0.98, 0.06), (0.26, 0.08)),
    "hooked": ((0.24, -0.12), (0.6, -0.02), (0.56, 0.28), (0.42, 0.08), (0.24, 0.12)),
    "thick": ((0.18, -0.2), (0.6, 0.02), (0.18, 0.22)),
}
_CROWN = ((-0.31, -0.02), (-0.22, -0.28), (0.04, -0.38), (0.24, -0.25), (0.31, -0.06))
_WING = ((0.42, -0.18), (0.2, -0.36), (-0.3, -0.3), (-0.95, 0.02), (-0.55, 0.2), (-0.05, 0.24), (0.3, 0.1))
_BODY_HALF = (0.86, 0.52)


@dataclass(frozen=True)
class Variation:
    """How much what is not the bird itself varies from one photograph to the next; ranges are (least, most)."""

    size: tuple[float, float] = (0.26, 0.33)  # half a body, of the picture's side
    brightness: tuple[float, float] = (0.82, 1.14)
    tint: float = 0.05  # of each colour channel, to either side
    slope: float = 0.2  # of the light across the picture, at most
    occluders: int = 2  # leaves and twigs in front of the bird, at most
    occluder_size: tuple[float, float] = (0.04, 0.08)  # of the bird's longer side
    # Of a box's side: how far each of its edges may lie inside (negative) and outside the bird's own.
    loose: tuple[float, float] = (-0.06, 0.16)


# As far as a class can still be told by a person who looks twice.
WIDE = Variation(
    size=(0.25, 0.33),
    brightness=(0.7, 1.2),
    tint=0.12,
    slope=0.4,
    occluders=3,
    occluder_size=(0.05, 0.1),
    loose=(-0.08, 0.3),
)


@dataclass(frozen=True)
class _Pose:
    """How a bird is held and seen: angles in degrees, positions and lengths in bird coordinates."""

    neck: float
    head: float
    looks_back: bool
    wing: float
    reach: float
    far_wing: float | None
    tail: float
    spread: float
    legs: tuple[float, float]
    phase: float  # of what is repeated on a wing and a breast, in periods

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Pose":
        lifted = rng.random() < 0.4
        wing = float(rng.uniform(25, 85) if lifted else rng.uniform(-18, 25))
        return cls(
            neck=float(rng.uniform(-45, 60)),
            head=float(rng.uniform(-30, 30)),
            looks_back=bool(rng.random() < 0.15),
            wing=wing,
            reach=float(rng.uniform(0.8, 1.2)),
            far_wing=wing + float(rng.uniform(5, 35)) if lifted else None,
            tail=float(rng.uniform(-35, 35)),
            spread=float(rng.uniform(0.75, 1.35)),
            legs=(float(rng.uniform(-35, 35)), float(rng.uniform(-35, 35))),
            phase=float(rng.random()),
        )


def _ellipse(cx: float, cy: float, rx: float, ry: float, n: int = 20) -> Array:
    turn = np.arange(n) * (2 * math.pi / n)
    return np.stack([cx + rx * np.cos(turn), cy + ry * np.sin(turn)], axis=1)


def _rotation(degrees: float) -> Array:
    a = math.radians(degrees)
    return np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])


class _Canvas:
    """Draws polygons given in bird coordinates under one affine viewpoint, and remembers how far they reach."""

    def __init__(self, image: Image.Image, matrix: Array, offset: Array, jitter: Array):
        self.draw = ImageDraw.Draw(image)
        self.matrix, self.offset, self.jitter = matrix, offset, jitter
        self.low, self.high = np.full(2, math.inf), np.full(2, -math.inf)

    def polygon(self, points: Array, colour: Colour, factor: float = 1.0) -> None:
        """points: (N, 2)."""
        xy = points @ self.matrix.T + self.offset
        self.low, self.high = np.minimum(self.low, xy.min(0)), np.maximum(self.high, xy.max(0))
        r, g, b = ((np.array(colour) + self.jitter) * factor).clip(0, 255).astype(int).tolist()
        self.draw.polygon(xy.ravel().tolist(), fill=(r, g, b))


@dataclass(frozen=True)
class _Part:
    """A part that turns about a joint: what is drawn is given from there."""

    canvas: _Canvas
    joint: tuple[float, float]
    matrix: Array

    def polygon(self, points: Array | tuple[tuple[float, float], ...], colour: Colour, factor: float = 1.0) -> None:
        self.canvas.polygon(np.asarray(points) @ self.matrix.T + self.joint, colour, factor)


def _draw_tail(c: _Canvas, bird: BirdAttributes, pose: _Pose) -> None:
    part = _Part(c, _RUMP, _rotation(pose.tail) @ np.diag([1.0, pose.spread]))
    part.polygon(_TAILS[bird.tail], COLOURS[bird.wing], 0.8)


def _draw_legs(c: _Canvas, pose: _Pose) -> None:
    for angle in pose.legs:
        _Part(c, _HIP, _rotation(angle)).polygon(((0.0, 0.0), (0.06, 0.0), (0.06, 0.46), (0.0, 0.46)), _LEG)


def _draw_breast(c: _Canvas, bird: BirdAttributes, pose: _Pose) -> None:
    if bird.breast == "streaked":
        for k in range(5):
            x = 0.02 + 0.15 * (k + pose.phase)
            c.polygon(np.array([(x, 0.14), (x + 0.07, 0.14), (x - 0.02, 0.44), (x - 0.09, 0.44)]), _DARK)
    elif bird.breast == "bibbed":
        c.polygon(_ellipse(0.6 + 0.06 * (pose.phase - 0.5), 0.1, 0.22, 0.24, 12), _DARK)
    elif bird.breast == "banded":
        x = 0.3 + 0.2 * pose.phase
        c.polygon(np.array([(x, -0.16), (x + 0.15, -0.18), (x + 0.17, 0.42), (x, 0.46)]), _DARK)


def _draw_head(c: _Canvas, bird: BirdAttributes, pose: _Pose) -> None:
    neck = _rotation(pose.neck)
    middle = neck @ (0.36, -0.24) + _NECK
    body = COLOURS[bird.body]
    across = np.array([0.16, 0.2])
    c.polygon(np.array([_NECK - across, middle - across, middle + across, _NECK + across]), body)
    side = np.diag([-1.0, 1.0]) if pose.looks_back else np.eye(2)
    head = _Part(c, (float(middle[0]), float(middle[1])), _rotation(0.4 * pose.neck + pose.head) @ side)
    head.polygon(_BEAKS[bird.beak], _HORN)
    head.polygon(_ellipse(0, 0, 0.32, 0.3), body, 1.05)
    head.polygon(_CROWN, COLOURS[bird.crown])
    head.polygon(_ellipse(0.12, -0.01, 0.06, 0.06, 8), (16, 14, 16))


def _draw_wing(c: _Canvas, bird: BirdAttributes, pose: _Pose) -> None:
    wing = COLOURS[bird.wing]
    part = _Part(c, _SHOULDER, _rotation(pose.wing) @ np.diag([pose.reach, 1.0]))
    outline = np.array(_WING) - _SHOULDER
    if bird.wing_pattern == "edged":
        part.polygon(outline, _LIGHT)
        middle = np.array([-0.36, 0.06])
        part.polygon((outline - middle) * (0.8, 0.66) + middle, wing, 0.92)
        return
    part.polygon(outline, wing, 0.92)
    if bird.wing_pattern == "barred":
        for k in range(3):
            x = 0.02 - 0.32 * (k + pose.phase)
            shrink = min(1.0, 1.2 + 0.6 * x)  # a wing is narrower behind
            low, high = -0.18 * shrink, 0.28 * shrink
            part.polygon(((x, low), (x + 0.13, low), (x + 0.06, high), (x - 0.07, high)), _LIGHT)
    elif bird.wing_pattern == "spotted":
        for k in range(6):
            x = -0.02 - 0.15 * (k + pose.phase)
            part.polygon(_ellipse(x, -0.06 if k % 2 else 0.14, 0.075, 0.075, 8), _LIGHT)


def _draw_far_wing(c: _Canvas, bird: BirdAttributes, pose: _Pose) -> None:
    if pose.far_wing is not None:
        part = _Part(c, _SHOULDER, _rotation(pose.far_wing) @ np.diag([0.9 * pose.reach, 0.8]))
        part.polygon(np.array(_WING) - _SHOULDER, COLOURS[bird.wing], 0.7)


def _any_colour(rng: np.random.Generator) -> tuple[int, int, int]:
    colour = np.array(_PALETTE[int(rng.integers(len(_PALETTE)))]) * rng.uniform(0.6, 1.2)
    r, g, b = colour.clip(0, 255).astype(int).tolist()
    return r, g, b


def _draw_background(image: Image.Image, rng: np.random.Generator) -> None:
    """Gradient sky or ground, blobs in the birds' own colours, branches and leaves: clutter that carries no class."""
    size = image.width
    top, bottom = (np.array(_PALETTE[int(i)]) * 0.5 + rng.uniform(30, 130) for i in rng.integers(0, 8, 2))
    ramp = np.linspace(0, 1, size)[:, None, None]
    sky = (top * (1 - ramp) + bottom * ramp).clip(0, 255).astype(np.uint8)
    image.paste(Image.fromarray(np.ascontiguousarray(np.broadcast_to(sky, (size, size, 3)))))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(8, 20))):
        _draw_clutter(draw, rng.uniform(0, size, 2), rng.uniform(0.03, 0.15) * size, rng)


def _draw_clutter(draw: ImageDraw.ImageDraw, at: Array, r: float, rng: np.random.Generator) -> None:
    """A leaf, a branch or a stone of about 2r pixels."""
    kind, turn = int(rng.integers(3)), _rotation(rng.uniform(0, 360))
    if kind == 0:
        points = _ellipse(0, 0, r, r * rng.uniform(0.2, 1.0), 12) @ turn.T
    elif kind == 1:
        points = np.array([(-4 * r, -0.2 * r), (4 * r, -0.2 * r), (4 * r, 0.2 * r), (-4 * r, 0.2 * r)]) @ turn.T
    else:
        points = rng.uniform(-r, r, (3, 2))
    draw.polygon((points + at).ravel().tolist(), fill=_any_colour(rng))


def _draw_before(c: _Canvas, rng: np.random.Generator, variation: Variation) -> None:
    """Leaves and twigs in front of the bird."""
    reach = c.high - c.low
    for _ in range(int(rng.integers(0, variation.occluders + 1))):
        at = c.low + rng.uniform(0.1, 0.9, 2) * reach
        _draw_clutter(c.draw, at, float(rng.uniform(*variation.occluder_size) * reach.max()), rng)


def _viewpoint(rng: np.random.Generator, size: int, variation: Variation) -> tuple[Array, Array]:
    """Bird coordinates to pixels: rolled, seen from the front or behind rather than the side, from above or below."""
    facing = 1 if rng.random() < 0.5 else -1
    yaw, pitch = math.cos(math.radians(rng.uniform(0, 52))), rng.uniform(0.85, 1.1)
    shear = np.array([[1.0, rng.uniform(-0.2, 0.2)], [0.0, 1.0]])
    scale = rng.uniform(*variation.size) * size
    matrix = np.diag([facing, 1.0]) @ _rotation(rng.uniform(-30, 30)) @ shear @ np.diag([yaw, pitch]) * scale
    centre = np.full(2, size / 2) + rng.uniform(-0.08, 0.08, 2) * size
    return matrix, centre + matrix @ np.array([-0.05, 0.05])


def _light(image: Image.Image, size: int, rng: np.random.Generator, variation: Variation) -> Image.Image:
    """The scene at its own size under a light of some strength, colour and direction, with the noise of a sensor."""
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32)
    tint = rng.uniform(*variation.brightness) * rng.uniform(1 - variation.tint, 1 + variation.tint, 3)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, variation.slope)
    across = np.linspace(-1, 1, size)
    slope = strength * (math.cos(angle) * across[None, :] + math.sin(angle) * across[:, None])
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * 5
    return Image.fromarray((pixels * tint * (1 + slope[:, :, None]) + noise).clip(0, 255).astype(np.uint8))


def _loose_box(c: _Canvas, size: int, rng: np.random.Generator, variation: Variation) -> Box:
    """The bird's box as a hurried annotator draws it, in pixels, clipped to the frame."""
    low, high = c.low / _SUPERSAMPLE, c.high / _SUPERSAMPLE
    slack = rng.uniform(*variation.loose, (2, 2)) * (high - low)
    x0, y0 = (low - slack[0]).clip(0, size).tolist()
    x1, y1 = (high + slack[1]).clip(0, size).tolist()
    return x0, y0, x1, y1


def render_scene(
    attributes: BirdAttributes,
    seed: int | list[int],
    size: int = SCENE_SIZE,
    variation: Variation = Variation(),
) -> tuple[Image.Image, Box]:
    """Render one photograph of a bird.

    Returns the RGB image (size × size) and the bird's box (x0, y0, x1, y1) in pixels, loosely drawn, clipped to the
    frame. The same arguments give the same bytes.
    """
    rng = np.random.default_rng(seed)
    big = size * _SUPERSAMPLE
    image = Image.new("RGB", (big, big))
    _draw_background(image, rng)
    canvas = _Canvas(image, *_viewpoint(rng, big, variation), jitter=rng.normal(0, 7, 3))
    pose = _Pose.draw(rng)
    _draw_far_wing(canvas, attributes, pose)
    _draw_legs(canvas, pose)
    _draw_tail(canvas, attributes, pose)
    canvas.polygon(_ellipse(0, 0, *_BODY_HALF) @ _rotation(-8).T, COLOURS[attributes.body])
    _draw_breast(canvas, attributes, pose)
    _draw_head(canvas, attributes, pose)
    _draw_wing(canvas, attributes, pose)
    box = _loose_box(canvas, size, rng, variation)
    _draw_before(canvas, rng, variation)
    return _light(image, size, rng, variation), box
