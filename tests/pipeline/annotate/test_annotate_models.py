"""Detectors and captioners of any kind are loaded from folders, and treat every image as if it were alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_building import many_examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_annotators import save_grounding_dino, save_llava, save_owlv2, save_qwen
from transformers import PreTrainedModel

from pipeline.annotate.captioner import STRICTER, Captioner, crop_object, fill_in
from pipeline.annotate.config import INSTRUCTION
from pipeline.annotate.detector import Detector, pad_and_clip
from pipeline.annotate.models import AnnotateError, ModelFiles, locate_model
from pipeline.teachers.passes import OutOfMemory


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


IMAGES = [photograph(90, 60), photograph(30, 30, 1), photograph(90, 60, 2), photograph(30, 80, 3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    savers = {"dino": save_grounding_dino, "owl": save_owlv2, "qwen": save_qwen, "llava": save_llava}
    return {name: save(base / name) for name, save in savers.items()}


@pytest.fixture(scope="module")
def detectors(folders) -> dict[str, Detector]:
    return {name: Detector(located(folders[name], "--detector"), "cpu") for name in ("dino", "owl")}


@pytest.fixture(scope="module")
def captioners(folders) -> dict[str, Captioner]:
    files = {name: located(folders[name], "--captioner") for name in ("qwen", "llava")}
    return {name: Captioner(f, torch.float32, "cpu", max_new_tokens=16) for name, f in files.items()}


def located(folder: Path, option: str) -> ModelFiles:
    return locate_model(str(folder), None, option)


# --- Boxes -------------------------------------------------------------------------------------------------------

numbers = st.floats(-50, 250)


@many_examples
@given(st.tuples(numbers, numbers, numbers, numbers), st.integers(1, 200), st.integers(1, 200), st.floats(0, 1))
def test_a_padded_box_lies_in_the_image_and_covers_what_was_found_there(corners, width, height, padding):
    x0, x1 = sorted(corners[::2])
    y0, y1 = sorted(corners[1::2])
    box = pad_and_clip((x0, y0, x1, y1), (width, height), padding)
    inside = (max(0, x0), max(0, y0), min(width, x1), min(height, y1))
    if box is None:
        assert inside[2] - inside[0] < 1 or inside[3] - inside[1] < 1
        return
    assert 0 <= box[0] < box[2] <= width
    assert 0 <= box[1] < box[3] <= height
    if inside[0] <= inside[2] and inside[1] <= inside[3]:
        assert box[0] <= inside[0]
        assert box[1] <= inside[1]
        assert box[2] >= inside[2]
        assert box[3] >= inside[3]


def test_padding_is_a_share_of_the_box_on_every_side():
    assert pad_and_clip((20, 30, 40, 70), (100, 100), 0.1) == (18, 26, 42, 74)
    assert pad_and_clip((20, 30, 40, 70), (41, 100), 0.1) == (18, 26, 41, 74)
    assert pad_and_clip((120, 30, 140, 70), (100, 100), 0.1) is None
    assert pad_and_clip((float("nan"), 30, 140, 70), (100, 100), 0.1) is None


def test_the_box_is_the_model_s_most_certain_one_in_pixels_of_the_image(folders, detectors):
    from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

    model = GroundingDinoForObjectDetection.from_pretrained(folders["dino"]).eval()
    processor = GroundingDinoProcessor.from_pretrained(folders["dino"])
    for image in IMAGES:
        with torch.no_grad():
            out = model(**processor(images=image, text="a bird.", return_tensors="pt"))
        scores = out.logits[0].sigmoid().amax(-1)
        cx, cy, w, h = out.pred_boxes[0, scores.argmax()].tolist()
        size = np.array([image.width, image.height] * 2)
        expected = (np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * size).clip(0, size)
        (found,) = detectors["dino"].detect([image], "bird", threshold=0.0, padding=0.0)
        assert found.score == pytest.approx(scores.max().item(), abs=1e-6)
        np.testing.assert_allclose(found.box, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["dino", "owl"])
def test_an_image_s_box_does_not_depend_on_the_other_images(name, detectors):
    together = detectors[name].detect(IMAGES, "bird", 0.0, 0.1)
    alone = [detectors[name].detect([image], "bird", 0.0, 0.1)[0] for image in IMAGES]
    for a, b in zip(together, alone, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-5)
        np.testing.assert_allclose(a.box, b.box, atol=1e-2)


def test_only_scores_above_the_threshold_count(detectors):
    scores = [d.score for d in detectors["owl"].detect(IMAGES, "bird", 0.0, 0.0)]
    middle = sorted(scores)[1]
    kept = detectors["owl"].detect(IMAGES, "bird", middle + 1e-4, 0.0)
    assert [d is not None for d in kept] == [score > middle + 1e-4 for score in scores]
    assert detectors["owl"].detect(IMAGES, "bird", 1.0, 0.0) == [None] * 4


def test_a_strip_of_an_image_has_no_detection_and_does_no_harm(detectors):
    strip, usual = detectors["dino"].detect([photograph(2000, 3), IMAGES[0]], "bird", 0.0, 0.0)
    assert strip is None
    assert usual is not None


# --- Captions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen", "llava"])
def test_a_caption_does_not_depend_on_the_other_images(name, captioners):
    together = captioners[name].describe(IMAGES, "Describe the bird.")
    assert together == [captioners[name].describe([image], "Describe the bird.")[0] for image in IMAGES]
    assert len(set(together)) > 1
    assert captioners[name].describe(IMAGES, "Another question, and a longer one.") != together
    assert captioners[name].describe(IMAGES, "Describe the bird.") == together


def test_captions_are_one_line_of_printable_text(captioners):
    assert all(text.isprintable() and text == text.strip() for text in captioners["qwen"].describe(IMAGES, "What?"))


def test_nothing_to_describe_is_no_question(captioners):
    assert captioners["qwen"].describe([], "What?") == []


def test_the_instruction_names_the_superclass_and_forbids_the_class():
    text = fill_in(INSTRUCTION + STRICTER, "bird")
    assert "{" not in text
    assert "features of the bird" in text
    assert "Do not name the class" in text
    assert fill_in('{"a": "{superclass}"}', "car") == '{"a": "car"}'


def test_the_captioner_sees_the_object_alone_in_whole_pixels_and_not_too_large():
    image = photograph(300, 200)
    assert crop_object(image, (10.5, 20.0, 60.2, 40.0), 768).tobytes() == image.crop((10, 20, 61, 40)).tobytes()
    assert crop_object(image, (0, 0, 300, 200), 150).size == (150, 100)
    assert crop_object(image, (5, 5, 5.5, 5.5), 768).size == (1, 1)


def test_a_crop_too_narrow_for_the_model_is_widened(captioners):
    crop = crop_object(photograph(900, 3), (0, 0, 900, 3), 768)
    assert crop.size == (768, 8)
    assert len(captioners["qwen"].describe([crop], "What?")) == 1


# --- Loading -----------------------------------------------------------------------------------------------------


def test_a_model_is_named_by_its_contents_not_by_its_place(folders, tmp_path):
    shutil.copytree(folders["qwen"], tmp_path / "copy")
    first, copy = (located(f, "--captioner") for f in (folders["qwen"], tmp_path / "copy"))
    assert first.digest == copy.digest
    template = tmp_path / "copy/chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    assert located(tmp_path / "copy", "--captioner").digest != first.digest


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gone/below/this", "no such folder, and not the name of a hub repository"),
        ("somebody/a-detector", "could not be downloaded .*; give --detector the path .*--boxes dataset$"),
        (".", "no config.json there"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_clear_line(source, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AnnotateError, match=said) as caught:
        locate_model(source, None, "--detector")
    assert "\n" not in str(caught.value)


def test_a_repository_in_the_local_hub_cache_needs_no_network(folders, monkeypatch, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--somebody--owl"
    shutil.copytree(folders["owl"], place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = locate_model("somebody/owl", None, "--detector")
    assert (files.source, files.revision) == ("somebody/owl", commit)
    assert files.digest == located(folders["owl"], "--detector").digest
    assert Detector(files, "cpu").detect(IMAGES[:1], "bird", 0.0, 0.0)[0] is not None


def test_a_model_of_another_kind_is_refused_in_one_line(folders):
    with pytest.raises(AnnotateError, match=r"--detector .*qwen: cannot be loaded") as caught:
        Detector(located(folders["qwen"], "--detector"), "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(AnnotateError, match=r"--captioner .*dino: cannot be loaded"):
        Captioner(located(folders["dino"], "--captioner"), torch.float32, "cpu", 8)


def test_missing_weights_are_never_replaced_by_random_ones(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["owl"], tmp_path / "owl")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "class_head" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(AnnotateError, match=r"lack \d+ weights of Owlv2ForObjectDetection \(class_head"):
        Detector(located(folder, "--detector"), "cpu")


def test_a_captioner_without_a_chat_template_is_refused(tmp_path):
    folder = save_llava(tmp_path / "plain", with_template=False)
    with pytest.raises(AnnotateError, match="has no chat template"):
        Captioner(located(folder, "--captioner"), torch.float32, "cpu", 8)


def test_a_model_whose_weights_do_not_fit_is_named_with_advice_about_weights(folders, monkeypatch):
    def full(self, *arguments):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(OutOfMemory, match=r"--captioner .*weights do not fit: choose a smaller --captioner"):
        Captioner(located(folders["llava"], "--captioner"), torch.float32, "cpu", max_new_tokens=16)
