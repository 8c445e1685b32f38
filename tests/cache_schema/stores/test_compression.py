"""Compression loses nothing, says the same thing every time, and is opened with a stranger's chunks in mind."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from cache_building import FEATURE_ROWS, many_examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs import Zstd, blosc
from zarr.codecs import BloscCodec, ZstdCodec

from cache_schema import CacheCorrupt, open_cache
from cache_schema.stores.compression import codec_metadata, compress, decompress, zstd_content_size

CacheOf = Callable[..., Path]
COMPRESSIONS = ["zstd", "blosc:lz4", "blosc:zstd"]
compressions = st.sampled_from(COMPRESSIONS)
chunks = hnp.arrays(
    st.sampled_from([np.int8, np.uint8, np.uint16, np.float16, np.float32]), st.integers(1, 3000), fill=st.just(0)
)


@many_examples
@given(chunks, compressions)
def test_what_was_compressed_comes_back(chunk: np.ndarray, compression: str) -> None:
    out = np.empty(chunk.nbytes, np.uint8)
    decompress(compress(chunk, compression), out, compression, "a file")
    assert out.tobytes() == chunk.tobytes()


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_chunks_of_many_blocks_give_the_same_bytes_whatever_the_number_of_threads(compression: str, dtype: str) -> None:
    chunk = np.random.default_rng(0).normal(scale=9, size=3 << 19).astype(dtype)
    before = blosc.get_nthreads()
    try:
        found = set()
        for threads in (1, 4):
            blosc.set_nthreads(threads)
            blosc.use_threads = True
            found |= {compress(chunk, compression) for _ in range(3)}
    finally:
        blosc.set_nthreads(before)
    assert len(found) == 1
    out = np.empty(chunk.nbytes, np.uint8)
    decompress(found.pop(), out, compression, "a file")
    assert out.tobytes() == chunk.tobytes()


@many_examples
@given(st.data())
def test_a_damaged_chunk_is_called_corrupt_or_fills_its_buffer_and_nothing_else(data: st.DataObject) -> None:
    compression = data.draw(compressions)
    damaged = bytearray(compress(data.draw(chunks), compression))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, min(40, len(damaged) - 1)) | st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.sampled_from([0, 1, 128, 255]) | st.integers(0, 255))
    size = data.draw(st.integers(1, 3000))
    if data.draw(st.booleans()) and len(damaged) >= 16:
        # What the header of a Blosc chunk says about sizes is true: the damage is inside.
        damaged[4:8], damaged[12:16] = size.to_bytes(4, "little"), len(damaged).to_bytes(4, "little")
    check_harmless(bytes(damaged), size, compression)


@many_examples
@given(
    st.sampled_from([b"", b"\x28\xb5\x2f\xfd", b"\x02\x01\x21\x01", b"\x02\x01\x91\x04"]),
    st.binary(max_size=64),
    st.integers(1, 40),
    compressions,
)
def test_garbage_is_called_corrupt(start: bytes, tail: bytes, size: int, compression: str) -> None:
    check_harmless(start + tail, size, compression, always_corrupt=True)


def check_harmless(data: bytes, size: int, compression: str, always_corrupt: bool = False) -> None:
    around = np.full(size + 16, 7, np.uint8)
    with pytest.raises(CacheCorrupt, match="a file") if always_corrupt else contextlib.suppress(CacheCorrupt):
        decompress(data, around[8:-8], compression, "a file")
    assert (around[:8] == 7).all()
    assert (around[-8:] == 7).all()


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("size", [7, 9, 1 << 20])
def test_a_chunk_that_decompresses_to_another_size_is_corrupt(size: int, compression: str) -> None:
    with pytest.raises(CacheCorrupt, match="does not decompress to 8 bytes"):
        decompress(compress(np.zeros(size, np.uint8), compression), np.empty(8, np.uint8), compression, "a file")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_chunk_that_lost_its_end_is_corrupt(compression: str) -> None:
    whole = compress(np.random.default_rng(0).integers(0, 9, 500, np.uint8), compression)
    for length in range(len(whole)):
        with pytest.raises(CacheCorrupt):
            decompress(whole[:length], np.empty(500, np.uint8), compression, "a file")


def test_a_chunk_of_another_compressor_is_corrupt() -> None:
    chunk = np.zeros(300, np.uint8)
    for written in COMPRESSIONS:
        for expected in COMPRESSIONS:
            if written != expected:
                with pytest.raises(CacheCorrupt):
                    decompress(compress(chunk, written), np.empty(300, np.uint8), expected, "a file")


@many_examples
@given(st.binary(max_size=3000), st.integers(1, 5))
def test_the_size_that_a_zstd_frame_declares_is_read_as_zstd_means_it(data: bytes, level: int) -> None:
    frame = bytes(Zstd(level=level).encode(data))
    assert zstd_content_size(frame) == len(data)
    out = np.empty(len(data), np.uint8)
    if data:
        decompress(frame, out, "zstd", "a file")
        assert out.tobytes() == data


@many_examples
@given(st.binary(max_size=64).map(lambda tail: b"\x28\xb5\x2f\xfd" + tail) | st.binary(max_size=64))
def test_hostile_zstd_frames_fill_nothing_but_their_buffer(frame: bytes) -> None:
    out = np.full(24, 7, np.uint8)
    with pytest.raises(CacheCorrupt):
        decompress(frame, out[8:16], "zstd", "a file")
    assert (out[:8] == 7).all()
    assert (out[16:] == 7).all()


@pytest.mark.parametrize(("compression", "codec"), [("zstd", ZstdCodec), ("blosc:lz4", BloscCodec)])
def test_the_metadata_of_a_codec_is_what_zarr_writes_itself(compression: str, codec: type) -> None:
    (document,) = codec_metadata(compression, 4)
    assert codec.from_dict(document).to_dict() == document


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3", "bfloat16", "float32"])
def test_zarr_python_opens_every_type_under_blosc(cache_of: CacheOf, compression: str, kind: str) -> None:
    plain, packed = (cache_of(kind=kind, compression=name) for name in ("none", compression))
    names = ["hidden", "single.3"] + (["hidden.scale"] if open_cache(plain).manifest.encoding.scaled else [])
    for name in names:
        arrays = [np.asarray(zarr.open_group(root / "features", mode="r")[name][:]) for root in (plain, packed)]
        np.testing.assert_array_equal(*arrays)
    payloads = [open_cache(root).read(range(FEATURE_ROWS)).decode().numpy() for root in (plain, packed)]
    np.testing.assert_array_equal(*payloads)
