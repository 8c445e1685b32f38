"""Whatever the bytes are, a parser returns a value or says that they are corrupt: the ones not tested elsewhere.

Manifests, records, chunk indexes, compressed chunks and tables made of arbitrary or altered bytes are tested beside the
tests of what they are for. Here are documents that are signed as only an attacker would, and the parsers that are left.
"""

import json
from typing import Any

import numpy as np
import pytest
from cache_building import many_examples, tiny_manifest, tiny_samples
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import CacheCorrupt, CacheError, UnsupportedSchema
from cache_schema.errors import printable
from cache_schema.format import layout
from cache_schema.format.identity import canonical_json, compute_cache_id
from cache_schema.format.journal import FileRecord, Record, _render, parse_record, render_record
from cache_schema.format.manifest_file import manifest_checksum, parse_manifest, render_document, render_manifest
from cache_schema.storage.tar import BLOCK
from cache_schema.stores.images import MAX_IMAGE_BYTES, check_places, index_size, parse_index, render_index
from cache_schema.stores.registry import store_of

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1 << 34, 1 << 63, 1 << 64, 10**400])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "0" * 8, "0" * 64, "hidden.scale", "\x1b[2J"])
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


def places_in(document: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything in a JSON document."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [place for key, value in items for place in [(*path, key), *places_in(value, (*path, key))]]


def alter(document: Any, data: st.DataObject) -> None:
    """Replace, remove or add something anywhere in a document."""
    *parents, last = data.draw(st.sampled_from(places_in(document)))
    target = document
    for key in parents:
        target = target[key]
    action = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if action == "remove":
        del target[last]
    elif action == "add" and isinstance(target, dict):
        target[data.draw(st.text(max_size=6))] = data.draw(values)
    else:
        target[last] = data.draw(values)


@many_examples
@given(st.data())
def test_a_signed_manifest_with_anything_in_it_is_a_manifest_or_refused(data: st.DataObject) -> None:
    samples, rows = tiny_samples()
    document = json.loads(render_manifest(tiny_manifest(samples, rows, kind="int8")))
    for _ in range(data.draw(st.integers(1, 3))):
        alter(document, data)
    try:
        document["cache_id"] = compute_cache_id(document)
        document["provenance"]["checksum"] = manifest_checksum(document)
    except (KeyError, TypeError, AttributeError, IndexError):
        # Not even enough of a manifest to be signed.
        pass
    try:
        found = parse_manifest(render_document(document), "a manifest")
    except (CacheCorrupt, UnsupportedSchema):
        return
    assert parse_manifest(render_manifest(found), "a manifest").cache_id == found.cache_id
    for array in layout.all_layouts(found):
        assert not array.name.startswith((".", "/"))
        assert array.row_bytes < 1 << 62


def example_record() -> Record:
    file = FileRecord(bytes=7, crc32c="01234567", piece_crc32c="01234567" * 2)
    return Record(kind="images", shard=1, rows=(4, 6), files={"images/00001.tar": file}, offsets=[(512, 3), (1536, 4)])


@many_examples
@given(st.data())
def test_a_signed_record_with_anything_in_it_is_a_record_or_refused(data: st.DataObject) -> None:
    document = json.loads(render_record(example_record()))
    if data.draw(st.booleans()):
        # As schema version 1 wrote it.
        file = document["files"]["images/00001.tar"]
        file["row_crc32c"] = [file.pop("piece_crc32c")]
    for _ in range(data.draw(st.integers(1, 3))):
        alter(document, data)
    try:
        record = parse_record(_render(document), "a record")
    except CacheCorrupt:
        return
    assert parse_record(render_record(record), "a record").files == record.files
    for file in record.files.values():
        file.piece_checksums()


counts = st.integers(0, (1 << 63) - 1)


@many_examples
@given(st.lists(st.tuples(counts, counts), max_size=9))
def test_an_image_index_comes_back_as_it_was(places: list[tuple[int, int]]) -> None:
    data = render_index(places)
    assert len(data) == index_size(len(places))
    assert parse_index(data, len(places), "a file").tolist() == [list(place) for place in places]


@many_examples
@given(st.data())
def test_an_altered_image_index_is_corrupt_or_of_the_same_shape(data: st.DataObject) -> None:
    altered = bytearray(render_index([(512, 9), (1536, 3)]))
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(altered)) | st.integers(0, len(altered)))
    try:
        found = parse_index(bytes(altered[:cut]), 2, "a file")
    except CacheCorrupt:
        return
    assert (found.shape, found.dtype) == ((2, 2), np.dtype("<i8"))


@many_examples
@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda tail: b"\x93NUMPY\x01\x00" + tail))
def test_bytes_that_are_no_image_index_are_called_corrupt(data: bytes) -> None:
    with pytest.raises(CacheCorrupt):
        parse_index(data, 3, "a file")


signed = st.integers(-(1 << 63), (1 << 63) - 1) | st.sampled_from([0, 511, 512, 1024, MAX_IMAGE_BYTES, 1 << 62])


@many_examples
@given(st.lists(st.tuples(signed, signed) | st.tuples(st.integers(0, 9999), st.integers(0, 999)), max_size=6))
def test_places_of_images_that_are_accepted_do_not_overlap(places: list[tuple[int, int]]) -> None:
    try:
        check_places(np.array(places, dtype=np.int64).reshape(-1, 2), "an index")
    except CacheCorrupt:
        return
    end = 0
    for offset, size in places:
        assert end + BLOCK <= offset
        assert 0 <= size <= MAX_IMAGE_BYTES
        end = offset + size


@many_examples
@given(st.data())
def test_a_calibration_comes_back_as_it_was_or_is_called_corrupt(data: st.DataObject) -> None:
    samples, rows = tiny_samples()
    manifest = tiny_manifest(samples, rows, kind="int8", store=data.draw(st.sampled_from(["zarr", "webdataset"])))
    store, array = store_of(manifest), layout.all_calibrations(manifest)[0]
    stored = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=array.shape).astype(np.float32)
    contents = store.render_calibration(array, stored)
    assert len(contents) == store.calibration_size(array)
    assert store.parse_calibration(array, contents, "a file").tobytes() == stored.tobytes()
    altered = bytearray(contents)
    altered[data.draw(st.integers(0, min(127, len(altered) - 1)) | st.integers(0, len(altered) - 1))] ^= data.draw(
        st.integers(1, 255)
    )
    cut = data.draw(st.just(len(altered)) | st.integers(0, len(altered)))
    for strange in (bytes(altered[:cut]), data.draw(st.binary(max_size=200)), bytes(altered) + b"\0"):
        try:
            found = store.parse_calibration(array, strange, "a file")
        except CacheCorrupt:
            continue
        assert (found.shape, found.dtype) == (array.shape, np.float32)


@many_examples
@given(st.text())
def test_what_is_printed_is_one_line_of_letters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() or any(letter.isspace() or ord(letter) > 127 for letter in shown)
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in shown)
    assert len(shown.splitlines()) <= 1
    shown.encode()
    if text.isascii() and text.isprintable():
        assert shown == text


@many_examples
@given(values)
def test_canonical_json_of_any_value_is_ascii_that_says_it(value: Any) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert json.loads(text) == value


def test_every_refusal_is_a_cache_error() -> None:
    assert issubclass(CacheCorrupt, CacheError)
    assert issubclass(UnsupportedSchema, CacheError)
