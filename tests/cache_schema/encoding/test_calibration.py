"""A few huge channels, as large diffusion transformers have them, do not cost the others their precision."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from cache_building import build, features_of, many_examples, start, tiny_manifest, tiny_samples
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import InvalidFeatures, create_cache
from cache_schema.encoding.calibration import Calibrator, Moments
from cache_schema.encoding.codec import TapCodec
from cache_schema.encoding.reduction import PrincipalComponents

CHANNELS, HUGE = 3072, [5, 700, 1500, 3000]
# All pairs of 3072 channels take a quarter of a minute: the thorough setting has them.
PCA_CHANNELS, PCA_HUGE = (CHANNELS, HUGE) if many_examples.max_examples >= 2000 else (768, [5, 200, 400, 760])
RANK = 8


def teacher_features(size: float, samples: int = 6) -> np.ndarray:
    """Features (n, V=1, T=2, L=64, C) of unit channels, four of them `size` times larger."""
    x = np.random.default_rng(0).normal(size=(samples, 1, 2, 64, CHANNELS)).astype(np.float32)
    x[..., HUGE] *= size
    return x


def correlated_features(size: float) -> np.ndarray:
    """Features whose ordinary channels say the same eight things, and whose four huge channels say another each."""
    rng = np.random.default_rng(0)
    said = rng.normal(size=(24, 1, 2, 64, RANK)) @ rng.normal(size=(RANK, PCA_CHANNELS))
    said[..., PCA_HUGE] = rng.normal(size=(24, 1, 2, 64, 4)) * size
    return said.astype(np.float32)


def codec_of(kind: str, x: np.ndarray, pca: int | None = None) -> TapCodec:
    moments = Moments(x.shape[2], x.shape[4], pairs=pca is not None)
    for sample in x:
        moments.add(sample)
    components = None if pca is None else moments.principal_components(pca)
    channel = moments.channel_amplitudes() if components is None else moments.coordinate_amplitudes(components)
    return TapCodec(kind, grid=(8, 8), pool=1, components=components, channel=channel)


def naive(codec: TapCodec) -> TapCodec:
    """One scale per token and nothing else: what one would write without having looked at the features."""
    assert codec.channel is not None
    return TapCodec(codec.kind, codec.grid, codec.pool, codec.components, np.ones_like(codec.channel))


def relative_errors(codec: TapCodec, x: np.ndarray) -> np.ndarray:
    """The error of every channel, |restored - original| / |original|, (C,)."""
    restored = np.stack([codec.restore(codec.decode(codec.encode(sample))) for sample in x]).astype(np.float64)
    return np.sqrt(np.square(restored - x).mean(axis=(0, 1, 2, 3)) / np.square(x, dtype=np.float64).mean((0, 1, 2, 3)))


def error_bound(codec: TapCodec, x: np.ndarray) -> np.ndarray:
    """The largest relative error of every channel that the number format allows, (C,)."""
    assert codec.channel is not None
    unit = codec.channel / np.sqrt(np.square(x, dtype=np.float64).mean(axis=(0, 1, 3)))  # T, C
    peak = np.abs(x / codec.channel[:, None]).max()
    if codec.kind == "int8":
        return (peak / 254 * unit).max(axis=0)
    return 1 / 16 + (peak / 448 / 1024 * unit).max(axis=0)


@pytest.mark.parametrize(("kind", "usual", "bound"), [("int8", 0.02, 0.03), ("float8_e4m3", 0.04, 0.07)])
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_every_channel_keeps_its_precision_whatever_the_size_of_four_of_them(
    kind: str, usual: float, bound: float, size: float
) -> None:
    x = teacher_features(size)
    codec = codec_of(kind, x[:3])
    errors = relative_errors(codec, x[3:])
    assert (errors <= error_bound(codec, x[3:])).all()
    assert error_bound(codec, x[3:]).max() < bound
    assert errors.max() < usual


# A floating-point format of 8 bits has the range for channels a thousand times larger by itself, int8 has not.
@pytest.mark.parametrize(("kind", "size"), [("int8", 1e3), ("float8_e4m3", 1e6)])
def test_one_scale_per_token_alone_would_lose_the_ordinary_channels(kind: str, size: float) -> None:
    x = teacher_features(size)
    errors = np.delete(relative_errors(naive(codec_of(kind, x[:3])), x[3:]), HUGE)
    assert errors.mean() > 0.9


def test_principal_components_are_those_of_the_ordinary_channels_too() -> None:
    x = correlated_features(1e3)
    codec = codec_of("float32", x[:16], pca=RANK)
    assert codec.components is not None
    assert np.delete(relative_errors(codec, x[16:]), PCA_HUGE).max() < 1e-3
    # Components of the features as they are would be spent on the huge channels.
    flat = x[:16].reshape(-1, PCA_CHANNELS).astype(np.float64)
    _, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
    ones = np.ones(PCA_CHANNELS, np.float32)
    plain = PrincipalComponents(ones, flat.mean(axis=0), vectors[:, : -RANK - 1 : -1].T)
    unnormalised = TapCodec("float32", codec.grid, 1, plain, None)
    assert np.delete(relative_errors(unnormalised, x[16:]), PCA_HUGE).mean() > 0.5


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("float8_e4m3", 0.07)])
def test_coordinates_of_unequal_size_survive_their_number_format(kind: str, bound: float) -> None:
    x = correlated_features(1e3)
    # With the four huge channels' own components: a hundred times smaller than those of the many ordinary ones.
    codec = codec_of(kind, x[:16], pca=RANK + 4)
    errors = relative_errors(codec, x[16:])
    assert errors.max() < bound
    if kind == "int8":
        assert relative_errors(naive(codec), x[16:])[PCA_HUGE].min() > 2 * errors[PCA_HUGE].max()


@many_examples
@given(st.sampled_from([("int8", None), ("float8_e4m3", 3), ("float32", 2)]), st.sets(st.integers(1, 5)))
def test_the_statistics_do_not_depend_on_how_the_samples_were_batched(
    encoding: tuple[str, int | None], cuts: set[int]
) -> None:
    samples, rows = tiny_samples()
    manifest = tiny_manifest(samples, rows, encoding[0], pool=2, pca=encoding[1])
    found = []
    for bounds in ([0, 6], [0, *sorted(cuts), 6]):
        calibrator = Calibrator(manifest)
        for first, last in itertools.pairwise(bounds):
            for tap, values in features_of(range(first, last), manifest).items():
                calibrator.add(tap, values)
        arrays = [calibrator.finish(tap.name) for tap in manifest.taps]
        found.append([{part: array.tobytes() for part, array in parts.items()} for parts in arrays])
    assert found[0] == found[1]


def test_a_calibrated_cache_takes_no_more_batches(tmp_path: Path) -> None:
    root = build(tmp_path / "cache", kind="int8")
    start(root, kind="int8").calibrate(pytest.fail(f"batch {i} was computed") for i in range(3))


def test_a_calibration_without_samples_or_with_unsound_ones_is_refused(tmp_path: Path) -> None:
    samples, rows = tiny_samples()
    unfinished = create_cache(tmp_path / "cache", tiny_manifest(samples, rows, "int8", pca=3), samples)
    with pytest.raises(InvalidFeatures, match="at least one sample"):
        unfinished.calibrate(iter([]))
    batches = [features_of([0, 1], unfinished.manifest), features_of([2, 3], unfinished.manifest)]
    batches[1]["hidden"][1, 0, 0, 0, 0] = np.inf
    with pytest.raises(InvalidFeatures, match="tap hidden of calibration sample 3 is inf"):
        unfinished.calibrate(batches)
    assert unfinished.needs_calibration()
