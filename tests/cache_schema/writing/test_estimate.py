"""What is estimated from shapes is what a cache of these shapes takes on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cache_building import FEATURE_ROWS, TAPS, TIMESTEPS, VIEWS, many_examples
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import Encoding, TapInfo, open_cache
from cache_schema.errors import InvalidEncoding
from cache_schema.writing.estimate import VALUE_BYTES, chunk_bytes, estimate_size


def teachers_taps(pool: int = 1) -> list[TapInfo]:
    return [
        TapInfo(name=name, tokens=h * w * pool**2, channels=channels, grid=(h * pool, w * pool))
        for name, ((h, w), channels) in TAPS.items()
    ]


def tap(rows: int, columns: int, channels: int) -> TapInfo:
    return TapInfo(name="hidden", tokens=rows * columns, channels=channels, grid=(rows, columns))


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.parametrize(
    ("kind", "pool", "pca"),
    [(kind, 1, None) for kind in VALUE_BYTES] + [("int8", 2, None), ("bfloat16", 1, 3), ("float8_e4m3", 2, 3)],
)
def test_a_cache_takes_exactly_the_bytes_that_were_estimated(
    kind: str, pool: int, pca: int | None, store: str, cache_of: Callable[..., Path]
) -> None:
    manifest = open_cache(cache_of(kind=kind, store=store, pool=pool, pca=pca)).manifest
    size = estimate_size(
        teachers_taps(pool), Encoding(kind=kind, pool=pool, pca=pca), views=len(VIEWS), timesteps=len(TIMESTEPS),
        rows=FEATURE_ROWS, store=store, samples_per_shard=manifest.store.samples_per_shard,
    )  # fmt: skip
    assert size.features + size.overhead == manifest.bytes_features


def test_flux_at_512_px_takes_what_the_design_says() -> None:
    hidden, velocity = tap(32, 32, 3072), tap(32, 32, 64)

    def gigabytes(kind: str, pool: int = 1, pca: int | None = None) -> int:
        encoding = Encoding(kind=kind, pool=pool, pca=pca)
        return round(estimate_size([hidden], encoding, views=1, timesteps=4, rows=8054).features / 1e9)

    assert gigabytes("bfloat16") == 203
    assert gigabytes("bfloat16", pool=2) == 51
    assert gigabytes("int8", pool=2) == 25
    assert gigabytes("int8", pool=2, pca=768) == 6
    assert round(4 * chunk_bytes(hidden, Encoding(kind="bfloat16")) / 1e6) == 25
    assert chunk_bytes(velocity, Encoding(kind="bfloat16")) == 131_072


@many_examples
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([*VALUE_BYTES]),
)
def test_pooling_divides_the_bytes_and_components_are_no_more_than_channels(
    grid: tuple[int, int], pool: int, channels: int, kind: str
) -> None:
    whole = tap(grid[0] * pool, grid[1] * pool, channels)
    assert chunk_bytes(whole, Encoding(kind=kind)) == pool**2 * chunk_bytes(whole, Encoding(kind=kind, pool=pool))
    reduced = Encoding(kind=kind, pool=pool, pca=channels)
    assert chunk_bytes(whole, reduced) == chunk_bytes(whole, Encoding(kind=kind, pool=pool))
    with pytest.raises(InvalidEncoding, match="hidden"):
        chunk_bytes(whole, Encoding(kind=kind, pca=channels + 1))


def test_a_pool_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(InvalidEncoding, match="hidden"):
        estimate_size([tap(7, 4, 3)], Encoding(kind="int8", pool=2), views=1, timesteps=1, rows=1)


def test_images_are_counted_as_the_tar_stores_them(cache_of: Callable[..., Path]) -> None:
    cache = open_cache(cache_of())
    sizes = [len(image) for image in cache.images(range(10))]
    estimated = estimate_size(
        teachers_taps(), Encoding(kind="int8"), views=1, timesteps=1, rows=1, image_rows=10, image_bytes=sum(sizes) / 10
    )
    # Beside headers and padding every tar ends in up to 20 empty blocks: much for 10 small images in 3 files.
    assert cache.manifest.bytes_images is not None
    assert 0 <= cache.manifest.bytes_images - estimated.images <= 3 * 20 * 512
