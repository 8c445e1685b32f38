"""A folder of images is scored as a cache of the same images is, and not where the score would mean something else."""

import json
import shutil

import pytest
import torch

from trainer.errors import TrainError
from trainer.evaluation.evaluate import evaluate_run
from trainer.evaluation.folder import open_folder_split
from trainer.retrieval.model import open_model


@pytest.mark.parametrize("student", ["first", "exported"])
def test_a_folder_scores_what_a_cache_of_its_images_scores(here, students, pictures, cache, student):
    expected = evaluate_run(students["first"], cache, torch.device("cpu"))[0]
    code, said, _ = here("eval", students[student], "--data", pictures, "--json")
    assert code == 0
    found = json.loads(said)
    assert found["data"] == str(pictures)
    assert (found["queries"], found["classes"]) == (10, 2)
    assert found["student"] == pytest.approx(expected["student"])
    assert [line["class"] for line in sorted(found["per_class"], key=lambda line: line["class"])] == [
        "class 10",
        "class 11",
    ]


def test_runs_are_held_against_each_other_on_a_folder_and_their_own_scores_stay(here, students, pictures, tmp_path):
    run = shutil.copytree(students["first"], tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    code, said, _ = here("eval", students["second"], run, "--data", pictures)
    assert code == 0
    assert f"10 queries of 2 classes of {pictures}, percent" in said
    assert f"from {students['second']}" in said
    assert sorted(path.name for path in run.iterdir()) == before


def test_an_export_is_evaluated_on_a_cache_that_is_named(here, students, cache_path):
    assert "give --cache" in here("eval", students["exported"])[2]
    code, said, _ = here("eval", students["exported"], "--cache", cache_path, "--json")
    assert code == 0
    assert json.loads(said)["queries"] == 10
    assert not (students["exported"] / "eval.json").exists()


def test_a_folder_that_cannot_be_scored_says_why(students, pictures, tmp_path):
    prepare = open_model(students["first"]).prepare
    good = next(pictures.rglob("test-*.png")).read_bytes()

    def split_of(*names):
        root = tmp_path / "data"
        shutil.rmtree(root, ignore_errors=True)
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(good)
        return open_folder_split(root, prepare)

    with pytest.raises(TrainError, match=r"has the parts test, train: give one of them"):
        split_of("train/owl/a.png", "test/crow/a.png")
    with pytest.raises(TrainError, match=r"a\.png has no class"):
        split_of("a.png", "owl/a.png")
    with pytest.raises(TrainError, match="only one class, owl"):
        split_of("owl/a.png", "owl/b.png")
    split = split_of("owl/a.png", "crow/a.png", "owl/b.png")
    assert (split.ids, split.labels.tolist()) == (["crow/a.png", "owl/a.png", "owl/b.png"], [0, 1, 1])
    (tmp_path / "data" / "owl" / "b.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(TrainError, match=r"owl/b\.png: not a whole image.*a score is of all images"):
        split.images.load([0, 2])


def test_a_folder_takes_the_place_of_a_cache(here, students, pictures, cache_path):
    code, _, said = here("eval", students["first"], "--data", pictures, "--cache", cache_path)
    assert (code, said) == (1, "error: --data names the images to score; give no --cache and no --split with it\n")
