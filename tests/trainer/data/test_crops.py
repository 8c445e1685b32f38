"""Views that are random crops: the student is shown what its features are of."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache_schema import open_cache
from trainer.data.augmentation import DRAWS, random_crop
from trainer.data.batches import TrainingBatches
from trainer.data.crops import CropViews, inner_box
from trainer.data.features import FeatureNeed, Needs, open_sources
from trainer.data.images import ImageStore, fit_picture
from trainer.data.regions import Regions
from trainer.errors import TrainError
from trainer.methods.reading import TEACHER
from trainer.methods.registry import find_method
from trainer.reports.control_targets import make_target

VIEWS = ("canonical", "hflip", "crop.0", "crop.1")
SIDE, ROW, VIEW = 24, 0, 1  # of the stored images; channels of the features


@pytest.fixture(scope="module")
def cropped(build_tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("crops") / "cache"
    build_tiny(path, views=VIEWS)
    return open_cache(path)


def batches_of(cache, config, places=False):
    needs = find_method(config.method).needs(config)
    return TrainingBatches(cache, config, SIDE, Needs(needs.features, needs.unlabelled, places=places))


def test_a_row_that_reads_a_crop_shows_that_crop_and_every_other_the_whole_image(cropped, tiny_config):
    batches = batches_of(cropped, tiny_config("unlabeled_per_batch=3"))
    pictures = ImageStore(cropped, SIDE, range(len(cropped.samples)))
    met = set()
    for update in range(4):
        batch = batches[update].to(torch.device("cpu"))
        for image, feature in zip(batch.images, batch.features[TEACHER], strict=True):
            row, view = int(feature[0, 0, ROW]), int(feature[0, 0, VIEW])
            expected = pictures.pictures([row])[0]
            if view == 1:
                expected = expected[:, ::-1]
            elif view > 1:
                left, top, right, bottom = (SIDE * cropped.crops[row, view - 2]).round().astype(int)
                expected = fit_picture(Image.fromarray(expected[top:bottom, left:right]), SIDE, "squash")
            assert np.array_equal(image.permute(1, 2, 0), expected)
            met.add(view)
    assert met == {0, 1, 2, 3}


def test_a_crop_shown_whole_covers_the_teachers_view_of_it_exactly(cropped, tiny_config):
    batch = batches_of(cropped, tiny_config(), places=True)[0].to(torch.device("cpu"))
    assert {int(view) for view in batch.features[TEACHER][:, 0, 0, VIEW]} >= {2}
    # Whole pixels of the stored image, and the whole image where it is no crop: both are what the teacher saw.
    assert torch.allclose(batch.boxes, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(6, 4), atol=1e-5)


@settings(max_examples=60)
@given(st.tuples(*[st.floats(0, 0.45)] * 2, *[st.floats(0.55, 1)] * 2), st.lists(st.floats(0, 0.99), min_size=4,
       max_size=4), st.booleans())  # fmt: skip
def test_what_an_augmented_crop_shows_is_found_in_the_teachers_view(cropped, crop, draws, as_crop):
    """The colours of a picture say where they are; a place in the student's image is that in the teacher's view."""
    side = 200
    ramp = np.zeros((side, side, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(side)[None], np.arange(side)[:, None]
    view = 2 if as_crop else 0
    parts, regions = CropViews(cropped, VIEWS), Regions(cropped, open_sources(cropped, PLACES), VIEWS)
    boxes = np.tile(np.float32(crop).astype(float), (len(cropped.samples), 1))
    parts._boxes[2] = regions._crops[2] = boxes
    part, outer = parts.part(ramp, 0, view)
    image, inner = random_crop(part, 32, (0.3, 0.8), np.array([*draws, *[0.0] * (DRAWS - 4)]))
    rows, mirrored = np.array([0]), np.array([False])
    seen = regions.seen(rows, np.array([inner_box(outer, inner)]), mirrored, np.array([view]))[0]
    frame = boxes[0] if as_crop else np.array([0.0, 0.0, 1.0, 1.0])
    centre = (seen[:2] + seen[2:]) / 2 * (frame[2:] - frame[:2]) + frame[:2]  # in fractions of the photograph
    shown = image[:2].float().mean((1, 2)).numpy() + 0.5
    assert np.allclose(shown, side * centre, atol=1.5)


PLACES = Needs({"teacher": FeatureNeed(None)}, places=True)


def test_crops_of_another_cache_must_be_the_same(build_tiny, cropped, tmp_path):
    same = build_tiny(tmp_path / "same", views=VIEWS)
    other = build_tiny(tmp_path / "other", views=VIEWS)
    (source,) = open_sources(cropped, Needs({"teacher": FeatureNeed(None, cache=str(same.root))})).values()
    source.require_crops(cropped, VIEWS)
    source.cache = other
    other.crops[:] = other.crops[::-1]
    source.require_crops(cropped, ("canonical", "hflip"))
    with pytest.raises(TrainError, match=r"have other crops: crop.0 of 'train-0-0' shows another part; train without"):
        source.require_crops(cropped, VIEWS)


def test_features_of_crops_alone_are_none_of_a_mirrored_image(build_tiny, tiny_config, tmp_path):
    build_tiny(tmp_path / "cache", views=("crop.0", "crop.1"))
    cache = open_cache(tmp_path / "cache")
    with pytest.raises(TrainError, match=r"lacks view hflip, and the canonical one in its place.*augment\.flip=false"):
        batches_of(cache, tiny_config("augment.flip=true"))
    assert batches_of(cache, tiny_config("augment.flip=false")).views == ("crop.0", "crop.1")


def test_the_mean_over_views_is_of_whole_images(cropped, tiny_config):
    with pytest.raises(TrainError, match="would mix features of a crop"):
        batches_of(cropped, tiny_config("loss.target_views=mean"))
    batches_of(cropped, tiny_config("loss.target_views=mean", "views=[canonical,hflip]"))


def test_a_control_regresses_the_pixels_of_the_same_crops(cropped, tiny_config, tmp_path):
    make_target(cropped, "pixels", tmp_path / "pixels")
    targets = open_cache(tmp_path / "pixels")
    assert targets.manifest.views == list(VIEWS)
    crop, whole = (targets.read([0], tap="pixels", view=view).decode() for view in ("crop.0", "canonical"))
    assert not torch.equal(crop, whole)
    config = tiny_config(f"features={tmp_path / 'pixels'}", method="regression")
    assert TrainingBatches(cropped, config, SIDE, find_method("regression").needs(config)).views == VIEWS
