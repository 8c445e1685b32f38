"""A file of embeddings: Parquet, a row per image, with what made them in its metadata.

Columns: name (path in the folder, or id in the cache), class_name ("" for none), size and modified of the image's
file, embedding (C float32, as the network gives it), and where they are wanted thumbnails, image.bytes (JPEG) and
image.path. The metadata `dit_distill` is JSON: the student's id and place, where the images are, and which of them
could not be read. Written and read a row group at a time: a file may be larger than the memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schema.storage.files import make_directory, storage_errors
from trainer.errors import TrainError
from trainer.retrieval.images import Entry

FORMAT, VERSION = "dit-distill/embeddings", 1
ROWS = 4096  # of a row group
_ABOUT = b"dit_distill"
_PLAIN = ("name", "class_name", "size", "modified")
# What tools that show images expect of a column of them (Hugging Face datasets, Embedding Atlas).
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Block:
    """Some images: an entry of each, their embeddings (n, C) float32, and JPEG thumbnails where they are kept."""

    entries: Sequence[Entry]
    vectors: np.ndarray
    thumbnails: Sequence[bytes] | None = None


@dataclass(frozen=True)
class Embeddings:
    """A file that was opened: `about` as in its metadata, an entry per image; vectors are read when asked for."""

    file: Path
    about: dict[str, Any]
    entries: list[Entry]
    channels: int
    _starts: np.ndarray = field(repr=False)  # the first row of each row group, and at the end the number of rows

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def thumbnails(self) -> int | None:
        """Pixels of the longer side of thumbnails, None where there are none."""
        return self.about.get("thumbnails")

    @cached_property
    def vectors(self) -> np.ndarray:
        """All embeddings at once: (N, C) float32."""
        return np.concatenate([np.empty((0, self.channels), np.float32), *(block.vectors for block in self.blocks())])

    def blocks(self) -> Iterator[Block]:
        """What the file holds, a row group at a time."""
        return (self.block(number) for number in range(len(self._starts) - 1))

    def number_of(self, row: int) -> tuple[int, int]:
        """The row group that a row is in, and which of its rows."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - int(self._starts[number])

    def block(self, number: int) -> Block:
        """One row group; raises TrainError where it is damaged."""
        columns = ["embedding", *(["image"] if self.thumbnails else [])]
        with _refusing_damage(self.file), pq.ParquetFile(self.file) as opened:
            table = opened.read_row_group(number, columns=columns)
            found = table["embedding"].combine_chunks()
            vectors = found.flatten().to_numpy(zero_copy_only=False).reshape(len(table), self.channels)
            pictures = table["image"].combine_chunks().field("bytes").to_pylist() if self.thumbnails else None
        return Block(self.entries[self._starts[number] : self._starts[number + 1]], vectors, pictures)


@contextmanager
def writing_embeddings(file: Path, about: dict[str, Any], channels: int) -> Iterator[EmbeddingsWriter]:
    """Write a file of embeddings, wholly or not at all; with thumbnails where `about` has a size of them."""
    aside = file.with_name(file.name + ".part")
    with storage_errors(file):
        make_directory(file.parent)
        writer = EmbeddingsWriter(aside, about, channels)
        with writer.opened:
            yield writer
        aside.replace(file)


class EmbeddingsWriter:
    """Writes blocks, each as a row group of its own."""

    def __init__(self, file: Path, about: dict[str, Any], channels: int):
        fields = [("name", pa.string()), ("class_name", pa.string()), ("size", pa.int64()), ("modified", pa.int64())]
        fields.append(("embedding", pa.list_(pa.field("element", pa.float32()), channels)))
        if about.get("thumbnails"):
            fields.append(("image", _IMAGE))
        metadata = {_ABOUT: json.dumps({"format": FORMAT, "version": VERSION, **about}).encode()}
        self._schema = pa.schema(fields, metadata=metadata)
        self._channels = channels
        self.opened = pq.ParquetWriter(file, self._schema, use_dictionary=["class_name"])

    def write(self, block: Block) -> None:
        """Append some images."""
        values = np.ascontiguousarray(block.vectors, dtype=np.float32).reshape(-1)
        columns = [[getattr(entry, name) for entry in block.entries] for name in _PLAIN]
        kind = self._schema.field("embedding").type
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind))
        if "image" in self._schema.names:
            assert block.thumbnails is not None
            pictures = zip(block.entries, block.thumbnails, strict=True)
            columns.append([{"bytes": data, "path": entry.name} for entry, data in pictures])
        self.opened.write_table(pa.table(columns, schema=self._schema), row_group_size=len(block.entries))


def read_embeddings(file: Path) -> Embeddings:
    """Open a file of embeddings; raises TrainError for one that is missing, damaged, or something else."""
    if not file.is_file():
        raise TrainError(f"there is no file of embeddings at {file}; dit-train embed makes one")
    with _refusing_damage(file), pq.ParquetFile(file) as opened:
        about = json.loads((opened.schema_arrow.metadata or {}).get(_ABOUT, b"null"))
        if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
            raise TrainError(f"{file} is Parquet, but not embeddings of this version of dit-train embed")
        channels = opened.schema_arrow.field("embedding").type.list_size
        groups = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
        table = opened.read(columns=list(_PLAIN))
        plain = [table[name].to_pylist() for name in _PLAIN]
    entries = [Entry(*row) for row in zip(*plain, strict=True)]
    return Embeddings(file, about, entries, channels, np.concatenate([[0], np.cumsum(groups, dtype=np.int64)]))


@contextmanager
def _refusing_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrainError(f"{file} is damaged or no file of embeddings ({reason}); make it again") from None
