"""Images of a folder to score students on: a folder per class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data.files import UnreadableImageError, class_of, decode_image, find_images, parts_in
from trainer.data.splits import Split
from trainer.errors import TrainError

Prepare = Callable[[Image.Image], np.ndarray]  # an RGB image as a student wants it, (S, S, 3) uint8


class FolderPictures:
    """The pixels of image files, decoded whenever they are asked for, by several threads."""

    def __init__(self, root: Path, names: Sequence[str], prepare: Prepare):
        self.root, self.names, self.prepare = root, names, prepare
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "decode")

    def load(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """The images of rows: (B, 3, S, S) uint8. Raises TrainError naming a file that cannot be read."""
        pictures = list(self._pool.map(self._read, (self.names[int(row)] for row in rows)))
        return torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)))

    def _read(self, name: str) -> np.ndarray:
        file = self.root / name
        try:
            return self.prepare(decode_image(file.read_bytes()))
        except UnreadableImageError as error:
            raise TrainError(f"{file}: {error}; mend it or move it away, for a score is of all images") from None
        except OSError as error:
            raise TrainError(f"{file} cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class FolderSplit:
    """What an evaluation needs of a folder; `ids` are paths in it."""

    split: Split
    images: FolderPictures
    ids: list[str]
    class_names: list[str]

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.split.labels)


def open_folder_split(root: Path, prepare: Prepare) -> FolderSplit:
    """All images of a folder, labelled by `class_of`.

    Raises TrainError where one has no class, or several parts (train/, test/) are in it, whose scores are not one.
    """
    names = find_images(root)
    parts = parts_in(names)
    if len(parts) > 1:
        raise TrainError(f"{root} has the parts {', '.join(parts)}: give one of them, --data {root / parts[0]}")
    classes = [class_of(name) for name in names]
    if "" in classes:
        lost = names[classes.index("")]
        raise TrainError(f"{root / lost} has no class: put each image into a folder that is named after its class")
    known = sorted(set(classes))
    if len(known) < 2:
        raise TrainError(f"{root} has only one class, {known[0]}: every neighbour would be right")
    labels = np.searchsorted(known, classes).astype(np.int64)
    return FolderSplit(
        Split(np.arange(len(names)), labels, len(known)), FolderPictures(root, names, prepare), names, classes
    )
