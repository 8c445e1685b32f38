"""What a control reads in the place of features: pixels of the object, words of the caption."""

import io

import numpy as np
import pytest
from PIL import Image

from cache_schema import open_cache
from cache_schema.errors import DitDistillError
from trainer.data.batches import TrainingBatches
from trainer.errors import TrainError
from trainer.methods.registry import find_method
from trainer.reports.ablation_plan import (
    check_other_caches,
    choose_variants,
    left_out,
    make_cells,
    read_sweep,
    target_folders,
)
from trainer.reports.ablation_run import run_cells
from trainer.reports.control_targets import SIDE, check_target, make_target, vocabulary

COLOURS = ("red", "green", "blue")


def described(split, label, index):
    """A box in the left half, and words that say the colour and, of every second image, that it is small."""
    size = " and small" if index % 2 else ""
    return {"caption": f"A {COLOURS[label % 3]} thing{size}.", "box": [0, 0, 12, 24], "box_source": "dataset"}


@pytest.fixture(scope="module")
def told(tmp_path_factory, build_tiny):
    """A cache with captions and boxes."""
    return build_tiny(tmp_path_factory.mktemp("told") / "cache", about=described)


@pytest.fixture(scope="module")
def targets(told, tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    for kind in ("pixels", "words"):
        make_target(told, kind, folder / kind)
    return {kind: open_cache(folder / kind) for kind in ("pixels", "words")}


def test_pixels_are_the_objects_crop_in_patches_on_the_teachers_grid(told, targets):
    cache, row = targets["pixels"], 3
    tokens = cache.read([row], tap="pixels", timesteps=[1], view="canonical").decode().numpy()[0, 0]
    own = told.samples["id"].to_pylist().index(cache.samples["id"][row].as_py())
    image = Image.open(io.BytesIO(told.images([own])[0])).convert("RGB")
    patch = SIDE // 4
    crop = np.asarray(image.resize((4 * patch, patch), Image.Resampling.BICUBIC, box=(0, 0, 12, 24))) / 127.5 - 1
    for place in range(4):
        expected = crop[:, place * patch : (place + 1) * patch].reshape(-1)
        np.testing.assert_allclose(tokens[place], expected, atol=2e-3)


def test_a_mirrored_view_has_mirrored_pixels_and_the_same_words(targets):
    def read(kind, view):
        return targets[kind].read([0], tap=kind, timesteps=[1], view=view).decode().numpy()[0, 0]

    mirrored = read("pixels", "hflip").reshape(4, 24, 24, 3)
    np.testing.assert_array_equal(mirrored[::-1, :, ::-1].reshape(4, -1), read("pixels", "canonical"))
    np.testing.assert_array_equal(read("words", "hflip"), read("words", "canonical"))


def test_words_are_those_that_some_captions_have_and_others_lack(told, targets):
    assert set(vocabulary(told)) == {"red", "green", "blue", "small", "and"}
    cache, words = targets["words"], vocabulary(told)
    captions = cache.samples["caption"].to_pylist()
    bags = cache.read(range(len(captions)), tap="words", timesteps=[1], view="canonical").decode().numpy()[:, 0, 0]
    for caption, bag in zip(captions, bags, strict=True):
        assert {word for word, there in zip(words, bag, strict=True) if there} == {w for w in words if w in caption}


@pytest.mark.parametrize(
    ("caption", "said"), [("", "it has no captions"), ("A photo of a thing.", "all of them read 'A photo of a thing.'")]
)
def test_captions_that_tell_nothing_are_refused_in_a_line(make_cache, caption, said):
    cache = make_cache(per_class=1, about=lambda *_: {"caption": caption})
    with pytest.raises(TrainError, match=said):
        check_target(cache, "words")
    with pytest.raises(TrainError, match="variants: caption-words needs captions that tell images apart"):
        choose_variants(cache, ["caption-words"], [], None)
    assert "caption-words" not in {variant.name for variant in choose_variants(cache, [], [], None)}
    assert any(said in reason for reason in left_out(cache))


def test_a_control_reads_its_target_and_the_images_of_the_ablations_cache(told, tmp_path, tiny_settings):
    variants = choose_variants(told, ["crop-pixels", "caption-words", "pixels-by-gim"], [], None)
    folders = target_folders(told, variants, tmp_path)
    settings = [*tiny_settings[1::2], "tap=hidden", "timesteps=10,22"]  # of the other runs
    cells = make_cells(str(told.root), variants, 1, "small", settings, folders)
    elsewhere = make_cells("moved", variants, 1, "small", settings, target_folders(told, variants, tmp_path / "moved"))
    assert [cell.name for cell in cells] == [cell.name for cell in elsewhere]
    for kind, folder in folders.items():
        make_target(told, kind, folder)
    for cell, kind in zip(cells[1:], ("pixels", "words", "pixels"), strict=True):
        batches = TrainingBatches(told, cell.config, 24, find_method(cell.config.method).needs(cell.config))
        assert batches.sources["teacher"].tap == kind
        assert batches[0].images.any()


def test_the_gim_reads_another_caches_features_beside_the_images_of_the_ablations_cache(
    told, targets, tmp_path, tiny_settings
):
    other = f"pixels-again={targets['pixels'].root}"
    variants = choose_variants(told, ["gcd"], [], None, others=[other])
    assert [variant.name for variant in variants] == ["baseline", "gcd", "pixels-again"]
    cells = make_cells(str(told.root), variants, 1, "small", tiny_settings[1::2])
    scores = next(run_cells(cells[2:], tmp_path, "test", 1)).scores
    assert scores["auxiliary"]["masked"].keys() == {"mean", "1"}  # E_D, of the one timestep that the other cache has
    for wrong in ("pixels", "=there", "gcd=there"):
        with pytest.raises(TrainError, match="other-features: write NAME=CACHE"):
            choose_variants(told, ["gcd"], [], None, others=[wrong])


def test_another_cache_that_is_not_there_or_of_other_images_is_refused_before_the_first_run(told, make_cache, tmp_path):
    strangers, fewer = make_cache("strangers", content="other").root, make_cache("fewer", per_class=3).root
    for place, reason in ((tmp_path / "nowhere", "nowhere"), (strangers, "another image"), (fewer, "lacks .* images")):
        chosen = choose_variants(told, ["gcd"], [], str(place))
        with pytest.raises(DitDistillError, match=reason):
            check_other_caches(told, make_cells(str(told.root), chosen, 1, "small", []))
    for place, reason in ((tmp_path / "nowhere", "nowhere"), (strangers, "another image")):
        chosen = choose_variants(told, ["gcd"], [], None, others=[f"theirs={place}"])
        with pytest.raises(DitDistillError, match=reason):
            check_other_caches(told, make_cells(str(told.root), chosen, 1, "small", []))


def test_rows_two_and_three_go_by_how_the_teacher_was_made(told, make_cache):
    chosen = {v.name: v for v in choose_variants(told, ["auxiliary", "gcd"], [], None, "before")}
    assert list(chosen) == ["baseline", "auxiliary-unrefined", "auxiliary", "gcd"]
    assert chosen["auxiliary-unrefined"].cache == "before"
    assert "row ②" in chosen["auxiliary"].about  # the synthetic teacher has no LoRA
    bare = make_cache(feature_splits=("train", "unlabeled"))
    with pytest.raises(TrainError, match="auxiliary reads the features of test images, and the cache has none"):
        choose_variants(bare, ["auxiliary"], [], None)
    assert "auxiliary" in {v.name for v in choose_variants(bare, [], [], None, split="validation")}


def test_sweeps_of_the_paper_go_by_what_the_cache_has(told):
    assert [v.name for v in read_sweep("stages", told)] == ["timesteps=22", "timesteps=10,22"]
    assert [v.name for v in read_sweep("tap", told)] == ["tap=hidden"]
    assert [v.settings for v in read_sweep("n", told)] == [(f"gim.bridge_layers={n}",) for n in (0, 1, 3, 6)]
