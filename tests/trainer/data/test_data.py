import multiprocessing

import pytest
import torch

from cache_schema.errors import DitDistillError
from trainer.data.batch import Batch
from trainer.data.batches import TrainingBatches, iterate
from trainer.data.features import choose_timesteps, choose_views, tap_info
from trainer.data.images import ImageStore
from trainer.data.splits import select_split
from trainer.errors import TrainError
from trainer.methods.reading import TEACHER
from trainer.methods.registry import find_method

SIZE, ROW, VIEW, TIMESTEP = 24, 0, 1, 2  # the synthetic features say their row, view and timestep in channels 0 to 2


def batches_of(cache, config) -> TrainingBatches:
    return TrainingBatches(cache, config, SIZE, find_method(config.method).needs(config))


def same(a: Batch, b: Batch) -> bool:
    a, b = a.to(torch.device("cpu")), b.to(torch.device("cpu"))
    pairs = ((a.images, b.images), (a.labels, b.labels), (a.features[TEACHER], b.features[TEACHER]))
    return all(torch.equal(x, y) for x, y in pairs)


def test_images_and_features_of_a_batch_are_of_the_same_rows_in_the_same_view(cache, tiny_config):
    batches = batches_of(cache, tiny_config())
    canonical = ImageStore(cache, SIZE, range(len(cache)))
    seen = set()
    for update in range(batches.per_epoch * 3):
        batch = batches[update].to(torch.device("cpu"))
        for image, label, tokens in zip(batch.images, batch.labels, batch.features[TEACHER], strict=True):
            row, view = int(tokens[0, 0, ROW]), int(tokens[0, 0, VIEW])
            stored = canonical.load([row])[0]
            assert torch.equal(image, stored.flip(-1) if view else stored)
            assert int(label) == batches.label_of[row]
            seen.add(view)
    assert seen == {0, 1}


def test_only_the_timesteps_asked_for_are_read(cache, tiny_config):
    tokens = batches_of(cache, tiny_config("timesteps=22"))[0].to(torch.device("cpu")).features[TEACHER]
    assert tokens.shape == (6, 1, 4, 6)
    assert tokens[..., TIMESTEP].unique().tolist() == [22]


def test_the_baseline_sees_the_very_images_of_the_distilled_run_and_no_features(cache, tiny_config):
    for extra in ((), ("unlabeled_per_batch=2",)):
        baseline = batches_of(cache, tiny_config(mode="baseline"))
        distill = batches_of(cache, tiny_config(*extra, mode="distill"))
        for update in range(4):
            a, b = baseline[update], distill[update]
            assert not a.encoded
            assert torch.equal(a.images, b.images[:6])
            assert torch.equal(a.labels, b.labels[:6])


def test_unlabelled_rows_that_are_not_there_are_missed_by_the_names_that_the_method_has_for_them(
    make_cache, tiny_config
):
    cache = make_cache(classes={"train": (0, 1), "test": (10,)})
    for mode, names in (
        ("distill", ("unlabeled_per_batch", "unlabeled_from")),
        ("baseline", ("unlabelled.per_batch", "unlabelled.images_from")),
    ):
        config = tiny_config(f"{names[0]}=2", mode=mode)
        with pytest.raises(TrainError, match=f"no unlabeled rows .*set {names[0]}=0, or {names[1]}=train"):
            TrainingBatches(cache, config, 24, find_method(config.method).needs(config))


def test_unlabelled_rows_come_after_the_labelled_ones_with_features_and_no_label(cache, tiny_config):
    batch = batches_of(cache, tiny_config("unlabeled_per_batch=2"))[0].to(torch.device("cpu"))
    assert batch.images.shape[0] == batch.features[TEACHER].shape[0] == 8
    assert (batch.labels[:6] >= 0).all()
    assert batch.labels[6:].tolist() == [-1, -1]
    splits = cache.samples["split"].to_pylist()
    assert {splits[int(row)] for row in batch.features[TEACHER][6:, 0, 0, ROW]} == {"unlabeled"}


def test_labels_of_the_train_split_become_0_to_m_minus_1(cache):
    test = select_split(cache, "test", need_features=False)
    assert (len(test.rows), test.classes, sorted(set(test.labels.tolist()))) == (10, 2, [0, 1])


def test_any_part_of_a_run_can_be_loaded_alone_by_a_thread_or_by_worker_processes(cache, tiny_config):
    batches = batches_of(cache, tiny_config("augment.color=0.3"))
    expected = [batches[update] for update in range(5)]
    for workers in (0, 2):
        for start in (0, 3):
            loaded = list(iterate(batches, start, 5, workers))
            assert len(loaded) == 5 - start
            assert all(same(a, b) for a, b in zip(loaded, expected[start:], strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_cache_reaches_the_caller_as_it_is(make_cache, tiny_config, workers):
    cache = make_cache()
    batches = batches_of(cache, tiny_config())
    for file in (cache.root / "features" / "hidden" / "c").rglob("0"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(DitDistillError) as caught:
        list(iterate(batches, 0, 2, workers))
    assert "Traceback" not in str(caught.value)


def test_a_killed_loader_process_is_an_error_in_one_line(cache, tiny_config):
    stream = iterate(batches_of(cache, tiny_config()), 0, 10_000, workers=2)
    next(stream)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(DitDistillError, match="a worker process of the loader was killed"):
        list(stream)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda cache: choose_timesteps(cache, (10, 16)), r"cache tiny-\w{8} lacks timestep 16 \(has 10, 22\)"),
        (lambda cache: choose_views(cache, ("crop.0",)), r"lacks view crop.0 \(has canonical, hflip\)"),
        (lambda cache: tap_info(cache, "velocity"), r"lacks tap velocity \(has hidden\)"),
    ],
)
def test_what_a_cache_lacks_is_said_with_what_it_has(cache, ask, message):
    with pytest.raises(TrainError, match=message):
        ask(cache)


def test_a_cache_without_unlabelled_features_says_so(make_cache, tiny_config):
    cache = make_cache(feature_splits=("train",))
    with pytest.raises(TrainError, match="no unlabeled rows with features"):
        batches_of(cache, tiny_config("unlabeled_per_batch=2"))


def test_rows_without_features_are_kept_out_only_where_features_are_needed(make_cache):
    cache = make_cache(feature_splits=("train",))
    assert len(select_split(cache, "test", need_features=False).rows) == 10
    assert len(select_split(cache, "test", need_features=True).rows) == 0


@pytest.mark.parametrize("wanted", ["train", "both"])
def test_training_images_come_again_without_their_label_in_another_view(cache, tiny_config, wanted):
    batches = batches_of(cache, tiny_config("unlabeled_per_batch=9", f"unlabeled_from={wanted}"))
    splits, met, met_twice = cache.samples["split"].to_pylist(), set(), 0
    for update in range(6):
        batch = batches[update].to(torch.device("cpu"))
        pairs = [(int(row), int(view)) for row, view in batch.features[TEACHER][:, 0, 0, [ROW, VIEW]]]
        assert (batch.labels[:6] >= 0).all()
        assert (batch.labels[6:] == -1).all()
        met_twice += len({row for row, _ in pairs[:6]} & {row for row, _ in pairs[6:]})
        assert not set(pairs[:6]) & set(pairs[6:])
        met |= {splits[row] for row, _ in pairs[6:]}
    assert met == ({"train"} if wanted == "train" else {"train", "unlabeled"})
    assert met_twice
    again = batches_of(cache, tiny_config("unlabeled_per_batch=9", f"unlabeled_from={wanted}"))
    assert same(again[4], batches[4])


def test_the_baseline_may_use_the_same_images_without_their_labels(cache, tiny_config):
    config = tiny_config("unlabelled.per_batch=9", "unlabelled.images_from=train", "augment.flip=true", mode="baseline")
    batches = batches_of(cache, config)
    assert set(batches.unlabelled.rows.tolist()) == set(batches.labelled.rows.tolist())
    assert batches.batch_rows == 15


def test_held_out_classes_are_no_unlabelled_images(wide_cache, tiny_config):
    batches = batches_of(wide_cache, tiny_config("unlabeled_per_batch=3", "unlabeled_from=both",
                                                 "validation_classes=0.4"))  # fmt: skip
    assert not set(batches.unlabelled.rows.tolist()) & set(batches.validation.rows.tolist())


@pytest.mark.parametrize("flip", ["true", "false"])
def test_a_mean_over_views_needs_features_of_another_one(make_cache, tiny_config, flip):
    cache = make_cache(views=("canonical",))  # whose mirrored images have the same features
    with pytest.raises(TrainError, match="has one view to train on, canonical: there is no other to take a mean with"):
        batches_of(cache, tiny_config("loss.target_views=mean", f"augment.flip={flip}"))


def test_training_images_without_another_view_are_refused(make_cache, tiny_config):
    cache = make_cache(views=("canonical",))
    with pytest.raises(TrainError, match="need another view: build the cache with --views canonical,hflip"):
        batches_of(cache, tiny_config("unlabeled_per_batch=2", "unlabeled_from=train"))
