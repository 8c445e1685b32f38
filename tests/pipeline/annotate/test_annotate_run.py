"""An annotation run: boxes, captions without class names, one file, and a picture sheet to look at."""

import gc
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_annotators import BIRD_CLASSES, photograph
from transformers import GroundingDinoForObjectDetection
from typer.testing import CliRunner

from pipeline.annotate import caption_stage
from pipeline.annotate.captioner import STRICTER, Captioner
from pipeline.annotate.config import AnnotateConfig, AnnotateError
from pipeline.annotate.leaks import LeakCheck
from pipeline.annotate.run import annotate
from pipeline.annotate.sheet import draw_sheet, plain
from pipeline.annotate.table import read_annotations
from pipeline.cli import app
from pipeline.inputs.decoding import box_on_stored_pixels, decode_image, decode_with_box

WITHOUT_MODELS = AnnotateConfig(boxes="full", captions="dataset", batch=2, save_every=2)


# --- What is in the file -----------------------------------------------------------------------------------------


def test_every_image_has_a_box_and_a_caption_or_a_reason(bird_set, finished_annotation):
    output, rows, said = finished_annotation
    assert [row["id"] for row in rows] == [s.id for s in bird_set.samples]
    for sample, row in zip(bird_set.samples, rows, strict=True):
        if sample.id == "House Wren/2.png":
            assert row["box"] is None
            assert row["caption"] is None
            assert row["reason"].startswith("not a complete image")
            continue
        image, box = decode_with_box(bird_set.read(sample), tuple(row["box"]))
        assert 0 <= box[0] < box[2] <= image.width
        assert 0 <= box[1] < box[3] <= image.height
        assert (row["box_source"], row["caption_source"], row["leak"]) == ("detector", "vlm", "clean")
        assert 0.3 < row["box_score"] <= 1
        assert row["caption"]
    assert pq.read_table(output).to_pylist() == read_annotations(output)[0] == rows
    assert "boxes: 7 detector, 1 unreadable" in said
    assert not output.with_name("a.parquet.work").exists()


def test_the_file_says_which_models_and_settings_made_it(finished_annotation, annotators):
    _, metadata = read_annotations(finished_annotation[0])
    assert metadata["detector"]["source"] == annotators["detector"]
    assert len(metadata["captioner"]["digest"]) == 64
    assert metadata["captioner"]["dtype"] == "float32"
    assert metadata["settings"]["--box-threshold"] == 0.3
    assert "Do not name the class" in metadata["settings"]["--instruction"]
    assert metadata["counts"]["box_source"] == {"detector": 7, "unreadable": 1}
    assert metadata["versions"]["transformers"]


def test_two_runs_give_the_same_bytes_whatever_the_batch(bird_set, annotate_config, finished_annotation, tmp_path):
    annotate(bird_set, replace(annotate_config, batch=1, save_every=64), tmp_path / "b.parquet", log=str)
    assert (tmp_path / "b.parquet").read_bytes() == finished_annotation[0].read_bytes()


def test_without_a_detection_the_whole_image_is_the_box_and_the_file_says_so(bird_set, annotate_config, tmp_path):
    rows = annotate(
        bird_set, replace(annotate_config, box_threshold=1.0, captions="none"), tmp_path / "a.parquet", log=str
    )
    found = {row["id"]: (row["box"], row["box_source"], row["box_score"]) for row in rows}
    assert found["House Wren/0.png"] == ([0, 0, 60, 50], "none-found", None)


def test_boxes_of_the_data_set_are_kept_and_one_outside_the_image_has_a_reason(bird_set, tmp_path):
    given = {"House Wren/0.png": (5.0, 6.0, 90.0, 40.0), "House Wren/1.png": (500.0, 6.0, 600.0, 40.0)}
    bird_set.samples = [replace(s, box=given.get(s.id), box_source="dataset") for s in bird_set.samples]
    rows = {
        r["id"]: r
        for r in annotate(
            bird_set, AnnotateConfig(boxes="dataset", captions="none", padding=0), tmp_path / "a", log=str
        )
    }
    assert rows["House Wren/0.png"]["box"] == [5, 6, 60, 40]
    assert rows["House Wren/0.png"]["box_source"] == "dataset"
    assert "no pixel inside the image" in rows["House Wren/1.png"]["reason"]
    assert (rows["House Wren/3.png"]["box"], rows["House Wren/3.png"]["box_source"]) == ([0, 0, 90, 50], "full")


def test_boxes_of_the_data_set_are_padded_as_detected_ones_are(bird_set, tmp_path):
    bird_set.samples = [replace(s, box=(10.0, 10.0, 30.0, 20.0), box_source="dataset") for s in bird_set.samples]
    config = AnnotateConfig(boxes="dataset", captions="none", padding=0.1)
    rows = annotate(bird_set, config, tmp_path / "a", log=str)
    assert [8.0, 9.0, 32.0, 21.0] in [row["box"] for row in rows]
    with pytest.raises(AnnotateError, match="--padding"):
        annotate(bird_set, replace(config, padding=0.2), tmp_path / "a", log=str)
    rows = annotate(bird_set, AnnotateConfig(boxes="dataset", captions="none"), tmp_path / "b", log=str)
    assert [9.0, 9.5, 31.0, 20.5] in [row["box"] for row in rows], "a twentieth of the sides, as of detected boxes"


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


def test_the_captioner_is_shown_the_detected_object(bird_set, annotate_config, tmp_path, monkeypatch):
    shown = []
    original = Captioner.describe
    monkeypatch.setattr(
        Captioner,
        "describe",
        lambda self, crops, text: shown.extend(c.size for c in crops) or original(self, crops, text),
    )
    rows = annotate(bird_set, annotate_config, tmp_path / "a.parquet", log=str)
    boxes = []
    for sample, row in zip(bird_set.samples, rows, strict=True):
        if row["box"]:
            _, (x0, y0, x1, y1) = decode_with_box(bird_set.read(sample), tuple(row["box"]))
            boxes.append((int(np.ceil(x1) - int(x0)), int(np.ceil(y1) - int(y0))))
    assert shown == boxes


def test_the_detector_is_gone_before_the_captioner_is_loaded(bird_set, annotate_config, tmp_path, monkeypatch):
    alive = []

    class Watched(Captioner):
        def __init__(self, *arguments):
            alive.append([type(o) for o in gc.get_objects() if isinstance(o, GroundingDinoForObjectDetection)])
            super().__init__(*arguments)

    monkeypatch.setattr(caption_stage, "Captioner", Watched)
    annotate(bird_set, annotate_config, tmp_path / "a.parquet", log=str)
    assert alive == [[]]


# --- Class names in captions -------------------------------------------------------------------------------------


def test_a_caption_that_names_its_class_is_asked_for_again_then_stripped_and_counted(
    bird_set, annotate_config, tmp_path, monkeypatch
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
            check = LeakCheck(BIRD_CLASSES, "bird")
            describe.leaking = [i for i in ids if check.leaks(answers[i][0], i.split("/")[0])]
        return [answers[i][stricter] for i in ids]

    describe.left, describe.leaking = order, []
    monkeypatch.setattr(Captioner, "describe", describe)
    said = []
    rows = {r["id"]: r for r in annotate(bird_set, annotate_config, tmp_path / "a.parquet", log=said.append)}
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


def test_the_data_set_s_own_captions_are_kept_and_those_that_name_a_class_are_counted(bird_set, tmp_path):
    texts = {"House Wren/0.png": "A wren.", "House Wren/1.png": "brown and barred", "House Wren/3.png": " "}
    bird_set.samples = [replace(s, caption=texts.get(s.id, "")) for s in bird_set.samples]
    rows = {r["id"]: r for r in annotate(bird_set, WITHOUT_MODELS, tmp_path / "a.parquet", log=str)}
    assert [(rows[i]["caption"], rows[i]["caption_source"], rows[i]["leak"]) for i in texts] == [
        ("A wren.", "dataset", "left"),
        ("brown and barred", "dataset", "clean"),
        (None, "none", ""),
    ]


def dit_cache(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300", "TERM": "dumb"})


# --- The picture sheet -------------------------------------------------------------------------------------------


def test_the_sheet_shows_box_and_caption_of_every_image_that_can_be_read(bird_set, annotate_config, tmp_path):
    rows = annotate(
        bird_set, replace(annotate_config, captions="none", box_threshold=1.0), tmp_path / "a.parquet", log=str
    )
    draw_sheet(bird_set, rows, 24, tmp_path / "out/sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "out/sheet.png").convert("RGB"))
    orange = (pixels == (240, 150, 0)).all(-1)
    assert orange.any(0).sum() > 5 * 200  # six boxes side by side, none of them for the broken image
    long = [{**row, "caption": "ein schöner Vogel – “σ” " * 40} for row in rows]
    draw_sheet(bird_set, long, 2, tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").width < pixels.shape[1]


def test_text_on_the_sheet_is_in_signs_that_the_font_has():
    assert plain("Brewer’s “bird” – schön σ…") == 'Brewer\'s "bird" - schon ?...'


def test_the_command_draws_a_sheet_of_a_finished_annotation_too(bird_folder, tmp_path):
    arguments = [
        "annotate", "--dataset", "folder", "--data", bird_folder, "--boxes", "full", "--captions", "none",
        "--device", "cpu", "--output", tmp_path / "a.parquet",
    ]  # fmt: skip
    assert dit_cache(*arguments).exit_code == 0
    done = dit_cache(*arguments, "--sheet", tmp_path / "sheet.png", "--sheet-images", 3)
    assert done.exit_code == 0, done.output
    assert "annotated already" in done.output
    assert Image.open(tmp_path / "sheet.png").width == 3 * 252 + 12
