"""A part of the curriculum for each image at each update: what is drawn is what is read and what is trained on."""

import numpy as np
import pytest
import torch

from trainer.data.batches import TrainingBatches, iterate
from trainer.data.timesteps import TimestepDraw
from trainer.errors import TrainError
from trainer.methods.gcd.method import OTHER_VIEW
from trainer.methods.reading import TEACHER
from trainer.methods.registry import find_method

CPU = torch.device("cpu")
VIEW, TIMESTEP = 1, 2  # the channels in which the synthetic features say their view and timestep
ONE = "timesteps_per_step=1"


@pytest.fixture
def batches_of(cache, tiny_config):
    def make(*settings, **flags):
        config = tiny_config(*settings, **flags)
        return TrainingBatches(cache, config, 24, find_method(config.method).needs(config))

    return make


def test_every_image_has_the_timesteps_it_drew_and_in_the_end_all(batches_of):
    batches, seen = batches_of(ONE, "unlabeled_per_batch=2"), set()
    for update in range(6):
        batch = batches[update].to(CPU)
        tokens = batch.features[TEACHER]
        assert tokens.shape[:2] == (8, 1) == tuple(batch.timesteps.shape)
        assert torch.equal(torch.tensor([10, 22])[batch.timesteps], tokens[:, :, 0, TIMESTEP].long())
        assert len(batch.timesteps.unique()) == 2
        seen |= {(update, int(t)) for t in batch.timesteps[0]}
    assert {t for _, t in seen} == {0, 1}


def test_images_views_and_labels_are_those_of_a_run_that_takes_all_timesteps(batches_of):
    whole, drawn = batches_of()[3].to(CPU), batches_of(ONE)[3].to(CPU)
    assert torch.equal(whole.images, drawn.images)
    assert torch.equal(whole.labels, drawn.labels)
    picked = whole.features[TEACHER].take_along_dim(drawn.timesteps[:, :, None, None], 1)
    assert torch.equal(picked, drawn.features[TEACHER])


def test_both_views_of_an_image_are_of_the_same_timestep(batches_of):
    features = batches_of(ONE, "loss.target_views=mean")[0].to(CPU).features
    own, other = features[TEACHER], features[OTHER_VIEW]
    assert torch.equal(own[..., TIMESTEP], other[..., TIMESTEP])
    assert (own[..., VIEW] != other[..., VIEW]).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_any_part_of_a_run_draws_what_the_whole_run_drew(batches_of, workers):
    expected = [batches_of(ONE)[update].to(CPU) for update in (2, 3)]
    found = [batch.to(CPU) for batch in iterate(batches_of(ONE), 2, 4, workers)]
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.timesteps, b.timesteps)
        assert torch.equal(a.features[TEACHER], b.features[TEACHER])


def test_parts_of_a_batch_keep_the_timesteps_of_their_images(batches_of):
    batch = batches_of(ONE, "unlabeled_per_batch=2")[0].to(CPU)
    for part in batch.split(2):
        assert torch.equal(torch.tensor([10, 22])[part.timesteps], part.features[TEACHER][:, :, 0, TIMESTEP].long())


def test_what_is_measured_before_the_first_update_is_measured_on_all_timesteps(batches_of):
    for settings in ((ONE,), (ONE, "gim.residual=pca")):
        for batch in batches_of(*settings).fitting(2):
            assert batch.timesteps is None
            assert batch.features[TEACHER].shape[1] == 2


def test_unlabelled_images_do_not_change_what_labelled_ones_draw():
    draw = TimestepDraw(each=2, count=4, seed=5)
    assert np.array_equal(draw.draw(7, 3), draw.draw(7, 9)[:3])
    drawn = draw.draw(0, 4000)
    assert (np.diff(drawn, axis=1) > 0).all()
    assert np.bincount(drawn.ravel()) == pytest.approx([2000] * 4, rel=0.1)


def test_as_many_as_there_are_is_all_of_them_and_more_are_refused(batches_of):
    assert batches_of("timesteps_per_step=2")[0].timesteps is None
    with pytest.raises(TrainError, match="timesteps_per_step: 3 cannot be drawn of the run's 2 timesteps"):
        batches_of("timesteps_per_step=3")
    with pytest.raises(TrainError, match=r"timesteps_per_step: .* greater than or equal to 1"):
        batches_of("timesteps_per_step=0")
