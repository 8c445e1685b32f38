"""An annotation that is killed, repeated or asked for with other settings loses nothing and mixes nothing."""

import signal
import subprocess
import sys
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache_building import some_examples
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline.annotate import run
from pipeline.annotate.captioner import Captioner
from pipeline.annotate.config import AnnotateConfig
from pipeline.annotate.models import AnnotateError
from pipeline.annotate.run import annotate
from pipeline.annotate.work import WorkFolder
from pipeline.cli import app
from pipeline.datasets.folder import FolderDataset

WITHOUT_MODELS = AnnotateConfig(boxes="full", captions="dataset", batch=2, save_every=2)


class Killed(BaseException):
    pass


@some_examples
@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from([1, 2, 5]))
def test_a_run_stopped_anywhere_goes_on_and_ends_as_if_never_stopped(tmp_path_factory, bird_folder, stops, save_every):
    bird_set = FolderDataset(bird_folder, superclass="bird")
    base = tmp_path_factory.mktemp("resume")
    config = replace(WITHOUT_MODELS, save_every=save_every)
    annotate(bird_set, WITHOUT_MODELS, base / "whole.parquet", log=str)
    with pytest.MonkeyPatch.context() as patch:
        original = WorkFolder.save
        for stop in stops:
            left = [stop]

            def save(self, stage, rows, left=left):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                original(self, stage, rows)

            patch.setattr(WorkFolder, "save", save)
            try:
                annotate(bird_set, config, base / "cut.parquet", log=str)
            except Killed:
                assert not (base / "cut.parquet").exists()
    annotate(bird_set, config, base / "cut.parquet", log=str)
    assert (base / "cut.parquet").read_bytes() == (base / "whole.parquet").read_bytes()
    assert sorted(p.name for p in base.iterdir()) == ["cut.parquet", "whole.parquet"]


def command(folder, models, output, *more):
    return [
        "annotate", "--dataset", "folder", "--data", folder, "--superclass", "bird", "--detector", models["detector"],
        "--captioner", models["captioner"], "--max-new-tokens", "8", "--batch", "1", "--save-every", "1",
        "--device", "cpu", "--output", output, *more,
    ]  # fmt: skip


def dit_cache(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300", "TERM": "dumb"})


# Settings, eight boxes and two captions are saved; the third caption's file is complete but not in place yet.
KILLED_WHILE_SAVING = """
import os, signal, sys
from cache_schema.storage.files import AsideFile
from pipeline.cli import main
publish, pieces = AsideFile.publish, []
def publish_or_die(self, *arguments):
    pieces.append(self.path)
    if len(pieces) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(self, *arguments)
AsideFile.publish = publish_or_die
main()
"""


def test_a_killed_process_loses_no_finished_batch_and_the_same_command_goes_on(
    bird_folder, annotators, finished_annotation, tmp_path, monkeypatch
):
    output = tmp_path / "a.parquet"
    work = tmp_path / "a.parquet.work"
    arguments = [str(a) for a in command(bird_folder, annotators, output)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, *arguments], stderr=subprocess.DEVNULL, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not output.exists()
    kept = {p.name: p.stat().st_mtime_ns for p in work.glob("*.json")}
    assert len(kept) == 11  # settings, 8 boxes, 2 captions

    def no_detector(*_):
        raise AssertionError("every box is there already")

    monkeypatch.setattr("pipeline.annotate.box_stage.Detector", no_detector)
    removed = []
    monkeypatch.setattr(run, "remove_work", removed.append)
    assert dit_cache(*arguments).exit_code == 0
    assert {p.name: p.stat().st_mtime_ns for p in work.glob("*.json") if p.name in kept} == kept
    assert removed == [output]
    assert output.read_bytes() == finished_annotation[0].read_bytes()


def test_the_same_command_again_computes_nothing(bird_set, annotate_config, finished_annotation, monkeypatch):
    monkeypatch.setattr(run, "_run_stage", None)
    said = []
    assert annotate(bird_set, annotate_config, finished_annotation[0], log=said.append) == finished_annotation[1]
    assert "annotated already, 8 images" in said[0]


def test_other_settings_are_one_clear_line_and_touch_nothing(bird_set, annotate_config, tmp_path, monkeypatch):
    output = tmp_path / "a.parquet"
    changes = {
        "--box-threshold was 0.3, now it is 0.5": {"box_threshold": 0.5},
        "--captions was vlm, now it is none": {"captions": "none"},
        "now it is Say something.": {"instruction": "Say something."},
        "--max-new-tokens was 8, now it is 9": {"max_new_tokens": 9},
    }

    def check():
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        for said, change in changes.items():
            with pytest.raises(AnnotateError) as caught:
                annotate(bird_set, replace(annotate_config, **change), output, log=str)
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_annotations", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            annotate(bird_set, annotate_config, output, log=str)
    check()
    annotate(bird_set, annotate_config, output, log=str)
    check()


def test_a_batch_too_large_for_the_memory_is_one_clear_line(bird_set, annotate_config, tmp_path, monkeypatch):
    def describe(self, crops, instruction):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Captioner, "describe", describe)
    with pytest.raises(AnnotateError, match=r"the captions of 3 images at once do not fit .* --batch 1"):
        annotate(bird_set, annotate_config, tmp_path / "a.parquet", log=str)


def test_a_file_of_somebody_else_is_never_overwritten(bird_set, tmp_path):
    output = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": ["a"]}), output)
    before = output.read_bytes()
    with pytest.raises(AnnotateError, match="not a file that dit-cache annotate wrote"):
        annotate(bird_set, WITHOUT_MODELS, output, log=str)
    assert output.read_bytes() == before


def test_a_damaged_work_file_is_named(bird_set, tmp_path):
    output = tmp_path / "a.parquet"
    work = WorkFolder(output, run.describe_settings(bird_set, WITHOUT_MODELS, run.find_models(WITHOUT_MODELS)))
    (work.folder / "boxes-00000000-00000001.json").write_text('{"0": ')
    with pytest.raises(AnnotateError, match=r"boxes-00000000-00000001\.json: damaged .*remove this file"):
        annotate(bird_set, WITHOUT_MODELS, output, log=str)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"batch": 0}, "--batch must be at least 1"),
        ({"box_threshold": 1.5}, "--box-threshold must lie from 0 to 1"),
        ({"padding": float("nan")}, "--padding must lie from 0 to 1"),
        ({"instruction": " "}, "--instruction is empty"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(bad, said):
    with pytest.raises(AnnotateError, match=said):
        AnnotateConfig(**bad)
