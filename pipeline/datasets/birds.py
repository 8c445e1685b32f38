"""The birds of the demo: sub-categories that differ in small attributes alone; `bird_scenes` draws them."""

from dataclasses import dataclass, fields

import numpy as np

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


def describe(attributes: BirdAttributes, rng: np.random.Generator, count: int = 3) -> str:
    """A short caption without the class name: `count` of the seven attributes, three as a hurried annotator would."""
    phrases = {
        "body": f"{attributes.body} body",
        "wing": f"{attributes.wing} wing",
        "crown": f"{attributes.crown} crown",
        "wing_pattern": f"{attributes.wing_pattern} wing",
        "breast": f"{attributes.breast} breast",
        "beak": f"{attributes.beak} beak",
        "tail": f"{attributes.tail} tail",
    }
    chosen = rng.choice(list(phrases), size=count, replace=False)
    return ", ".join(phrases[str(k)] for k in chosen)
