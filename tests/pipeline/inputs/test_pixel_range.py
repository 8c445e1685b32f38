"""Deep and floating-point images: scaled where their range is known, set aside with the reason where it is not."""

import io
import struct
import zlib

import numpy as np
import pytest
from dataset_layouts import save_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from pipeline.annotate.box_stage import BoxStage
from pipeline.annotate.config import AnnotateConfig
from pipeline.datasets import open_dataset
from pipeline.inputs.decoding import decode_image, reason_of
from pipeline.inputs.pixel_range import PixelRangeError, bits_used
from pipeline.inputs.scan import scan, scan_sample
from pipeline.inputs.tolerance import BadSamples, Tolerance


def tiff(values, tags=None, **options):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, (kind, value) in (tags or {}).items():
        info.tagtype[number] = kind
        info[number] = value
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo=info, **options)
    return buffer.getvalue()


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def ramp(last, kind):
    return np.linspace(0, last, 64).reshape(8, 8).astype(kind)


SHORT, LONG, FLOAT = 3, 4, 11


@pytest.mark.parametrize(
    "data",
    [
        tiff(ramp(1, np.float32)),
        tiff(ramp(255, np.float32), {341: (FLOAT, 255.0)}),
        tiff(ramp(65535, np.uint16)),
        tiff(ramp(4095, np.uint16), {281: (SHORT, 4095)}),
        tiff(ramp(4095, np.int32), {281: (LONG, 4095)}),
        tiff(ramp(65535, np.uint16), compression="tiff_lzw"),
        png(ramp(65535, np.uint16)),
    ],
)
def test_values_of_a_known_range_fill_eight_bits(data):
    grey = np.asarray(decode_image(data))[..., 0].reshape(-1).astype(int)
    assert np.abs(grey - np.linspace(0, 255, 64)).max() <= 1.5
    assert bits_used(data) is None


def tiff_by_hand(packed, bits, photometric, kind=1):
    """An uncompressed TIFF of 8 × 8 greys in a way that Pillow reads but does not write; kind 2 has a sign."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 8, 279: len(packed), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)


def deep_colours(last):
    """A PNG of 8 × 8 colours of 16 bits from 0 to `last`, which Pillow reads but does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + ramp(last, ">u2")[y].repeat(3).tobytes() for y in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_twelve_bits_that_a_file_declares_fill_eight():
    values = ramp(4095, int).reshape(-1)
    packed = b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True))
    data = tiff_by_hand(packed, 12, 1)
    grey = np.asarray(decode_image(data))[..., 0].reshape(-1).astype(int)
    assert np.abs(grey - np.linspace(0, 255, 64)).max() <= 1.5
    assert bits_used(data) is None


@given(st.floats(0, 1, width=32))
def test_a_float_from_0_to_1_is_the_nearest_of_256_greys(value):
    pixel = decode_image(tiff(np.full((2, 2), value, np.float32))).getpixel((0, 0))
    assert abs(pixel[0] - 255 * value) <= 0.5 + 1e-4


@pytest.mark.parametrize(("photometric", "first"), [(0, 255), (1, 0)])
def test_deep_greys_whose_zero_is_white_are_turned(photometric, first):
    pixels = decode_image(tiff_by_hand(ramp(65535, "<u2").tobytes(), 16, photometric))
    assert pixels.getpixel((0, 0)) == (first,) * 3
    assert pixels.getpixel((7, 7)) == (255 - first,) * 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(ramp(255, np.float32)), "floating-point values from 0 to 255, whose range is not known"),
        (tiff(ramp(-1, np.float32)), "floating-point values from -1 to 0, whose range is not known"),
        (tiff(np.full((2, 2), np.nan, np.float32)), "its floating-point values are not all finite"),
        (tiff(ramp(4095, np.int32)), "whole numbers from 0 to 4095 with a sign or 32 bits, whose range is not known"),
        (tiff(ramp(1e-3, np.float32)), "values up to 0.001 of a range to 1, which would all be one shade"),
        (tiff_by_hand(ramp(2**32 - 1, "<u4").tobytes(), 32, 1), "whole numbers from 0 to 4294967295 with a sign or 32"),
        (tiff_by_hand(ramp(-9, "i1").tobytes(), 8, 1, kind=2), "whole numbers of 8 bits with a sign"),
        (deep_colours(255), "values up to 255 of a range to 65535, which would all be one shade"),
        (tiff(ramp(5000, np.uint16), {281: (SHORT, 4095)}), "values from 0 to 5000 outside the range that it declares"),
        (tiff(ramp(255, np.uint16)), "values up to 255 of a range to 65535, which would all be one shade"),
        (png(ramp(200, np.uint16)), "values up to 200 of a range to 65535, which would all be one shade"),
    ],
)
def test_values_of_an_unknown_range_are_no_picture_and_the_reason_says_which(data, reason):
    with pytest.raises(PixelRangeError) as caught:
        decode_image(data)
    assert reason_of(caught.value).startswith(reason)


@pytest.mark.parametrize(("last", "bits"), [(4095, 12), (1023, 10), (16383, 14), (16384, None), (65535, None)])
def test_fewer_bits_than_the_file_has_are_noticed(last, bits):
    assert bits_used(png(ramp(last, np.uint16))) == bits
    assert bits_used(tiff(ramp(last, np.uint16))) == bits
    assert bits_used(tiff(ramp(last / 65535, np.float32))) == bits
    assert bits_used(png(ramp(min(last, 255), np.uint8))) is None


def test_fewer_bits_are_noticed_in_deep_colours_too():
    data = deep_colours(4095)
    assert decode_image(data).getpixel((7, 7)) == (15, 15, 15)
    assert bits_used(data) == 12


def test_the_scan_sets_unknown_ranges_aside_and_says_once_how_many_files_are_dark(tmp_path):
    for name in "ab":
        save_image(tmp_path / name / "plain.png")
        (tmp_path / name / "twelve.png").write_bytes(png(ramp(4095, np.uint16)))
        (tmp_path / name / "ten.tif").write_bytes(tiff(ramp(1000, np.uint16)))
        (tmp_path / name / "float.tiff").write_bytes(tiff(ramp(7, np.float32)))
    folder = open_dataset("folder", tmp_path)
    said = []
    scanned = scan(folder, ["train"], bad=BadSamples(Tolerance(max_bad=0.5), len(folder.samples), said.append))
    assert {s.sample.id for s in scanned if not s.ok} == {"a/float.tiff", "b/float.tiff"}
    (warning,) = [line for line in said if "of 16 bits" in line]
    assert warning.startswith("warning: 4 images of 16 bits use at most 12 of them and are read as dark ones, such as ")


@pytest.mark.parametrize("data", [b"no image", b"\x89PNG\r\n\x1a\n", b"", b"GIF89a" + bytes(20)])
def test_the_reason_for_a_damaged_file_has_no_address_in_memory(tmp_path, data):
    save_image(tmp_path / "b/1.png")
    save_image(tmp_path / "a/2.png")
    (tmp_path / "a/1.png").write_bytes(data)
    folder = open_dataset("folder", tmp_path)
    annotated = BoxStage(folder, AnnotateConfig(boxes="full", captions="none"), None)([0])[0]["reason"]
    for reason in (scan_sample(folder, folder.samples[0]).reason, annotated):
        assert reason
        assert "0x" not in reason
        assert "object at" not in reason
