"""The embedded data set: procedural birds, rendered from a seed, `DATASET=demo`.

Sub-categories come in groups that share the two large colours (body and wing) and differ in the small attributes:
crown, wing pattern, breast, beak and tail. Every group has training classes, test classes and, with other combinations
again, unlabelled images; so no test combination is ever seen in training, with or without a label.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from pipeline.datasets.base import Sample, check_open_set, first_of_each_split, limited
from pipeline.datasets.bird_scenes import SCENE_SIZE, render_scene
from pipeline.datasets.birds import ATTRIBUTES, COLOURS, BirdAttributes, describe

# Keeps scenes and captions of this data set apart from those of the pre-training world.
_WORLD = 11


@dataclass(frozen=True)
class DemoConfig:
    """Size of the demo data set. The class lists depend on `seed` and the class counts alone."""

    seed: int = 0
    groups: int = 20
    train_classes: int = 40
    test_classes: int = 40
    train_images: int = 40  # of each class
    test_images: int = 20
    unlabeled: int = 1600


def draw_classes(
    config: DemoConfig,
) -> tuple[list[BirdAttributes], list[BirdAttributes], list[BirdAttributes]]:
    """Training, test and unlabelled combinations; two labelled ones differ in at least two attributes."""
    rng = np.random.default_rng([_WORLD, config.seed])
    colours = list(COLOURS)
    pairs = [(a, b) for a in colours for b in colours if a != b]
    groups = [pairs[int(i)] for i in rng.permutation(len(pairs))[: config.groups]]

    def draw(group: tuple[str, str]) -> BirdAttributes:
        small = {k: v[int(rng.integers(len(v)))] for k, v in ATTRIBUTES.items() if k not in ("body", "wing")}
        return BirdAttributes(body=group[0], wing=group[1], **small)

    labelled: list[BirdAttributes] = []
    wanted = config.train_classes + config.test_classes
    while len(labelled) < wanted:
        candidate = draw(groups[len(labelled) % len(groups)])
        if all(candidate.distance(other) >= 2 for other in labelled):
            labelled.append(candidate)
    # Alternate within each group, so that train and test see every group equally often.
    train = [c for i, c in enumerate(labelled) if (i // len(groups)) % 2 == 0][: config.train_classes]
    taken = set(train)
    test = [c for c in labelled if c not in taken][: config.test_classes]
    train += [c for c in labelled if c not in taken and c not in set(test)]
    seen = set(labelled)
    unlabeled: list[BirdAttributes] = []
    while len(unlabeled) < config.unlabeled:
        candidate = draw(groups[len(unlabeled) % len(groups)])
        if candidate not in seen:  # may repeat among themselves, is never a labelled class
            unlabeled.append(candidate)
    return train, test, unlabeled


class DemoDataset:
    """Procedural birds under an open-set protocol, with loose boxes and attribute captions."""

    name = "demo"
    superclass = "bird"

    def __init__(self, config: DemoConfig | None = None, limit: int | None = None):
        self.config = config or DemoConfig()
        protocol = (
            f"{self.config.train_classes} training and {self.config.test_classes} test combinations, disjoint; "
            f"{self.config.unlabeled} unlabelled images of other combinations; seed {self.config.seed}"
        )
        self.protocol = limited(protocol, limit)
        train, test, unlabeled = draw_classes(self.config)
        # Boxes come from rendering, so every scene is rendered here, once; 27 kB each.
        self._rendered: dict[str, bytes] = {}
        planned = [
            *(
                (f"train-{k:03d}-{i:03d}", "train", k, c)
                for k, c in enumerate(train)
                for i in range(self.config.train_images)
            ),
            *((f"unlabeled-{i:05d}", "unlabeled", -1, c) for i, c in enumerate(unlabeled)),
            *(
                (f"test-{k:03d}-{i:03d}", "test", len(train) + k, c)
                for k, c in enumerate(test)
                for i in range(self.config.test_images)
            ),
        ]
        kept = first_of_each_split(planned, limit, split_of=itemgetter(1))
        self.samples: Sequence[Sample] = [self._sample(*entry) for entry in kept]
        check_open_set(self.samples, "the demo data set")

    def _sample(self, sample_id: str, split: str, label: int, attributes: BirdAttributes) -> Sample:
        image, box = render_scene(attributes, [_WORLD, self.config.seed, *sample_id.encode()], SCENE_SIZE)
        buffer = io.BytesIO()
        # PPM is uncompressed: the same bytes whatever the imaging library's version.
        image.save(buffer, format="PPM")
        self._rendered[sample_id] = buffer.getvalue()
        caption = describe(attributes, np.random.default_rng([_WORLD, *sample_id.encode()]))
        name = attributes.name if label >= 0 else ""
        return Sample(sample_id, split, label, name, f"procedural/{sample_id}.ppm", box, "dataset", caption)

    def read(self, sample: Sample) -> bytes:
        """The scene as a PPM file."""
        return self._rendered[sample.id]
