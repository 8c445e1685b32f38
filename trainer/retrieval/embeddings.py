"""A file of embeddings: Parquet, a row per image, with what made them in its metadata.

Columns: name (path in the folder, or id in the cache), class_name ("" for none), size and modified of the image's
file, embedding (C float32, as the network gives it). The metadata `dit_distill` is JSON: the student's id and place,
where the images are, and which of them could not be read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schema.storage.files import make_directory, storage_errors
from trainer.errors import TrainError
from trainer.retrieval.images import Entry

FORMAT, VERSION = "dit-distill/embeddings", 1
_ABOUT = b"dit_distill"
_ROWS = 4096  # of a row group


@dataclass(frozen=True)
class Embeddings:
    """What a file holds: `about` as in its metadata, an entry per image, their embeddings (N, C) float32."""

    about: dict[str, Any]
    entries: list[Entry]
    vectors: np.ndarray


def write_embeddings(file: Path, about: dict[str, Any], entries: Sequence[Entry], vectors: np.ndarray) -> None:
    """Write embeddings (N, C), wholly or not at all."""
    columns = {
        "name": pa.array([entry.name for entry in entries], pa.string()),
        "class_name": pa.array([entry.class_name for entry in entries], pa.string()),
        "size": pa.array([entry.size for entry in entries], pa.int64()),
        "modified": pa.array([entry.modified for entry in entries], pa.int64()),
        "embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1)), vectors.shape[1]
        ),
    }
    metadata = {_ABOUT: json.dumps({"format": FORMAT, "version": VERSION, **about}).encode()}
    table = pa.table(columns).replace_schema_metadata(metadata)
    aside = file.with_name(file.name + ".part")
    with storage_errors(file):
        make_directory(file.parent)
        pq.write_table(table, aside, row_group_size=_ROWS, use_dictionary=["class_name"])
        aside.replace(file)


def read_embeddings(file: Path) -> Embeddings:
    """Read a file of embeddings; raises TrainError for one that is missing, damaged, or something else."""
    if not file.is_file():
        raise TrainError(f"there is no file of embeddings at {file}; dit-train embed makes one")
    try:
        table = pq.read_table(file)
        about = json.loads((table.schema.metadata or {}).get(_ABOUT, b"null"))
        if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
            raise TrainError(f"{file} is Parquet, but not embeddings of this version of dit-train embed")
        column = table["embedding"].combine_chunks()
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
        plain = [table[name].to_pylist() for name in ("name", "class_name", "size", "modified")]
    except (pa.ArrowException, OSError, KeyError, ValueError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrainError(f"{file} is damaged or no file of embeddings ({reason}); make it again") from None
    return Embeddings(about, [Entry(*row) for row in zip(*plain, strict=True)], vectors)
