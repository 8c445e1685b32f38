"""The demo path at a tiny setting, with the real commands as a user types them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

BIN = Path(sys.executable).parent
SMALL_STUDENT = ["--set", "student.depth=1", "--set", "student.embed_dim=32", "--set", "student.num_heads=2"]


def command(*arguments: str | Path, cwd: Path, expect: int = 0) -> str:
    program, *rest = map(str, arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "200"}
    done = subprocess.run([str(BIN / program), *rest], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == expect, f"{program} {rest}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if expect == 0 else done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a very small demo has been annotated, refined, built and verified, by one command."""
    folder = tmp_path_factory.mktemp("demo")
    settings = ("refine.steps=3", "refine.batch=2", "refine.validation_images=2", "build.samples_per_shard=32")
    options = [word for setting in settings for word in ("--set", setting)]
    said = command("dit-cache", "run", "--limit", "40", *options, cwd=folder)
    assert said.splitlines()[-2:] == [
        "runs/demo/cache: every file is as it was written",
        "the cache is in runs/demo/cache; next: dit-train run --cache runs/demo/cache",
    ]
    return folder


@pytest.fixture(scope="module")
def cropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with two random crops of each image beside the usual views."""
    folder = tmp_path_factory.mktemp("crops")
    command("dit-cache", "build", "--limit", "6", "--views", "canonical,hflip,crops:2", "--features", "train",
            "--timesteps", "28", "--output", "cropped", cwd=folder)  # fmt: skip
    return folder / "cropped"


def test_a_student_is_shown_the_crop_that_the_teacher_was(cropped):
    from cache_schema import open_cache
    from pipeline.datasets import open_dataset
    from pipeline.inputs.conditions import read_pixels
    from trainer.data.crops import CropViews
    from trainer.data.images import ImageStore

    cache, views = open_cache(cropped), ("crop.0", "crop.1")
    assert cache.manifest.views == ["canonical", "hflip", *views]
    dataset = open_dataset("demo", None, 6)
    samples = {sample.id: sample for sample in dataset.samples}
    for row, picture in zip(cache.feature_rows, ImageStore(cache, 96, cache.feature_rows).pictures(cache.feature_rows),
                            strict=True):  # fmt: skip
        shown = read_pixels(dataset, [samples[cache.samples["id"][row].as_py()]], 96, views)
        for number, view in enumerate(views):
            part, _ = CropViews(cache, views).part(picture, row, number)
            resized = np.asarray(Image.fromarray(part).resize((96, 96), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
            ours, other = (
                np.abs(resized - shown[name].object[0].numpy().astype(float)).mean()
                for name in (view, views[not number])
            )
            assert ours < other / 2


def test_a_run_learns_from_crops_by_regression_of_the_map(cropped):
    said = command("dit-train", "run", "--cache", cropped, "--method", "regression", "--updates", "2",
                   "--output", "by-crops", *SMALL_STUDENT, cwd=cropped.parent)  # fmt: skip
    assert "the student is in by-crops" in said


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    for mode in ("baseline", "distill"):
        command("dit-train", "run", "--mode", mode, "--updates", "3", *SMALL_STUDENT, cwd=work)
        command("dit-train", "eval", f"runs/demo/{mode}", cwd=work)
    return work


def test_refine_build_train_eval_and_report_end_in_a_summary_of_both_students(trained):
    said = command("dit-train", "report", "runs/demo/baseline", "runs/demo/distill", "--output", "runs/demo",
                   "--started", "0", cwd=trained)  # fmt: skip
    summary = json.loads((trained / "runs/demo/summary.json").read_text())
    manifest = json.loads((trained / "runs/demo/cache/manifest.json").read_text())
    assert summary["cache_id"] == manifest["cache_id"]
    assert summary["seconds"] > 0
    for mode in ("baseline", "distill"):
        recalls = [summary[mode][f"recall_at_{k}"] for k in (1, 2, 4, 8)]
        assert recalls == sorted(recalls)
        assert all(0 <= r <= 1 for r in [*recalls, summary[mode]["map_at_r"]])
        assert summary[mode]["student_updates"] == 3
    assert "report.html" in said
    assert (trained / "runs/demo/report.html").stat().st_size > 10_000


def test_the_teacher_is_evaluated_as_an_auxiliary_where_test_features_are_cached(trained):
    scores = json.loads((trained / "runs/demo/distill/eval.json").read_text())
    assert "auxiliary" in scores


def test_the_demos_last_search_is_for_an_image_of_an_unseen_class(work):
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    named = re.search(r"^DEMO_QUERY := (\S+)$", makefile, flags=re.M)
    assert named
    samples = pq.read_table(work / "runs/demo/cache/samples.parquet", columns=["id", "split"]).to_pylist()
    assert {"id": named[1], "split": "test"} in samples


def test_the_cache_says_what_it_is_and_verifies(work):
    assert "demo" in command("dit-cache", "info", "runs/demo/cache", cwd=work)
    described = json.loads(command("dit-cache", "info", "runs/demo/cache", "--json", cwd=work))
    assert described
    assert "every file is as it was written" in command("dit-cache", "verify", "runs/demo/cache", cwd=work)


def test_the_cache_converts_to_tars_and_back_and_can_be_asked_to_twice(work):
    for _ in range(2):
        said = command("dit-cache", "convert", "runs/demo/cache", "tars", "--store", "webdataset", cwd=work)
        assert "sealed tars" in said
    command("dit-cache", "convert", "tars", "back", "--store", "zarr", "--compression", "zstd", cwd=work)
    for copy in ("tars", "back"):
        assert "every file is as it was written" in command("dit-cache", "verify", copy, cwd=work)
    described = json.loads(command("dit-cache", "info", "back", "--json", cwd=work))["manifest"]
    assert described["encoding"]["compression"] == "zstd"
    assert described["cache_id"] == json.loads((work / "runs/demo/cache/manifest.json").read_text())["cache_id"]


def test_building_the_finished_cache_again_computes_nothing(work):
    said = command("dit-cache", "build", "--limit", "40", "--lora", "runs/demo/lora", cwd=work)
    assert "0 feature shards to compute" in said


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["dit-cache", "build", "--dataset", "cars", "--data", "nowhere"], 1, "looked in nowhere"),
        (["dit-cache", "build", "--dataset", "dragons"], 1, "unknown data set 'dragons'"),
        (["dit-cache", "build", "--limit", "2", "--teacher", "nowhere"], 1, "teacher nowhere: no such folder"),
        (["dit-cache", "build", "--limit", "2", "--teacher", "runs"], 1, "no model_index.json"),
        (["dit-cache", "build", "--limit", "2", "--taps", "double.99", "--output", "x"], 1, "no tap 'double.99'"),
        (
            ["dit-cache", "build", "--limit", "2", "--device", "toaster"],
            1,
            "device 'toaster': no such device; use auto, cpu",
        ),
        (["dit-cache", "build", "--limit", "2", "--output", "runs/demo/cache"], 1, "choose another directory"),
        (["dit-cache", "build", "--timesteps", "ten"], 2, "--timesteps"),
        (["dit-cache", "build", "--encoding", "int3"], 2, "int3"),
        (["dit-cache", "verify", "nowhere"], 1, "nowhere"),
        (["dit-cache", "convert", "nowhere", "x", "--store", "zarr"], 1, "nowhere"),
        (
            ["dit-cache", "convert", "runs/demo/cache", "x", "--store", "webdataset", "--compression", "zstd"],
            1,
            "a webdataset store is not compressed",
        ),
        (["dit-cache", "convert", "runs/demo/cache", "runs/demo/cache", "--store", "zarr"], 1, "convert itself"),
        (["dit-cache", "convert", "runs/demo/cache", "x"], 2, "--store"),
        (["dit-cache", "info", "nowhere"], 1, "nowhere"),
        (["dit-train", "run", "--cache", "nowhere"], 1, "nowhere"),
        (["dit-train", "eval", "nowhere"], 1, "nowhere"),
    ],
)
def test_bad_input_gets_one_clear_line(work, arguments, code, complaint):
    said = command(*arguments, cwd=work, expect=code)
    assert "Traceback" not in said
    assert complaint in said
    if code == 1:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1


def test_debug_shows_the_traceback(work):
    assert "Traceback" in command("dit-cache", "verify", "nowhere", "--debug", cwd=work, expect=1)
