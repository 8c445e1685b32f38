"""The result of an annotation: one Parquet file with a row per image, and what made it in the file's metadata."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache_schema.storage.files import write_file
from pipeline.annotate.config import AnnotateError

FORMAT = 1
_METADATA_KEY = b"dit-distill.annotations"

# box: (x0, y0, x1, y1) in pixels of the stored image, as in `Sample`; null where the image cannot be read.
# box_source: detector; dataset; full (the whole image was asked for, or the data set has no box); none-found (the
#   detector saw nothing, so the whole image is the box); unreadable.
# box_score: of the detector; null where it found nothing or was not asked.
# caption_source: vlm; dataset; neutral (nothing was left to say, so only the super-class is named); none.
# leak: clean; asked-again (clean the second time); stripped (class words were taken out); left (the data set's own
#   caption names the class and is kept); empty where there is no caption.
# reason: why an image has no annotation.
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("box", pa.list_(pa.float32(), 4)),
        pa.field("box_source", pa.string(), nullable=False),
        pa.field("box_score", pa.float32()),
        pa.field("caption", pa.string()),
        pa.field("caption_source", pa.string(), nullable=False),
        pa.field("leak", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


def write_annotations(path: Path, rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all; equal rows and metadata give equal bytes."""
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    document = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
    buffer = BytesIO()
    pq.write_table(
        table.replace_schema_metadata({_METADATA_KEY: document.encode()}), buffer, compression="zstd", version="2.6"
    )
    write_file(path, buffer.getvalue())


def read_annotations(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and the metadata of a file that `write_annotations` wrote; raises AnnotateError for any other file."""
    try:
        table = pq.read_table(path, partitioning=None)
        metadata = json.loads((table.schema.metadata or {})[_METADATA_KEY])
        if metadata["format"] != FORMAT or not table.schema.equals(SCHEMA):
            raise ValueError("of another version")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise AnnotateError(
            f"{path}: there already, and not a file that dit-cache annotate wrote "
            f"({' '.join(str(error).split())}); move it away, or choose another --output"
        ) from None
    return table.to_pylist(), metadata


def counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """How many rows have each box_source, caption_source and leak."""
    columns = ("box_source", "caption_source", "leak")
    return {name: dict(sorted(Counter(row[name] for row in rows if row[name]).items())) for name in columns}
