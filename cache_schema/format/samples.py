"""The samples table: one row per image of every split, in the order that features and images are stored in."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache_schema.errors import CacheCorrupt, CacheError
from cache_schema.format.identity import canonical_json
from cache_schema.format.layout import SAMPLES_NAME
from cache_schema.format.manifest import Manifest
from cache_schema.storage.folder import Folder
from cache_schema.storage.parquet import read_trusting_nothing

SPLITS = ("train", "test", "unlabeled")
STATES = ("ok", "quarantined")
# Some million images with captions of their own.
MAX_SAMPLES_BYTES = 1 << 30

SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("box", pa.list_(pa.float32(), 4)),  # xyxy in pixels; null where there is none
        pa.field("box_source", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
CROPS = "crops"  # a column that caches with random crops have beside those above
_DEFAULTS = {
    "label": -1,
    "class_name": "",
    "box": None,
    "box_source": "",
    "caption": "",
    "state": "ok",
    "reason": "",
}
# Where an image came from and why it was set aside do not change what is computed from it.
_NOT_FINGERPRINTED = ("source", "box_source", "reason")
_CROP_EDGES = 4  # left, top, right, bottom
_MAX_CROPS = 1 << 10


def samples_schema(crops: int = 0) -> pa.Schema:
    """The columns of a samples table whose images have so many random crops.

    These are (left, top, right, bottom) of each crop in turn, in fractions of the upright image's sides; null where an
    image is quarantined.
    """
    if not crops:
        return SAMPLES_SCHEMA
    return SAMPLES_SCHEMA.append(pa.field(CROPS, pa.list_(pa.float32(), _CROP_EDGES * crops)))


def count_crops(table: pa.Table) -> int:
    """How many random crops each image of a samples table has."""
    if CROPS not in table.schema.names:
        return 0
    kind = table.schema.field(CROPS).type
    return kind.list_size // _CROP_EDGES if pa.types.is_fixed_size_list(kind) else 0


def crop_boxes(table: pa.Table) -> np.ndarray:
    """The crops of a samples table, (rows, K, 4) float64; NaN where an image has none."""
    listed = table[CROPS].to_pylist()
    empty = [np.nan] * table.schema.field(CROPS).type.list_size
    return np.array([empty if row is None else row for row in listed], dtype=float).reshape(len(listed), -1, 4)


def row_rank(split: str, state: str, feature_splits: Collection[str]) -> int:
    """Return where a row stands in a cache: 0 with features, 1 usable without them, 2 quarantined."""
    if state != "ok":
        return 2
    return 0 if split in feature_splits else 1


def make_samples(rows: Iterable[Mapping[str, Any]], feature_splits: Iterable[str]) -> tuple[pa.Table, int]:
    """Make the samples table from one mapping per image; return it with the number of rows that have features.

    Rows are put in the order a cache needs, otherwise keeping the given one: first those of the `feature_splits`,
    then the other usable ones, then the quarantined. Missing `label`, `class_name`, `box`, `box_source`, `caption`,
    `state` and `reason` get their empty values. Raises CacheError for rows that are not valid.
    """
    wanted = set(feature_splits)

    def rank(row: Mapping[str, Any]) -> int:
        return row_rank(row.get("split", ""), row.get("state", "ok"), wanted)

    ordered = sorted(rows, key=rank)
    return samples_table(ordered), sum(rank(row) == 0 for row in ordered)


def samples_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Make the samples table from one mapping per image, in the given order, which must be one a cache can have.

    Missing fields get their empty values as in `make_samples`. `crops`, where a row has them, are K boxes of four
    numbers (`samples_schema`). Raises CacheError for rows that are not valid.
    """
    given = [{**_DEFAULTS, **row} for row in rows]
    try:
        if any(row.get(CROPS) for row in given):
            given = [row | {CROPS: _flat(row.get(CROPS))} for row in given]
        edges = max((len(row.get(CROPS) or ()) for row in given), default=0)
        table = pa.Table.from_pylist(given, schema=samples_schema(edges // _CROP_EDGES))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise CacheError(f"these samples do not fit the samples table: {error}") from error
    check_samples(table)
    return table


def fingerprint_samples(table: pa.Table) -> str:
    """Return the SHA-256 of what the table says about the images' contents, split, labels, boxes and captions."""
    digest = hashlib.sha256()
    names = [name for name in table.schema.names if name not in _NOT_FINGERPRINTED]
    for batch in table.select(names).to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            digest.update(canonical_json(row).encode("ascii") + b"\n")
    return digest.hexdigest()


def check_samples(table: pa.Table) -> None:
    """Raise CacheError, saying which column or row, unless this is a valid samples table."""
    schema = samples_schema(count_crops(table))
    if not table.schema.equals(schema):
        wrong = [
            field.name
            for field in schema
            if field.name not in table.schema.names or table.schema.field(field.name).type != field.type
        ]
        raise CacheError(f"the samples table does not have the columns of the schema: {', '.join(wrong) or 'order'}")
    try:
        table.validate(full=True)
    except pa.ArrowException as error:
        raise CacheError(f"the samples table is not valid: {error}") from error
    for field in SAMPLES_SCHEMA:
        if not field.nullable and table[field.name].null_count:
            raise CacheError(f"the samples table has an empty {field.name}")
    if pc.count_distinct(table["id"]).as_py() != table.num_rows:
        repeated = pc.value_counts(table["id"]).to_pylist()
        name = next(item["values"] for item in repeated if item["counts"] > 1)
        raise CacheError(f"the samples table has the id {name!r} more than once")
    if not pc.all(pc.is_finite(pc.list_flatten(table["box"]))).as_py() and table["box"].null_count < table.num_rows:
        raise CacheError("the samples table has a box that is not made of finite numbers")
    if CROPS in table.schema.names:
        _check_crops(table)
    for column, allowed in (("split", SPLITS), ("state", STATES)):
        unknown = set(pc.unique(table[column]).to_pylist()) - set(allowed)
        if unknown:
            raise CacheError(
                f"the samples table has the {column} {sorted(unknown)[0]!r}; allowed: {', '.join(allowed)}"
            )
    usable = count_usable(table)
    if usable != count_usable(table.slice(0, usable)):
        raise CacheError("quarantined samples must come last in the samples table")


def count_usable(table: pa.Table) -> int:
    """Return the number of rows that are not quarantined; they come first."""
    return pc.sum(pc.equal(table["state"], "ok")).as_py() or 0


def check_against_manifest(table: pa.Table, manifest: Manifest) -> None:
    """Raise CacheError unless the table has the rows that the manifest counts, in the order features need."""
    usable, rows = count_usable(table), manifest.dataset.feature_rows
    if rows > usable:
        raise CacheError(f"the manifest says {rows} samples have features, the table has {usable} usable rows")
    if count_crops(table) != manifest.crop_count:
        raise CacheError(
            f"the manifest has {manifest.crop_count} crops of each image, the table has {count_crops(table)}"
        )
    splits = set(pc.unique(table["split"].slice(0, rows)).to_pylist())
    if not splits <= set(manifest.dataset.feature_splits):
        raise CacheError(
            f"rows that have features must come first in the samples table, but the first {rows} rows are of splits "
            f"{', '.join(sorted(splits))} and features are of {', '.join(manifest.dataset.feature_splits)}"
        )
    per_shard, shards = manifest.store.images_per_shard, manifest.store.image_shards
    if manifest.images is not None and -(-usable // per_shard) != shards:
        raise CacheError(f"{usable} images by {per_shard} are not {shards} image shards")


def render_samples(table: pa.Table) -> bytes:
    """Return the bytes of `samples.parquet`, the same for equal tables; CacheError for one that is too large."""
    buffer = BytesIO()
    # How a table is cut into pieces in memory must not show in the file, nor that it was read from one: the inner
    # field of the boxes then has another name.
    schema = samples_schema(count_crops(table))
    canonical = pa.Table.from_arrays(table.combine_chunks().columns, schema=schema)
    pq.write_table(canonical, buffer, compression="zstd", row_group_size=65536, version="2.6")
    if buffer.tell() > MAX_SAMPLES_BYTES:
        raise CacheError(f"the samples table takes {buffer.tell()} bytes, a cache may have {MAX_SAMPLES_BYTES}")
    return buffer.getvalue()


def load_samples(folder: Folder) -> pa.Table:
    """Read the samples table of a cache; raises CacheCorrupt unless it is a valid one."""
    where = folder.where(SAMPLES_NAME)
    try:
        data = folder.read_bounded(SAMPLES_NAME, MAX_SAMPLES_BYTES)
    except OSError as error:
        raise CacheCorrupt(f"{where} is not a samples table: {error.strerror}") from error
    return parse_samples(data, where)


def parse_samples(data: bytes, where: str) -> pa.Table:
    """Turn the bytes of `samples.parquet` into a table; `where` names them. Raises CacheCorrupt unless it is valid."""
    try:
        table = read_trusting_nothing(data, _one_of_ours)
        check_samples(table)
    except (OSError, UnicodeDecodeError, pa.ArrowException, CacheError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise CacheCorrupt(f"{where} is not a samples table: {first[:300]}") from error
    return table


def _one_of_ours(found: pa.Schema) -> pa.Schema:
    """The schema that a table with the columns `found` must have: with as many crops as it says, up to a limit."""
    kind = found.field(CROPS).type if found.names.count(CROPS) == 1 else None
    if kind is None or not pa.types.is_fixed_size_list(kind) or not 0 < kind.list_size <= _MAX_CROPS * _CROP_EDGES:
        return SAMPLES_SCHEMA
    return samples_schema(kind.list_size // _CROP_EDGES)


def _flat(boxes: Iterable[Any] | None) -> list[float] | None:
    return None if boxes is None else np.asarray(list(boxes), dtype=float).reshape(-1).tolist()


def _check_crops(table: pa.Table) -> None:
    usable = count_usable(table)
    boxes = crop_boxes(table.slice(0, usable))
    # Written so that NaN is wrong as well.
    right = (boxes[..., :2] >= 0) & (boxes[..., 2:] <= 1) & (boxes[..., :2] < boxes[..., 2:])
    if not right.all():
        row = int((~right).nonzero()[0][0])
        raise CacheError(f"the samples table has a crop outside of the image {table['id'][row].as_py()!r}")
    if table[CROPS].null_count != table.num_rows - usable:
        raise CacheError("the samples table has crops of quarantined images")
