"""Decoded images: the same ones whatever is kept of them, and made square as the student is told."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cache_schema import ImagesInfo
from trainer.data import memory
from trainer.data.images import ImageStore, fit_picture
from trainer.training.assembly import assemble

SIZE = 24
ONE_IMAGE = 3 * SIZE * SIZE / 1e9  # GB


def test_images_are_the_same_however_many_are_kept_in_memory(cache):
    rows, wanted = range(len(cache)), [7, 3, 7, 20]
    stores = [ImageStore(cache, SIZE, rows, memory_gb=gb) for gb in (1, 8.5 * ONE_IMAGE, 0)]
    assert [store.kept for store in stores] == [len(cache), 8, 0]
    for _ in range(2):
        first, *others = (store.load(wanted) for store in stores)
        assert all(torch.equal(first, other) for other in others)


def test_as_much_is_kept_as_a_quarter_of_what_the_machine_or_its_container_has_free(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 5 * 4 * 3 * SIZE * SIZE)
    assert ImageStore(cache, SIZE, range(len(cache))).kept == 5
    assert memory._left_in_container(tmp_path) > 1 << 60
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("10\n")
    assert memory._left_in_container(tmp_path) > 1 << 60
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._left_in_container(tmp_path) == 990


def test_images_are_resized_to_what_the_student_takes(cache):
    assert ImageStore(cache, 32, [0]).load([0]).shape == (1, 3, 32, 32)


def test_the_centre_is_cut_out_without_resampling_where_the_margin_is_the_usual_one():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8))
    cropped = fit_picture(image, 224, "crop")
    assert np.array_equal(cropped, np.asarray(image)[16:240, 38:262])
    assert fit_picture(image, 64, "crop").shape == fit_picture(image, 64, "squash").shape == (64, 64, 3)


def test_a_stored_picture_has_its_aspect_is_never_enlarged_and_never_endless():
    info = ImagesInfo(size=256, format="png", shape="aspect")
    assert info.stored_size(640, 480) == (341, 256)
    assert info.stored_size(480, 640) == (256, 341)
    assert info.stored_size(100, 200) == (100, 200)
    assert info.stored_size(100_000, 1000) == (1024, 10)
    assert ImagesInfo(size=256, format="png").stored_size(640, 480) == (256, 256)


def test_the_centre_of_a_picture_stored_as_a_square_is_as_much_of_its_width_as_of_its_height(build_tiny, tmp_path):
    wide = build_tiny(tmp_path / "wide", per_class=2, picture=(2 * SIZE, SIZE))
    assert np.allclose(ImageStore(wide, SIZE, [0], fit="crop").boxes([0]), [[1 / 16, 1 / 16, 15 / 16, 15 / 16]])


@pytest.fixture(scope="module")
def tall_cache(tmp_path_factory, build_tiny):
    """Images of 24 × 36 pixels stored with their aspect, the shorter side 16 long: 16 × 24."""
    classes = {"train": (0, 1, 2, 3), "test": (4, 5)}
    path = tmp_path_factory.mktemp("tall") / "cache"
    return build_tiny(path, classes=classes, picture=(SIZE, 36), shape=("aspect", 16))


def test_pictures_that_keep_their_aspect_are_cropped_in_training_and_at_test(tall_cache, tiny_config):
    stored = Image.open(io.BytesIO(tall_cache.images([4])[0]))
    assert stored.size == (16, 24)
    parts = assemble(tiny_config("validation_classes=0.5", mode="baseline"), tall_cache)
    assert parts.method.student.fit == "crop"
    row = int(parts.validation.split.rows[0])
    stored = Image.open(io.BytesIO(tall_cache.images([row])[0])).convert("RGB")
    expected = fit_picture(stored, 24, "crop")
    assert np.array_equal(parts.validation.images.load([row])[0].permute(1, 2, 0), expected)
    assert np.allclose(parts.batches.images.boxes([0]), [[1 / 16, 5 / 24, 15 / 16, 19 / 24]])
    squashed = assemble(tiny_config("fit=squash", mode="baseline"), tall_cache)
    assert squashed.method.student.fit == "squash"


def test_pictures_are_kept_as_they_are_stored_where_crops_are_drawn(tall_cache):
    store, none = (ImageStore(tall_cache, SIZE, range(8), gb, as_stored=True) for gb in (1, 0))
    assert (store.kept, none.kept) == (8, 0)
    for _ in range(2):
        kept, fresh = store.pictures([3, 5]), none.pictures([3, 5])
        assert [picture.shape for picture in kept] == [(24, 16, 3)] * 2
        assert all(np.array_equal(a, b) for a, b in zip(kept, fresh, strict=True))
