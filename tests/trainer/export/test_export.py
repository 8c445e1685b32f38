"""An exported student is the one that was evaluated, and loads where people load models."""

import json
import logging
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

from cache_schema import open_cache
from trainer.commands.export import say_scores
from trainer.data.images import fit_picture
from trainer.errors import TrainError
from trainer.evaluation.evaluate import evaluate_run
from trainer.export.card import describe, render_card
from trainer.export.export import export_run
from trainer.export.reduced import BITS, write_reduced
from trainer.export.timm_folder import timm_config, write_timm_folder
from trainer.methods.settings import make_config
from trainer.models.opening import ABOUT
from trainer.models.student import Student, build_student, load_student
from trainer.runs import load_result
from trainer.training.loop import train
from trainer.training.run_folder import save_scores


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_path, tiny_settings):
    """A distilled run, evaluated."""
    folder = tmp_path_factory.mktemp("export") / "run"
    settings = [text for text in tiny_settings if text != "--set"]
    cache = open_cache(cache_path)
    train(make_config("paper", [*settings, "updates=2"], cache=str(cache_path)), cache, folder)
    save_scores(folder, "test", evaluate_run(folder, cache, torch.device("cpu"))[0])
    return folder


@pytest.fixture(scope="module")
def exported(run, cache_path):
    """All that an export may hold, but for fewer bits; made once, for ONNX takes seconds."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    lines = []
    listener = logging.Handler()
    listener.emit = lines.append
    root = logging.getLogger()
    level = root.level
    root.addHandler(listener)
    root.setLevel(logging.DEBUG)
    try:
        export_run(run, run.parent / "exported", open_cache(cache_path))
    finally:
        root.removeHandler(listener)
        root.setLevel(level)
    (run.parent / "log.json").write_text(json.dumps([f"{line.name}: {line.getMessage()}" for line in lines]))
    return run.parent / "exported"


NETWORK = ("student.name=vit_tiny_patch16_224", "student.img_size=32", "student.patch_size=16", "student.depth=1",
           "student.embed_dim=32", "student.num_heads=2")  # fmt: skip


def in_timm(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """Embeddings of uint8 images by timm alone, prepared as the folder's configuration says."""
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(network)
    assert list(data["input_size"][1:]) == list(images.shape[2:])
    mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return network((images.float().div(255.0) - mean) / std)


@torch.inference_mode()
def test_timm_gives_the_embeddings_that_were_evaluated_bit_for_bit(run, exported, cache):
    _, embeddings, test = evaluate_run(run, cache, torch.device("cpu"))
    images = test.images.load(test.split.rows)
    assert torch.equal(in_timm(exported, images), embeddings["student"])


@torch.inference_mode()
@pytest.mark.parametrize(
    "settings",
    [
        ["student.name=test_efficientnet", "student.img_size=64"],
        [*NETWORK, "student.patch_size=8"],
    ],
)
def test_timm_rebuilds_students_of_any_shape(settings, tmp_path, cache_path):
    config = make_config("paper", [*settings, "student.pretrained=false"], cache=str(cache_path))
    student = build_student(config.student).eval()
    write_timm_folder(student, tmp_path, {})
    images = torch.randint(0, 256, (2, 3, student.input_size, student.input_size), dtype=torch.uint8)
    assert torch.equal(in_timm(tmp_path, images), student(images))


@pytest.fixture
def a_student() -> Student:
    config = make_config("paper", [*NETWORK, "student.pretrained=false"], cache="none")
    return build_student(config.student).eval()


def in_timms_transform(student: Student, image: Image.Image, squashed: bool = False) -> np.ndarray:
    """The pixels (S, S, 3) that timm makes of an image, by what an export's configuration says alone."""
    about = timm_config(student, {}, squashed)["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=about))
    mean, std = (np.array(about[key]) for key in ("mean", "std"))
    return transform(image).numpy().transpose(1, 2, 0) * (255 * std) + 255 * mean


def plain_picture(width: int, height: int) -> Image.Image:
    """Red says how far right a pixel is, green how far down, in halves of a per cent of the picture."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.stack([200 * x, 200 * y, 0 * x], axis=2).round().astype(np.uint8))


@pytest.mark.parametrize("sides", [(40, 70), (70, 40), (32, 32), (256, 341)])
def test_timms_transform_squashes_an_image_to_the_very_pixels_of_the_evaluation(sides, a_student):
    pixels = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    a_student.fit = "squash"
    ours = fit_picture(image, a_student.input_size, "squash")
    np.testing.assert_allclose(in_timms_transform(a_student, image), ours, atol=1e-3)


@pytest.mark.parametrize(("size", "kept"), [(28, 32), (224, 256)])
def test_timms_transform_crops_an_image_of_a_cache_to_the_very_pixels_of_the_evaluation(size, kept, a_student):
    """Where the stored side is 8/7 of the student's, as 256 is of 224, neither resizes."""
    pixels = np.random.default_rng(0).integers(0, 256, (kept, kept + 14, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    a_student.fit, a_student.input_size = "crop", size
    np.testing.assert_allclose(in_timms_transform(a_student, image), fit_picture(image, size, "crop"), atol=1e-3)


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize("sides", [(400, 300), (301, 533), (256, 256)])
def test_timms_transform_crops_any_image_to_within_a_pixel_of_the_evaluation(size, sides, a_student):
    image = plain_picture(*sides)
    a_student.fit, a_student.input_size = "crop", size
    ours = fit_picture(image, size, "crop").astype(float)
    found = in_timms_transform(a_student, image)
    pixel = 200 * (7 / 8) / size  # by which red or green change, at most, from a pixel to the next
    assert np.abs(found - ours).max() <= pixel + 1  # of rounding
    # A squashed one would be further away than that.
    assert np.abs(fit_picture(image, size, "squash").astype(float) - ours).max() > pixel + 1


def test_a_crop_of_images_that_the_cache_has_squashed_is_one_in_timm_too(a_student):
    image, size = plain_picture(400, 300), 96
    a_student.fit, a_student.input_size = "crop", size
    stored = image.resize((256, 256), Image.Resampling.BICUBIC)
    found = in_timms_transform(a_student, image, squashed=True)
    assert np.abs(found - fit_picture(stored, size, "crop")).max() <= 200 * (7 / 8) / size + 1


def test_a_run_that_crops_says_so_to_timm_as_its_cache_keeps_images(run, cache, tmp_path):
    def exported_crop(fit, cache):
        shutil.copytree(run, tmp_path / fit, dirs_exist_ok=True)
        for file, part, value in (("student.json", "input", "crop"), ("config.json", None, fit)):
            about = json.loads((run / file).read_text())
            (about[part] if part else about)["fit"] = value
            (tmp_path / fit / file).write_text(json.dumps(about))
        export_run(tmp_path / fit, tmp_path / "out", cache, onnx=False, overwrite=True)
        found = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
        return found["crop_mode"], found["crop_pct"], (tmp_path / "out" / "README.md").read_text()

    mode, share, card = exported_crop("auto", None)
    assert (mode, share) == ("center", 0.875)
    assert "until its shorter side has 27 pixels; the 24 × 24 in its middle are kept" in card
    mode, share, card = exported_crop("crop", cache)  # which keeps squares
    assert (mode, share) == ("squash", 0.875)
    assert "resized to 27 × 27 (bicubic), without keeping its proportions; the 24 × 24 in its middle" in card
    with pytest.raises(TrainError, match="give --cache"):
        exported_crop("crop", None)


def test_a_run_scored_on_the_classes_it_held_out_alone_says_that_on_its_card(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    scores = json.loads((run / "eval.json").read_text())
    (tmp_path / "run" / "eval-validation.json").write_text(json.dumps({**scores, "split": "validation"}))
    (tmp_path / "run" / "eval.json").unlink()
    export_run(tmp_path / "run", tmp_path / "out", None, onnx=False)
    assert "(split `validation`, held out of the training classes" in (tmp_path / "out" / "README.md").read_text()


def test_onnx_takes_any_number_of_images_and_gives_unit_embeddings(run, exported):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported / "model.onnx"), providers=["CPUExecutionProvider"])
    student = load_student(run).eval()
    for count in (1, 5):
        images = torch.randint(0, 256, (count, 3, 24, 24), dtype=torch.uint8)
        (found,) = session.run(None, {"pixels": images.numpy()})
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(student(images), dim=-1)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_exporters_own_log_is_not_shown_even_where_everything_is_logged(exported):
    lines = json.loads((exported.parent / "log.json").read_text())
    assert [line for line in lines if line.startswith(("onnx", "torch"))] == []


def test_without_the_extra_onnx_is_refused_in_one_line_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as where it is not installed
    with pytest.raises(
        TrainError, match=r"\(onnxscript\): pip install 'dit-distill\[export\]', or give --no-onnx"
    ) as said:
        export_run(run, tmp_path / "out", None)
    assert "\n" not in str(said.value)
    assert not (tmp_path / "out").exists()


def test_nothing_but_the_student_is_in_the_folder(exported, run):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "config.json",
        "model.onnx",
        "model.safetensors",
    ]
    with safe_open(exported / "model.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == set(load_student(run).network.state_dict())


def test_the_card_names_data_cache_teacher_licence_and_scores(exported, run):
    card = (exported / "README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    scores = json.loads((run / "eval.json").read_text())
    for text in ("`tiny`", "open-set", result["cache_id"], "`synthetic`", "licence of the teacher", "10 queries"):
        assert text in card
    assert f"{100 * scores['student']['map_at_r']:.1f}" in card


@torch.inference_mode()
def test_what_the_card_says_of_use_runs_as_it_stands_there_and_gives_the_students_embedding(
    run, exported, tmp_path, monkeypatch
):
    shutil.copytree(exported, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("image.jpg")
    names = {}
    exec((exported / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    student = load_student(run).eval()
    with Image.open("image.jpg") as image:
        ours = torch.from_numpy(fit_picture(image.convert("RGB"), 24, "squash").transpose(2, 0, 1).copy())
    expected = torch.nn.functional.normalize(student(ours[None]), dim=-1)
    torch.testing.assert_close(names["embedding"], expected)


def test_an_export_is_not_written_over_something_else(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainError, match="is not empty"):
        export_run(run, tmp_path, None, onnx=False)
    with pytest.raises(TrainError, match="not of an export"):
        export_run(run, run, None, onnx=False, overwrite=True)
    with pytest.raises(TrainError, match="there is no run"):
        export_run(tmp_path / "nowhere", tmp_path / "out", None)


def test_without_its_cache_an_export_says_what_it_does_not_know(run, tmp_path):
    assert "model.onnx" not in export_run(run, tmp_path / "out", None, onnx=False)
    assert "its cache was not at hand" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def reduced(run, exported, cache_path):
    """The exported ONNX file in fewer bits, and what each scores."""
    folder = run.parent / "reduced"
    folder.mkdir()
    student = load_student(run).eval()
    forms = write_reduced(student, open_cache(cache_path), exported / "model.onnx", folder, BITS)
    return folder, {form.name: form for form in forms}


def test_fewer_bits_are_a_smaller_file_that_takes_and_gives_the_same(run, reduced, exported):
    import onnxruntime

    folder, _ = reduced
    whole = (exported / "model.onnx").stat().st_size
    student = load_student(run).eval()
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(student(images), dim=-1).numpy()
    for name, difference in (("model.fp16.onnx", 2e-3), ("model.int8.onnx", 0.1)):
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        (found,) = session.run(["embedding"], {"pixels": images.numpy()})
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=difference)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    assert (folder / "model.fp16.onnx").stat().st_size < 0.8 * whole


def test_in_8_bits_the_first_and_the_last_product_stay_as_they_are(reduced):
    import onnx

    graph = onnx.load(reduced[0] / "model.int8.onnx").graph
    made = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    products = [bool(made & set(node.input)) for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    assert not products[0]
    assert not products[-1]
    assert sum(products) > 2


def test_what_fewer_bits_lose_is_said_when_they_are_written(tmp_path, capsys):
    def form(name: str, recall: float) -> dict:
        return {"name": name, "megabytes": 4.0, "scores": {"recall_at_1": recall}}

    forms = [form("model.onnx", 0.58), form("model.fp16.onnx", 0.579), form("model.int8.onnx", 0.5)]
    (tmp_path / "config.json").write_text(json.dumps({ABOUT: {"onnx": forms}}))
    say_scores(tmp_path)
    said, warned = capsys.readouterr()
    assert "model.int8.onnx: R@1 50.0 %, 8.0 points less than model.onnx" in said
    assert warned.splitlines() == ["note: model.int8.onnx is clearly worse than model.onnx: use that one"]


def test_what_each_file_scores_is_measured_on_the_test_images(run, reduced):
    _, forms = reduced
    scores = json.loads((run / "eval.json").read_text())
    assert list(forms) == ["model.onnx", "model.fp16.onnx", "model.int8.onnx"]
    assert forms["model.onnx"].scores == pytest.approx(
        {name: scores["student"][name] for name in forms["model.onnx"].scores}
    )
    card = render_card(load_student(run), {**describe({}, load_result(run), None, None),
                                           "onnx": [asdict(form) for form in forms.values()]}, 0.0)  # fmt: skip
    for form in forms.values():
        line = next(line for line in card.splitlines() if line.startswith(f"{form.name}, "))
        assert f"{100 * form.scores['recall_at_1']:.1f}" in line


def test_fewer_bits_need_the_cache_to_be_scored_on_and_the_whole_file(run, cache, tmp_path):
    with pytest.raises(TrainError, match="--int8 is kept with its scores, and the run's cache is not at hand"):
        export_run(run, tmp_path / "out", None, bits=["int8"])
    with pytest.raises(TrainError, match="--fp16 is a form of the ONNX file; leave out --no-onnx"):
        export_run(run, tmp_path / "out", cache, onnx=False, bits=["fp16"])
    assert not (tmp_path / "out").exists()
