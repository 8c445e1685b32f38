"""A build decodes each image once where memory allows, and as often as it needs to where it does not."""

import pytest
from build_process import contents
from PIL import Image

from pipeline.build.config import BuildConfig
from pipeline.build.run import build, scan_for
from pipeline.inputs import decoding, scan
from pipeline.inputs.decoded import DecodedImages
from pipeline.inputs.tolerance import Tolerance

CONFIG = BuildConfig(timesteps=(28,), views=("canonical", "hflip"), image_size=32, image_format="png", batch=3)


@pytest.fixture
def decoded(monkeypatch):
    """How many times an image was decoded."""
    calls: list[int] = []
    decode = decoding.decode_with_box

    def counting(data, box):
        calls.append(len(data))
        return decode(data, box)

    for module in (decoding, scan):
        monkeypatch.setattr(module, "decode_with_box", counting)
    return calls


def build_with(limit, teacher, tiny_dataset, folder):
    dataset = DecodedImages(tiny_dataset, limit)
    scanned = scan_for(dataset, CONFIG, Tolerance(), log=str)
    build(teacher, dataset, CONFIG, folder / "cache", scanned=scanned, log=str)
    return contents(folder / "cache")


def test_a_build_decodes_every_image_once(decoded, teacher, tiny_dataset, tmp_path):
    build(teacher, tiny_dataset, CONFIG, tmp_path / "cache", log=str)
    assert len(decoded) == len(tiny_dataset.samples)


def test_images_that_do_not_fit_are_decoded_again_and_the_cache_is_the_same(decoded, teacher, tiny_dataset, tmp_path):
    whole = build_with(None, teacher, tiny_dataset, tmp_path / "roomy")
    assert len(decoded) == (count := len(tiny_dataset.samples))
    none = build_with(0, teacher, tiny_dataset, tmp_path / "tight")
    # Scanned, with features or not; a student image of each; latents of those with features.
    assert len(decoded) - count == 2 * count + 26
    assert none == whole


def test_no_more_is_kept_than_was_allowed(tiny_dataset):
    first, second = tiny_dataset.samples[:2]
    images = DecodedImages(tiny_dataset, limit=4 * 10 * 10)
    images.keep(first, Image.new("RGB", (10, 10)), (0, 0, 10, 10))
    images.keep(second, Image.new("RGB", (1, 1)), (0, 0, 1, 1))
    assert images.kept(first) is not None
    assert images.kept(second) is None
    assert images.read(second) == tiny_dataset.read(second)
