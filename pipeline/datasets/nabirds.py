"""NABirds in its official layout, which is CUB's; the first half of its classes train, the second half test."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.datasets.base import Sample, check_open_set, first_of_each_split, limited
from pipeline.datasets.cub import CUB_FILES, LAYOUT, read_classes, read_listed_images
from pipeline.datasets.image_files import read_image_file, require_layout

_PUBLISHED = "NABirds (Van Horn et al., 2015), https://dl.allaboutbirds.org/nabirds"


class NabirdsDataset:
    """All images, split by class.

    classes.txt lists every node of the hierarchy (1 011); the classes are those that images are labelled with (555),
    in the order of their ids, and their labels count from 0 without gaps. Of an odd number the middle one is a training
    class: 278 train, 277 test. hierarchy.txt, sizes.txt, photographers.txt and the official split are not read and may
    be absent. Raises DataError naming the file and the line that is wrong.
    """

    name = "nabirds"
    superclass = "bird"

    def __init__(self, root: Path, limit: int | None = None):
        self.root = Path(root)
        require_layout(self.name, self.root, CUB_FILES, LAYOUT, _PUBLISHED)
        class_names = read_classes(self.root / "classes.txt")
        images = read_listed_images(self.root, class_names)
        # From the lists, not from the files on disk: a missing image must not move the border between the halves.
        labels = {class_id: k for k, class_id in enumerate(sorted({image.class_id for image in images}))}
        train_classes = (len(labels) + 1) // 2
        self.protocol = limited(
            f"the {len(labels)} classes with images in the order of their ids: the first {train_classes} train, "
            f"the other {len(labels) - train_classes} test; the official split is not used",
            limit,
        )
        samples = [
            Sample(
                id=image.id,
                split="train" if labels[image.class_id] < train_classes else "test",
                label=labels[image.class_id],
                class_name=class_names[image.class_id],
                source=f"images/{image.path}",
                box=image.box,
                box_source="dataset",
                caption="",
            )
            for image in images
        ]
        self.samples: Sequence[Sample] = first_of_each_split(samples, limit)
        check_open_set(self.samples, f"data set {self.name} in {self.root}")

    def read(self, sample: Sample) -> bytes:
        """The image file as it is."""
        return read_image_file(self.root, sample.source)
