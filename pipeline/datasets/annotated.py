"""A data set whose boxes and captions come from a file: that of `dit-cache annotate`, or anybody's own."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pipeline.datasets.base import DataError, Dataset, Sample, remarks_of
from pipeline.datasets.boxes import Box, area
from pipeline.datasets.image_rows import CAPTIONS, CORNERS, box_of, caption_text, read_rows, say_unread, text_of

KEYS = ("id", "file_name")
COLUMNS = (*KEYS, "sha256", "box", *CORNERS, "box_source", *CAPTIONS)
# What `dit-cache annotate` writes besides, for people.
_FOR_PEOPLE = ("box_score", "caption_source", "leak", "reason")


@dataclass(frozen=True)
class Annotation:
    """What a row says about one image; where: the file and line it stands on. None is for what it does not say.

    key: a sample's id, its source, or the file name at the end of its source. box: as in `Sample`.
    """

    where: str
    key: str
    sha256: str | None
    box: Box | None
    box_source: str
    caption: str | None


def read_annotation_rows(path: Path, note: Callable[[str], None] = lambda _: None) -> list[Annotation]:
    """The rows of an annotation file: Parquet, CSV with a header, or JSON lines.

    Columns: `id` or `file_name`; any of `box` ([x0, y0, x1, y1]) or `xmin`, `ymin`, `xmax`, `ymax`, in pixels of the
    stored image, `box_source`, `caption` or `text`, and `sha256`. Empty values say nothing; other columns are not read,
    and named to `note`. Raises DataError naming file and line.
    """
    annotations = []
    table = read_rows(path, (*COLUMNS, "bbox", *_FOR_PEOPLE), KEYS)
    say_unread(path, table, COLUMNS, note)
    for where, row in table.rows:
        try:
            key = text_of(row, "id") or text_of(row, "file_name")
            if key is None:
                raise ValueError("has neither id nor file_name")
            box = box_of(row)
            if box is not None and not area(box):
                raise ValueError(f"box {list(box)} holds nothing; expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
            digest = text_of(row, "sha256")
            if digest is not None and (len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef")):
                raise ValueError(f"sha256 {digest[:70]!r} is not a SHA-256 of 64 hexadecimal digits")
            source = text_of(row, "box_source") or "annotations"
            caption = caption_text(row)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        annotations.append(Annotation(where, key, digest.lower() if digest else None, box, source, caption))
    if not annotations:
        raise DataError(f"{path}: has no row; expected one per image, with {' or '.join(KEYS)}")
    return annotations


class AnnotatedDataset:
    """A data set with the boxes and captions of an annotation file in place of its own, where the file has them.

    partial: only a part of the data set is open, so that rows about other images are nothing to worry about. `boxes`
    and `captions` count what was replaced. Raises DataError naming file and line for a row about an unknown image, a
    file name that several images have, or a second row about one image.
    """

    def __init__(self, dataset: Dataset, path: Path, partial: bool = False) -> None:
        self.name, self.protocol, self.superclass = dataset.name, dataset.protocol, dataset.superclass
        self._dataset = dataset
        self._path = path
        remarks = [*remarks_of(dataset)]
        rows = self._by_id(read_annotation_rows(path, remarks.append), partial)
        self.remarks: Sequence[str] = remarks
        self.samples: Sequence[Sample] = [_annotated(s, rows.get(s.id)) for s in dataset.samples]
        self.boxes = sum(row.box is not None for row in rows.values())
        self.captions = sum(row.caption is not None for row in rows.values())
        self._unchecked = {row_id: row for row_id, row in rows.items() if row.sha256 is not None}

    def _by_id(self, annotations: Sequence[Annotation], partial: bool) -> dict[str, Annotation]:
        samples = self._dataset.samples
        names = Counter(PurePosixPath(s.source).name for s in samples)
        ids = {PurePosixPath(s.source).name: s.id for s in samples}
        ids |= {s.source: s.id for s in samples} | {s.id: s.id for s in samples}
        exact = {s.source for s in samples} | {s.id for s in samples}
        rows: dict[str, Annotation] = {}
        for row in annotations:
            if row.key not in ids:
                if partial:
                    continue
                raise DataError(
                    f"{row.where}: {row.key!r} is neither the id nor the file name of an image of the data set "
                    f"{self.name} (an id there: {samples[0].id!r})"
                )
            if row.key not in exact and names[row.key] > 1:
                raise DataError(f"{row.where}: {names[row.key]} images are called {row.key}; give their paths or ids")
            first = rows.setdefault(ids[row.key], row)
            if first is not row:
                raise DataError(
                    f"{row.where}: {row.key} is annotated by {first.where} already; each image may stand once"
                )
        return rows

    def read(self, sample: Sample) -> bytes:
        """The image file of a sample. Raises DataError if it is not the file that was annotated."""
        data = self._dataset.read(sample)
        row = self._unchecked.get(sample.id)
        if row is not None:
            if hashlib.sha256(data).hexdigest() != row.sha256:
                raise DataError(
                    f"{row.where}: {sample.source} is not the image that was annotated (another SHA-256); annotate "
                    "again, or leave the sha256 out"
                )
            self._unchecked.pop(sample.id, None)  # once is enough; another thread may have been first
        return data


def _annotated(sample: Sample, row: Annotation | None) -> Sample:
    if row is None:
        return sample
    if row.box is not None:
        sample = replace(sample, box=row.box, box_source=row.box_source)
    return sample if row.caption is None else replace(sample, caption=row.caption)
