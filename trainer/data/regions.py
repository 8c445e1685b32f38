"""Where the student's image lies in the picture that the teacher saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cache_schema.format.square import square_around
from cache_schema.format.vocabulary import CROP_VIEW
from trainer.data.features import FeatureSource
from trainer.errors import TrainError

if TYPE_CHECKING:
    from cache_schema import Cache


class Regions:
    """Boxes of student images, from fractions of the whole photograph to fractions of the teacher's view of it.

    A teacher sees the whole photograph, or the crop of its object (the sample's box); of the view `crop.k` that crop.
    """

    def __init__(self, cache: Cache, sources: Mapping[str, FeatureSource], views: tuple[str, ...]):
        """Raises TrainError where a student's mirrored images would meet features of unmirrored ones."""
        for source in sources.values():
            lacking = [view for view in views if view not in source.cache.manifest.views]
            if lacking:
                raise TrainError(
                    f"cache {source.cache.manifest.label} lacks view {lacking[0]}, and features are compared place by "
                    "place: build it with --views canonical,hflip, or set augment.flip=false"
                )
        teachers = [source.cache.manifest.teacher for source in sources.values()]
        shown, cuts = {teacher.input for teacher in teachers}, {teacher.crop for teacher in teachers}
        if len(shown) > 1:
            raise TrainError("one teacher saw the whole image and another the object: their places cannot be compared")
        if len(cuts) > 1:
            raise TrainError("one teacher saw boxes and another squares around them: their places cannot be compared")
        # Of the views that are random crops, what each shows of the photograph, by the view's number.
        self._crops = {
            number: cache.crops[:, int(view.removeprefix(CROP_VIEW))]
            for number, view in enumerate(views)
            if view.startswith(CROP_VIEW)
        }
        self._frames = np.tile([0.0, 0.0, 1.0, 1.0], (len(cache.samples), 1))  # the teacher's view in the photograph
        if shown == {"object"}:
            first, *others = {id(source.cache): source for source in sources.values()}.values()
            self._frames = _object_frames(cache, first)
            if any(not np.array_equal(self._frames, _object_frames(cache, other)) for other in others):
                raise TrainError("one teacher saw other boxes than another: their places cannot be compared")

    def frames(self, rows: np.ndarray) -> np.ndarray:
        """What the teacher saw of the photographs, in fractions of their sides: (n, 4)."""
        return self._frames[rows]

    def seen(
        self, rows: np.ndarray, boxes: np.ndarray, mirrored: np.ndarray, views: np.ndarray | None = None
    ) -> np.ndarray:
        """Boxes (n, 4) in fractions of the photographs, unmirrored -> (n, 4) in fractions of the teacher's views.

        `mirrored` (n,) bool: where the view is the mirrored one. `views` (n,): numbers of the run's views, without
        which none is a crop.
        """
        frames = self.frames(rows)
        for number, crops in self._crops.items() if views is not None else ():
            frames[views == number] = crops[rows[views == number]]
        corner, size = np.tile(frames[:, :2], 2), np.tile(frames[:, 2:] - frames[:, :2], 2)
        inside = (boxes - corner) / size
        left, right = inside[:, 0].copy(), inside[:, 2].copy()
        inside[:, 0] = np.where(mirrored, 1 - right, left)
        inside[:, 2] = np.where(mirrored, 1 - left, right)
        return inside


def _object_frames(own: Cache, source: FeatureSource) -> np.ndarray:
    """What the teacher of a source saw of the run's photographs, by the boxes it was given: (n, 4), in fractions."""
    frames = np.tile([0.0, 0.0, 1.0, 1.0], (len(own.samples), 1))
    samples, square = source.cache.samples, source.cache.manifest.teacher.crop == "square"
    sides = np.stack([samples["width"].to_numpy(), samples["height"].to_numpy()], axis=1)
    boxes = samples["box"].to_pylist()
    for place, row in enumerate(source.rows_of_same(np.arange(len(frames))).tolist()):
        box = boxes[row] if row >= 0 else None
        if box is not None and square:
            frames[place] = np.asarray(square_around(tuple(box), tuple(sides[row]))) / np.tile(sides[row], 2)
        elif box is not None:
            frames[place] = np.clip(np.asarray(box) / np.tile(sides[row], 2), 0.0, 1.0)
    return frames
