"""What is changed in student images is drawn from the run's seed, and agrees with the features."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import AugmentConfig
from trainer.data.augmentation import augment_image, draw_numbers, random_crop
from trainer.data.batches import TrainingBatches, iterate
from trainer.errors import TrainError
from trainer.methods.reading import TEACHER
from trainer.methods.registry import find_method
from trainer.methods.settings import load_config

CPU, SIZE, ROW, VIEW = torch.device("cpu"), 24, 0, 1
ALL = ("augment.crop_scale=0.3,0.9", "augment.flip=true", "augment.color=0.4", "augment.hue=0.1", "augment.erase=0.5")


def batches_of(cache, config) -> TrainingBatches:
    return TrainingBatches(cache, config, SIZE, find_method(config.method).needs(config))


def bright_half(image: torch.Tensor) -> str:
    """The synthetic images are bright on the left, as they are stored."""
    left, right = image.float().chunk(2, dim=-1)
    return "left" if left.mean() > right.mean() else "right"


def test_every_image_is_changed_in_its_own_way_and_again_in_every_update(cache, tiny_config):
    batches = batches_of(cache, tiny_config(*ALL, mode="baseline"))
    plain = batches_of(cache, tiny_config(mode="baseline"))
    assert all(not torch.equal(a, b) for a, b in zip(batches[0].images, plain[0].images, strict=True))
    rows = batches.labelled.batch(0)
    again = next(u for u in range(batches.per_epoch, 50) if rows[0] in batches.labelled.batch(u))
    place = batches.labelled.batch(again).tolist().index(rows[0])
    assert not torch.equal(batches[again].images[place], batches[0].images[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_images_do_not_depend_on_who_makes_them_nor_on_where_a_run_resumed(cache, tiny_config, workers):
    batches = batches_of(cache, tiny_config(*ALL, "unlabeled_per_batch=2"))
    expected = [batches[update].images for update in range(4)]
    loaded = list(iterate(batches_of(cache, tiny_config(*ALL, "unlabeled_per_batch=2")), 2, 4, workers))
    assert all(torch.equal(a.images, b) for a, b in zip(loaded, expected[2:], strict=True))


def test_unlabelled_rows_do_not_change_what_labelled_ones_look_like(cache, tiny_config):
    alone, beside = (batches_of(cache, tiny_config(*ALL, f"unlabeled_per_batch={n}"))[1].images for n in (0, 3))
    assert torch.equal(alone, beside[:6])


@pytest.mark.parametrize("views", ["none", "canonical"])
def test_a_mirrored_image_has_mirrored_features_where_the_cache_holds_them(cache, tiny_config, views):
    batches = batches_of(cache, tiny_config("augment.flip=true", "augment.crop_scale=0.9,1", f"views={views}"))
    seen = set()
    for update in range(3):
        batch = batches[update].to(CPU)
        for image, label, tokens in zip(batch.images, batch.labels, batch.features[TEACHER], strict=True):
            if int(label) > 0:  # class 0 is as dark on one side as on the other
                seen.add((bright_half(image), int(tokens[0, 0, VIEW])))
    assert seen == {("left", 0), ("right", 1)}


def test_images_are_mirrored_by_choice_where_the_cache_has_but_one_view(make_cache, tiny_config):
    cache = make_cache(views=("canonical",))
    for flip, expected in (("true", {"left", "right"}), ("false", {"left"})):
        batches = batches_of(cache, tiny_config(f"augment.flip={flip}"))
        made = [batches[update].to(CPU) for update in range(3)]
        images = [image for batch in made for image, y in zip(batch.images, batch.labels, strict=True) if y > 0]
        assert {bright_half(image) for image in images} == expected
        assert {int(view) for batch in made for view in batch.features[TEACHER][:, 0, 0, VIEW]} == {0}


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1), st.floats(0, 1))
@settings(max_examples=50)
def test_any_picture_can_be_cropped_and_changed(seed, height, width, least, chance):
    random = np.random.default_rng(seed)
    picture = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    numbers = draw_numbers(random, 1)[0]
    before = picture.copy()
    image, (left, top, right, bottom) = random_crop(picture, 16, (least, 1.0), numbers)
    assert 0 <= left < right <= 1
    assert 0 <= top < bottom <= 1
    config = AugmentConfig(color=0.5, erase=chance)
    for made in (image, augment_image(image, config, numbers)):
        assert (made.dtype, made.shape) == (torch.uint8, (3, 16, 16))
    assert np.array_equal(picture, before)


def test_the_whole_picture_is_a_crop_of_it():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    numbers = np.full(13, 0.5)  # a ratio of 1
    image, box = random_crop(picture, 16, (1.0, 1.0), numbers)
    assert torch.equal(image, torch.from_numpy(picture).permute(2, 0, 1))
    assert box == (0, 0, 1, 1)


def test_a_range_that_is_none_is_refused(tiny_config):
    with pytest.raises(TrainError, match=r"augment.*the smaller one first, such as 0.2,1"):
        tiny_config("augment.crop_scale=1,0.2")


@pytest.mark.parametrize(("word", "color"), [("none", 0.0), ("color", 0.3)])
def test_augmentation_of_an_old_config_is_understood(tiny_config, tmp_path, word, color):
    plain = tiny_config(mode="baseline").model_dump_json()
    file = tmp_path / "config.json"
    old = plain.replace(AugmentConfig().model_dump_json(), f'"{word}"')
    assert old != plain
    file.write_text(old)
    assert load_config(file).augment == AugmentConfig(color=color)
