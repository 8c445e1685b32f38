"""Whatever way an image file stores its pixels, what the teacher sees is upright 8-bit RGB, and the box fits it."""

import io

import numpy as np
import pytest
from cache_building import many_examples
from dataset_layouts import car, save_image, write_annotations, write_cars
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from pipeline.datasets import open_dataset
from pipeline.inputs.conditions import read_pixels
from pipeline.inputs.decoding import UNREADABLE, decode_image, decode_with_box
from pipeline.inputs.scan import scan_sample


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@many_examples
@given(
    size=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    orientation=st.integers(1, 8),
    kind=st.sampled_from(["PNG", "TIFF", "WEBP"]),
)
def test_a_box_drawn_on_the_stored_pixels_is_where_its_pixels_are_after_exif_turns_the_image(
    size, corners, orientation, kind
):
    width, height = size
    x0, x1 = sorted([int(corners[0] * (width - 1)), int(corners[1] * (width - 1))])
    y0, y1 = sorted([int(corners[2] * (height - 1)), int(corners[3] * (height - 1))])
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y0 : y1 + 1, x0 : x1 + 1] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(Image.fromarray(pixels), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    image, box = decode_with_box(data, (x0, y0, x1 + 1, y1 + 1))
    rows, columns = np.nonzero(np.asarray(image)[..., 0])
    assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert image.tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB").tobytes()
    assert decode_with_box(data, None)[1] == (0, 0, *image.size)


def test_the_teacher_sees_the_object_of_an_image_that_exif_turns(tmp_path):
    """A red left half stored sideways: by the tags the camera was turned, so it is the top half of what is seen."""
    write_cars(tmp_path, test_half=False)
    write_annotations(tmp_path / "devkit/cars_train_annos.mat", [car(1, "00001.jpg", (1, 1, 12, 16))])
    image = Image.new("RGB", (24, 16))
    image.paste((255, 0, 0), (0, 0, 12, 16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "cars_train/00001.jpg", exif=exif, quality=100, subsampling=0)
    cars = open_dataset("cars", tmp_path)
    pixels = read_pixels(cars, cars.samples[:1], 8, ["canonical"])["canonical"]
    crop, whole = pixels.object[0], pixels.context[0]
    assert crop[0, 1:-1].min() > 200
    assert whole[0, :3].min() > 200
    assert whole[0, -3:].max() < 60
    scanned = scan_sample(cars, cars.samples[0])
    assert (scanned.width, scanned.height) == (16, 24)
    assert scanned.box == (0.0, 0.0, 16.0, 12.0)


@pytest.mark.parametrize(
    ("name", "mode", "colour", "options", "seen"),
    [
        ("grey.jpg", "L", 100, {}, (100, 100, 100)),
        ("bit.png", "1", 1, {}, (255, 255, 255)),
        ("cmyk.jpg", "CMYK", (0, 255, 255, 0), {"quality": 100}, (255, 0, 0)),
        ("deep.png", "I;16", 100 * 256 + 255, {}, (100, 100, 100)),
        ("deep.tif", "I;16", 100 * 256, {}, (100, 100, 100)),
        ("deep.pgm", "I;16", 100 * 256, {}, (100, 100, 100)),
        ("clear.png", "RGBA", (200, 0, 0, 0), {}, (255, 255, 255)),
        ("glass.webp", "RGBA", (200, 0, 0, 255), {"lossless": True}, (200, 0, 0)),
        ("grey clear.png", "LA", (0, 0), {}, (255, 255, 255)),
        ("palette.gif", "P", 0, {}, (0, 0, 0)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(tmp_path, name, mode, colour, options, seen):
    image = decode_image(save_image(tmp_path / name, colour, mode, **options).read_bytes())
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, int) - seen).max() <= 2


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 200, 0])
    image.putpixel((0, 0), 0)
    decoded = decode_image(encoded(image, transparency=1))
    assert decoded.getpixel((0, 0)) == (255, 0, 0)
    assert decoded.getpixel((1, 1)) == (255, 255, 255)


def test_whatever_byte_of_an_avif_is_damaged_it_is_decoded_or_called_unreadable():
    whole, unreadable = encoded(Image.new("RGB", (16, 16), (1, 200, 3)), "AVIF"), 0
    for at in range(len(whole)):
        try:
            decode_image(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        except UNREADABLE:
            unreadable += 1
    assert unreadable > len(whole) // 10
