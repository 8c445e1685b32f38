"""An annotation run: boxes, captions without class names, one file, and nothing lost when it is killed."""

import gc
import io
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cache_building import some_examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_annotators import save_grounding_dino, save_qwen
from transformers import GroundingDinoForObjectDetection
from typer.testing import CliRunner

from pipeline.annotate import caption_stage, run
from pipeline.annotate.captioner import STRICTER, Captioner
from pipeline.annotate.config import AnnotateConfig
from pipeline.annotate.leaks import LeakCheck
from pipeline.annotate.models import AnnotateError
from pipeline.annotate.run import annotate
from pipeline.annotate.sheet import draw_sheet, plain
from pipeline.annotate.table import read_annotations
from pipeline.annotate.work import WorkFolder
from pipeline.cli import app
from pipeline.conditions import box_on_stored_pixels, decode_image, decode_with_box
from pipeline.datasets.folder import FolderDataset

ORIENTATION = 0x0112
CLASSES = ("Yellow Warbler", "House Wren")


def photograph(width: int, height: int, seed: int, orientation: int = 1) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of four photographs; one is turned by EXIF, one is cut short."""
    root = tmp_path_factory.mktemp("birds")
    for k, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(4):
            data = photograph(60 + 10 * i, 50, 10 * k + i, orientation=6 if (k, i) == (0, 1) else 1)
            (root / name / f"{i}.png").write_bytes(data[:200] if (k, i) == (1, 2) else data)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    return {"detector": str(save_grounding_dino(base / "dino")), "captioner": str(save_qwen(base / "qwen"))}


@pytest.fixture(scope="module")
def config(models) -> AnnotateConfig:
    return AnnotateConfig(**models, max_new_tokens=8, batch=3, save_every=3)


@pytest.fixture
def birds(folder) -> FolderDataset:
    return FolderDataset(folder, superclass="bird")


@pytest.fixture(scope="module")
def finished(folder, config, tmp_path_factory) -> tuple[Path, list[dict], list[str]]:
    """The file of a run that nothing interrupted, its rows, and what was said; not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "a.parquet"
    said: list[str] = []
    rows = annotate(FolderDataset(folder, superclass="bird"), config, output, log=said.append)
    return output, rows, said


WITHOUT_MODELS = AnnotateConfig(boxes="full", captions="dataset", batch=2, save_every=2)


# --- What is in the file -----------------------------------------------------------------------------------------


def test_every_image_has_a_box_and_a_caption_or_a_reason(birds, finished):
    output, rows, said = finished
    assert [row["id"] for row in rows] == [s.id for s in birds.samples]
    for sample, row in zip(birds.samples, rows, strict=True):
        if sample.id == "House Wren/2.png":
            assert row["box"] is None
            assert row["caption"] is None
            assert row["reason"].startswith("not a complete image")
            continue
        image, box = decode_with_box(birds.read(sample), tuple(row["box"]))
        assert 0 <= box[0] < box[2] <= image.width
        assert 0 <= box[1] < box[3] <= image.height
        assert (row["box_source"], row["caption_source"], row["leak"]) == ("detector", "vlm", "clean")
        assert 0.3 < row["box_score"] <= 1
        assert row["caption"]
    assert pq.read_table(output).to_pylist() == read_annotations(output)[0] == rows
    assert "boxes: 7 detector, 1 unreadable" in said
    assert not output.with_name("a.parquet.work").exists()


def test_the_file_says_which_models_and_settings_made_it(finished, models):
    _, metadata = read_annotations(finished[0])
    assert metadata["detector"]["source"] == models["detector"]
    assert len(metadata["captioner"]["digest"]) == 64
    assert metadata["captioner"]["dtype"] == "float32"
    assert metadata["settings"]["--box-threshold"] == 0.3
    assert "Do not name the class" in metadata["settings"]["--instruction"]
    assert metadata["counts"]["box_source"] == {"detector": 7, "unreadable": 1}
    assert metadata["versions"]["transformers"]


def test_two_runs_give_the_same_bytes_whatever_the_batch(birds, config, finished, tmp_path):
    annotate(birds, replace(config, batch=1, save_every=64), tmp_path / "b.parquet", log=str)
    assert (tmp_path / "b.parquet").read_bytes() == finished[0].read_bytes()


def test_without_a_detection_the_whole_image_is_the_box_and_the_file_says_so(birds, config, tmp_path):
    rows = annotate(birds, replace(config, box_threshold=1.0, captions="none"), tmp_path / "a.parquet", log=str)
    found = {row["id"]: (row["box"], row["box_source"], row["box_score"]) for row in rows}
    assert found["House Wren/0.png"] == ([0, 0, 60, 50], "none-found", None)


def test_boxes_of_the_data_set_are_kept_and_one_outside_the_image_has_a_reason(birds, tmp_path):
    given = {"House Wren/0.png": (5.0, 6.0, 90.0, 40.0), "House Wren/1.png": (500.0, 6.0, 600.0, 40.0)}
    birds.samples = [replace(s, box=given.get(s.id), box_source="dataset") for s in birds.samples]
    rows = {
        r["id"]: r for r in annotate(birds, AnnotateConfig(boxes="dataset", captions="none"), tmp_path / "a", log=str)
    }
    assert rows["House Wren/0.png"]["box"] == [5, 6, 60, 40]
    assert rows["House Wren/0.png"]["box_source"] == "dataset"
    assert "no pixel inside the image" in rows["House Wren/1.png"]["reason"]
    assert (rows["House Wren/3.png"]["box"], rows["House Wren/3.png"]["box_source"]) == ([0, 0, 90, 50], "full")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_on_the_stored_pixels_as_those_of_the_data_sets_are(orientation):
    data = photograph(60, 40, 0, orientation)
    image = decode_image(data)
    box = (3.0, 5.0, 20.0, 30.0)
    stored = box_on_stored_pixels(data, image, box)
    again, back = decode_with_box(data, stored)
    assert back == box
    assert again.tobytes() == image.tobytes()
    assert 0 <= stored[0] < stored[2] <= 60
    assert 0 <= stored[1] < stored[3] <= 40


def test_the_captioner_is_shown_the_detected_object(birds, config, tmp_path, monkeypatch):
    shown = []
    original = Captioner.describe
    monkeypatch.setattr(
        Captioner,
        "describe",
        lambda self, crops, text: shown.extend(c.size for c in crops) or original(self, crops, text),
    )
    rows = annotate(birds, config, tmp_path / "a.parquet", log=str)
    boxes = []
    for sample, row in zip(birds.samples, rows, strict=True):
        if row["box"]:
            _, (x0, y0, x1, y1) = decode_with_box(birds.read(sample), tuple(row["box"]))
            boxes.append((int(np.ceil(x1) - int(x0)), int(np.ceil(y1) - int(y0))))
    assert shown == boxes


def test_the_detector_is_gone_before_the_captioner_is_loaded(birds, config, tmp_path, monkeypatch):
    alive = []

    class Watched(Captioner):
        def __init__(self, *arguments):
            alive.append([type(o) for o in gc.get_objects() if isinstance(o, GroundingDinoForObjectDetection)])
            super().__init__(*arguments)

    monkeypatch.setattr(caption_stage, "Captioner", Watched)
    annotate(birds, config, tmp_path / "a.parquet", log=str)
    assert alive == [[]]


# --- Class names in captions -------------------------------------------------------------------------------------


def test_a_caption_that_names_its_class_is_asked_for_again_then_stripped_and_counted(
    birds, config, tmp_path, monkeypatch
):
    """What the model says is replaced; loading and asking are real."""
    questions = []
    answers = {
        # first answer, second answer
        "Yellow Warbler/0.png": ("a bird with a yellow breast", None),
        "Yellow Warbler/1.png": ("a yellow warbler", "a small yellow bird"),
        "Yellow Warbler/2.png": ("Warblers like this are small", "This Yellow-Warbler has a thin bill."),
        "Yellow Warbler/3.png": ("a warbler", "Yellow Warbler's"),
        "House Wren/0.png": ("a house behind", None),
        "House Wren/1.png": ("the House-wren", ""),
        "House Wren/3.png": ("it is a yellow warbler", "brown, barred"),
    }
    waiting: list[list[str]] = [[i for i in answers if i.startswith(name)] for name in ("House", "Yellow")]
    order = [i for group in waiting for i in group]
    original = Captioner.describe

    def describe(self, crops, instruction):
        real = original(self, crops, instruction)
        assert len(real) == len(crops)
        stricter = instruction.endswith(STRICTER.replace("{superclass}", "bird"))
        questions.append((stricter, len(crops)))
        source = describe.leaking if stricter else describe.left
        ids, source[:] = source[: len(crops)], source[len(crops) :]
        if not stricter:
            check = LeakCheck(CLASSES, "bird")
            describe.leaking = [i for i in ids if check.leaks(answers[i][0], i.split("/")[0])]
        return [answers[i][stricter] for i in ids]

    describe.left, describe.leaking = order, []
    monkeypatch.setattr(Captioner, "describe", describe)
    said = []
    rows = {r["id"]: r for r in annotate(birds, config, tmp_path / "a.parquet", log=said.append)}
    result = {i: (rows[i]["caption"], rows[i]["caption_source"], rows[i]["leak"]) for i in answers}
    assert result == {
        "Yellow Warbler/0.png": ("a bird with a yellow breast", "vlm", "clean"),
        "Yellow Warbler/1.png": ("a small yellow bird", "vlm", "asked-again"),
        "Yellow Warbler/2.png": ("This bird has a thin bill.", "vlm", "stripped"),
        "Yellow Warbler/3.png": ("Bird", "vlm", "stripped"),
        "House Wren/0.png": ("a house behind", "vlm", "clean"),
        "House Wren/1.png": ("a photo of a bird", "neutral", "asked-again"),
        "House Wren/3.png": ("brown, barred", "vlm", "asked-again"),
    }
    assert sum(n for stricter, n in questions if stricter) == 5
    assert "class names in captions: 3 asked-again, 2 clean, 2 stripped" in said


def test_the_data_set_s_own_captions_are_kept_and_those_that_name_a_class_are_counted(birds, tmp_path):
    texts = {"House Wren/0.png": "A wren.", "House Wren/1.png": "brown and barred", "House Wren/3.png": " "}
    birds.samples = [replace(s, caption=texts.get(s.id, "")) for s in birds.samples]
    rows = {r["id"]: r for r in annotate(birds, WITHOUT_MODELS, tmp_path / "a.parquet", log=str)}
    assert [(rows[i]["caption"], rows[i]["caption_source"], rows[i]["leak"]) for i in texts] == [
        ("A wren.", "dataset", "left"),
        ("brown and barred", "dataset", "clean"),
        (None, "none", ""),
    ]


# --- Interrupted and repeated ------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@some_examples
@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from([1, 2, 5]))
def test_a_run_stopped_anywhere_goes_on_and_ends_as_if_it_had_not_been(tmp_path_factory, folder, stops, save_every):
    birds = FolderDataset(folder, superclass="bird")
    base = tmp_path_factory.mktemp("resume")
    config = replace(WITHOUT_MODELS, save_every=save_every)
    annotate(birds, WITHOUT_MODELS, base / "whole.parquet", log=str)
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
                annotate(birds, config, base / "cut.parquet", log=str)
            except Killed:
                assert not (base / "cut.parquet").exists()
    annotate(birds, config, base / "cut.parquet", log=str)
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
from cache_schema.files import AsideFile
from pipeline.cli import main
publish, pieces = AsideFile.publish, []
def publish_or_die(self):
    pieces.append(self.path)
    if len(pieces) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(self)
AsideFile.publish = publish_or_die
main()
"""


def test_a_killed_process_loses_no_finished_batch_and_the_same_command_goes_on(
    folder, models, finished, tmp_path, monkeypatch
):
    output = tmp_path / "a.parquet"
    work = tmp_path / "a.parquet.work"
    arguments = [str(a) for a in command(folder, models, output)]
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
    monkeypatch.setattr(WorkFolder, "remove", lambda self: removed.append(self.folder))
    assert dit_cache(*arguments).exit_code == 0
    assert {p.name: p.stat().st_mtime_ns for p in work.glob("*.json") if p.name in kept} == kept
    assert removed == [work]
    assert output.read_bytes() == finished[0].read_bytes()


def test_the_same_command_again_computes_nothing(birds, config, finished, monkeypatch):
    monkeypatch.setattr(run, "_run_stage", None)
    said = []
    assert annotate(birds, config, finished[0], log=said.append) == finished[1]
    assert "annotated already, 8 images" in said[0]


def test_other_settings_are_one_clear_line_and_touch_nothing(birds, config, tmp_path, monkeypatch):
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
                annotate(birds, replace(config, **change), output, log=str)
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_annotations", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            annotate(birds, config, output, log=str)
    check()
    annotate(birds, config, output, log=str)
    check()


def test_a_batch_too_large_for_the_memory_is_one_clear_line(birds, config, tmp_path, monkeypatch):
    def describe(self, crops, instruction):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Captioner, "describe", describe)
    with pytest.raises(AnnotateError, match=r"the captions of 3 images at once do not fit .* --batch 1"):
        annotate(birds, config, tmp_path / "a.parquet", log=str)


def test_a_file_of_somebody_else_is_never_overwritten(birds, tmp_path):
    output = tmp_path / "a.parquet"
    pq.write_table(pq.read_table(io.BytesIO(_foreign())), output)
    before = output.read_bytes()
    with pytest.raises(AnnotateError, match="not a file that dit-cache annotate wrote"):
        annotate(birds, WITHOUT_MODELS, output, log=str)
    assert output.read_bytes() == before


def _foreign() -> bytes:
    import pyarrow as pa

    stream = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"]}), stream)
    return stream.getvalue()


def test_a_damaged_work_file_is_named(birds, tmp_path):
    output = tmp_path / "a.parquet"
    work = WorkFolder(output, run.describe_settings(birds, WITHOUT_MODELS, run.find_models(WITHOUT_MODELS)))
    (work.folder / "boxes-00000000-00000001.json").write_text('{"0": ')
    with pytest.raises(AnnotateError, match=r"boxes-00000000-00000001\.json: damaged .*remove this file"):
        annotate(birds, WITHOUT_MODELS, output, log=str)


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


# --- The picture sheet -------------------------------------------------------------------------------------------


def test_the_sheet_shows_box_and_caption_of_every_image_that_can_be_read(birds, config, tmp_path):
    rows = annotate(birds, replace(config, captions="none", box_threshold=1.0), tmp_path / "a.parquet", log=str)
    draw_sheet(birds, rows, 24, tmp_path / "out/sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "out/sheet.png").convert("RGB"))
    orange = (pixels == (240, 150, 0)).all(-1)
    assert orange.any(0).sum() > 5 * 200  # six boxes side by side, none of them for the broken image
    long = [{**row, "caption": "ein schöner Vogel – “σ” " * 40} for row in rows]
    draw_sheet(birds, long, 2, tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").width < pixels.shape[1]


def test_text_on_the_sheet_is_in_signs_that_the_font_has():
    assert plain("Brewer’s “bird” – schön σ…") == 'Brewer\'s "bird" - schon ?...'


def test_the_command_draws_a_sheet_of_a_finished_annotation_too(folder, tmp_path):
    arguments = [
        "annotate", "--dataset", "folder", "--data", folder, "--boxes", "full", "--captions", "none", "--device", "cpu",
        "--output", tmp_path / "a.parquet",
    ]  # fmt: skip
    assert dit_cache(*arguments).exit_code == 0
    done = dit_cache(*arguments, "--sheet", tmp_path / "sheet.png", "--sheet-images", 3)
    assert done.exit_code == 0, done.output
    assert "annotated already" in done.output
    assert Image.open(tmp_path / "sheet.png").width == 3 * 252 + 12
