"""Features survive their encoding as well as the encoding promises, and never turn into nonsense silently."""

import numpy as np
import pytest
import torch
from cache_building import many_examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache_schema import InvalidFeatures
from cache_schema.encoding.calibration import Moments
from cache_schema.encoding.float8 import float8_to_float32
from cache_schema.encoding.number_formats import Encoded, as_features, decode, encode, first_not_finite

PLAIN = ["float32", "float16", "bfloat16"]
SCALED = ["int8", "float8_e4m3"]


def calibrate_channels(samples: np.ndarray) -> np.ndarray:
    """The calibration (T, C) of samples (n, V, T, L, C)."""
    moments = Moments(samples.shape[2], samples.shape[4])
    for sample in samples:
        moments.add(sample)
    return moments.channel_amplitudes()


shapes = hnp.array_shapes(min_dims=4, max_dims=4, max_side=5)


def float32_features(limit: float) -> st.SearchStrategy[np.ndarray]:
    elements = st.floats(-limit, limit, width=32, allow_subnormal=True)
    return hnp.arrays(np.float32, shapes, elements=elements)


@many_examples
@given(float32_features(float(np.finfo(np.float32).max)))
def test_float32_returns_exactly_what_was_given(x: np.ndarray) -> None:
    np.testing.assert_array_equal(decode("float32", encode("float32", x)), x)


@many_examples
@given(float32_features(65504.0))
def test_float16_rounds_as_numpy_does(x: np.ndarray) -> None:
    np.testing.assert_array_equal(decode("float16", encode("float16", x)), x.astype(np.float16).astype(np.float32))


@many_examples
@given(float32_features(float(np.float32(3.3e38))))
def test_bfloat16_rounds_as_torch_does(x: np.ndarray) -> None:
    encoded = encode("bfloat16", x)
    assert encoded.payload.dtype == np.uint16
    expected = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decode("bfloat16", encoded), expected)


@many_examples
@given(float32_features(1e6))
def test_int8_errs_by_at_most_half_a_step_of_its_token_and_channel(x: np.ndarray) -> None:
    channel = calibrate_channels(x[None])
    encoded = encode("int8", x, channel)
    assert encoded.scale is not None
    step = encoded.scale[..., None].astype(np.float64) * channel[:, None, :]
    error = np.abs(decode("int8", encoded, channel).astype(np.float64) - x)
    # Besides the rounding: float32 arithmetic, and tokens too small for a scale, which become zero.
    slack = 1e-5 * np.abs(x) + 2e-36 * channel[:, None, :]
    assert (error <= 0.5001 * step + slack).all()


@many_examples
@given(float32_features(1e6))
def test_float8_errs_by_at_most_a_sixteenth_of_a_value_or_half_its_tokens_smallest_number(x: np.ndarray) -> None:
    channel = calibrate_channels(x[None])
    encoded = encode("float8_e4m3", x, channel)
    assert encoded.scale is not None
    assert encoded.payload.dtype == np.uint8
    smallest = encoded.scale[..., None].astype(np.float64) * channel[:, None, :] * 2.0**-9
    error = np.abs(decode("float8_e4m3", encoded, channel).astype(np.float64) - x)
    slack = 1e-5 * np.abs(x) + 8e-36 * channel[:, None, :]
    assert (error <= np.maximum(np.abs(x) / 16, smallest / 2) + slack).all()


def encode_step_by_step(kind: str, x: np.ndarray, channel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The formats' definition in plain NumPy, in as many passes as it takes: the bytes every release must write."""
    inverse = (1.0 / channel.astype(np.float64)).astype(np.float32)
    largest = np.float32(127 if kind == "int8" else 448)
    calibrated = x.astype(np.float32) * inverse[:, None, :]
    scale = np.abs(calibrated).max(axis=-1) / largest
    scale[scale <= np.finfo(np.float32).tiny] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(scale[..., None] > 0, calibrated / scale[..., None], np.float32(0))
    if kind == "int8":
        return np.rint(scaled).astype(np.int8), scale
    # The sign of a zero stays.
    scaled = np.copysign(np.clip(scaled, -largest, largest), calibrated)
    return torch.from_numpy(scaled).to(torch.float8_e4m3fn).view(torch.uint8).numpy(), scale


@many_examples
@given(st.data(), st.sampled_from(SCALED))
def test_scaled_formats_have_the_bytes_that_their_definition_says(data: st.DataObject, kind: str) -> None:
    """For every type of features, with huge channels, silent tokens and tiny values."""
    shape = data.draw(st.tuples(*(st.integers(1, 3) for _ in range(3)), st.integers(1, 40)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    x = rng.standard_normal(shape, dtype=np.float32)
    x[..., rng.random(shape[-1]) < 0.2] *= 1000
    x[..., rng.random(shape[-2]) < 0.2, :] *= np.float32(data.draw(st.sampled_from([0.0, 1e-38, 1e-30, 1e5])))
    channel = np.exp(rng.normal(0, 3, (shape[1], shape[3]))).astype(np.float32)
    given_as = data.draw(st.sampled_from([np.float32, np.float64, torch.float32, torch.bfloat16]))
    features = torch.from_numpy(x).to(given_as) if isinstance(given_as, torch.dtype) else x.astype(given_as)
    if data.draw(st.booleans()):
        features = features.swapaxes(0, 1)[:, :1].swapaxes(0, 1)  # not contiguous
    encoded = encode(kind, features, channel)
    payload, scale = encode_step_by_step(kind, as_features(features), channel)
    np.testing.assert_array_equal(encoded.payload, payload)
    np.testing.assert_array_equal(encoded.scale, scale)


@many_examples
@given(hnp.arrays(np.uint32, st.integers(1, 40)))
def test_any_bits_become_the_bfloat16_that_torch_makes_of_them_or_are_refused(bits: np.ndarray) -> None:
    x = bits.view(np.float32).reshape(1, 1, 1, -1)
    expected = torch.from_numpy(x.copy()).to(torch.bfloat16)
    if not expected.isfinite().all():
        with pytest.raises(InvalidFeatures):
            encode("bfloat16", x)
        return
    np.testing.assert_array_equal(encode("bfloat16", x).payload, expected.view(torch.uint16).numpy())


@pytest.mark.parametrize("kind", [*PLAIN, *SCALED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_format_takes_a_value_that_is_not_finite(kind: str, dtype: torch.dtype, value: float) -> None:
    x = torch.ones(1, 1, 3, 4, dtype=dtype)
    x[0, 0, 2, 1] = value
    with pytest.raises(InvalidFeatures):
        encode(kind, x, np.ones((1, 4), np.float32))


@many_examples
@given(float32_features(float(np.finfo(np.float32).max)))
def test_no_finite_value_becomes_a_float8_nan(x: np.ndarray) -> None:
    try:
        encoded = encode("float8_e4m3", x, calibrate_channels(np.minimum(np.abs(x), 1e38)[None]))
    except InvalidFeatures:
        return
    assert not (encoded.payload & 0x7F == 0x7F).any()


def test_every_float8_number_is_decoded_as_torch_means_it() -> None:
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    expected = numbers.to(torch.float32)
    known = ~expected.isnan()
    assert known.sum() == 254
    assert torch.equal(float8_to_float32(numbers)[known], expected[known])


@many_examples
@given(float32_features(1e6), st.sampled_from(SCALED))
def test_an_encoding_decodes_the_same_for_one_sample_as_for_many(x: np.ndarray, kind: str) -> None:
    channel = calibrate_channels(x[None])
    whole = encode(kind, x, channel)
    for i, sample in enumerate(x):
        alone = encode(kind, sample, channel)
        np.testing.assert_array_equal(alone.payload, whole.payload[i])
        np.testing.assert_array_equal(alone.scale, whole.scale[i])


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.01), ("float8_e4m3", 0.07)])
def test_a_channel_that_was_silent_during_calibration_may_speak_up_later(kind: str, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    quiet = rng.normal(size=(4, 1, 1, 16, 32)).astype(np.float32)
    quiet[..., 3] = 0
    channel = calibrate_channels(quiet)
    loud = quiet[0].copy()
    loud[..., 3] = 0.05
    y = decode(kind, encode(kind, loud, channel), channel)
    np.testing.assert_allclose(y[..., 3], 0.05, rtol=tolerance)
    assert np.abs(y - loud).max() < 0.5


@pytest.mark.parametrize("kind", SCALED)
def test_tokens_of_zeros_and_of_tiny_values_decode_to_zeros(kind: str) -> None:
    x = np.zeros((1, 1, 2, 4), np.float32)
    x[..., 1, :] = 1e-44
    channel = np.ones((1, 4), np.float32)
    y = decode(kind, encode(kind, x, channel), channel)
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize(("kind", "value"), [("float16", 1e5), ("bfloat16", 3.4e38)])
def test_a_value_beyond_the_encodings_range_is_refused(kind: str, value: float) -> None:
    with pytest.raises(InvalidFeatures, match=f"beyond the range of {kind}"):
        encode(kind, np.full((1, 1, 1, 2), value, np.float32))


@pytest.mark.parametrize("kind", SCALED)
def test_values_that_overflow_under_their_calibration_are_refused(kind: str) -> None:
    with pytest.raises(InvalidFeatures, match="calibrate on more samples"):
        encode(kind, np.full((1, 1, 1, 2), 1e38, np.float32), np.full((1, 2), 1e-10, np.float32))


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_formats_need_a_calibration_of_the_right_shape(kind: str) -> None:
    x = np.zeros((1, 1, 2, 4), np.float32)
    with pytest.raises(InvalidFeatures, match=f"{kind} needs a channel calibration"):
        encode(kind, x)
    with pytest.raises(InvalidFeatures, match="features need"):
        encode(kind, x, np.ones((2, 4), np.float32))


@many_examples
@given(st.data())
def test_the_first_value_that_is_not_finite_is_found(data: st.DataObject) -> None:
    x = np.zeros((2, 3, 4, 5), np.float32)
    place = tuple(data.draw(st.integers(0, side - 1)) for side in x.shape)
    x[place] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    assert first_not_finite(x) == place


def test_large_finite_values_are_not_taken_for_infinite_ones() -> None:
    assert first_not_finite(np.full((1, 1, 2, 2), 3e38, np.float32)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_may_be_torch_tensors_of_any_floating_type(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 12).reshape(1, 1, 3, 4).to(dtype)
    np.testing.assert_array_equal(as_features(x).astype(np.float32), x.float().numpy())


def test_integer_features_are_refused() -> None:
    with pytest.raises(InvalidFeatures, match="floating point"):
        as_features(np.zeros(3, np.int32))


def test_encoded_values_are_frozen() -> None:
    encoded = Encoded(np.zeros(1))
    with pytest.raises(AttributeError):
        encoded.scale = np.zeros(1)  # type: ignore[misc]
