import json
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from trainer.config import StudentConfig
from trainer.errors import TrainError
from trainer.models.student import build_student, embedding_width, load_student, save_student
from trainer.models.weights import save_weights

TINY = StudentConfig(name="vit_tiny_patch16_224", img_size=24, patch_size=12, depth=1, embed_dim=32, num_heads=2)


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    student = build_student(TINY).eval()
    save_student(student, tmp_path)
    return student, tmp_path


def test_a_saved_student_embeds_as_before_from_its_folder_or_its_file(saved, images):
    student, folder = saved
    expected = student(images)
    assert expected.shape == (3, 32)
    for path in (folder, folder / "student.safetensors"):
        assert torch.equal(load_student(path).eval()(images), expected)


def test_the_normalisation_of_the_pixels_is_part_of_the_student(saved, images):
    student, folder = saved
    about = json.loads((folder / "student.json").read_text())
    assert about["input"] == {"size": 24, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                              "fit": "squash"}  # fmt: skip
    assert torch.equal(student(images), student.network((images / 255 - 0.5) / 0.5))


def test_training_can_start_from_a_students_weights(saved, images):
    student, folder = saved
    torch.manual_seed(1)
    again = build_student(TINY.model_copy(update={"weights": str(folder / "student.safetensors")})).eval()
    assert torch.equal(again(images), student(images))


def test_weights_that_would_leave_parts_at_random_are_refused(saved):
    folder = saved[1]
    weights = load_file(folder / "student.safetensors")
    weights.pop("norm.weight")
    save_file(weights, folder / "partial.safetensors")
    with pytest.raises(TrainError, match=r"lack 1 of the .* for example norm.weight"):
        build_student(TINY.model_copy(update={"weights": str(folder / "partial.safetensors")}))


def test_weights_that_would_be_cut_are_refused_but_for_a_classifier(saved):
    folder = saved[1]
    weights = load_file(folder / "student.safetensors")
    save_file({**weights, "head.weight": torch.zeros(5, 32)}, folder / "classifier.safetensors")
    build_student(TINY.model_copy(update={"weights": str(folder / "classifier.safetensors")}))
    deeper = {name.replace("blocks.0.", "blocks.1."): value.clone() for name, value in weights.items()}
    save_file({**deeper, **weights}, folder / "deeper.safetensors")
    with pytest.raises(TrainError, match=r"hold 12 tensors that .* has not, for example blocks\.1\."):
        build_student(TINY.model_copy(update={"weights": str(folder / "deeper.safetensors")}))


def test_weights_that_are_not_finite_are_refused_by_name(saved):
    folder = saved[1]
    weights = load_file(folder / "student.safetensors")
    weights["norm.weight"][3] = float("nan")
    save_file(weights, folder / "broken.safetensors")
    with pytest.raises(TrainError, match=r"1 tensors are not finite, for example norm\.weight"):
        build_student(TINY.model_copy(update={"weights": str(folder / "broken.safetensors")}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vit_of_nowhere"}, "cannot build student vit_of_nowhere"),
        ({"extra": {"no_such": 1}}, "no_such"),
        ({"extra": {"in_chans": 1}}, "student.extra: in_chans is not free to choose"),
        ({"extra": {"features_only": True}}, "student.extra: features_only is not free to choose"),
        ({"extra": {"global_pool": ""}}, r"gives \(2, 5, 32\) for two images, not an embedding"),
        ({"weights": "absent.safetensors"}, "absent.safetensors: no such file"),
    ],
)
def test_a_student_that_cannot_be_built_is_reported_in_one_line(change, message):
    with pytest.raises(TrainError, match=message) as caught:
        build_student(TINY.model_copy(update=change))
    assert "\n" not in str(caught.value)


def test_a_convolutional_student_takes_no_vit_arguments():
    student = build_student(StudentConfig(name="resnet10t"))
    assert student.dim == 512
    assert student.eval()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 512)


def test_a_folder_without_a_student_is_reported(tmp_path):
    with pytest.raises(TrainError, match=r"student\.safetensors is missing"):
        load_student(tmp_path)


# Whose `num_features` is not the width of what they give, then some of other kinds.
@pytest.mark.parametrize(
    ("name", "width"),
    [("mobilenetv3_small_050", 1024), ("efficientvit_b0", 1280), ("lcnet_035", 1280), ("test_vit", 64),
     ("hgnet_tiny", 2048), ("ghostnet_050", 1280), ("test_resnet", 96), ("repghostnet_050", 1280)],
)  # fmt: skip
def test_the_width_of_a_student_is_that_of_its_output(name, width):
    student = build_student(StudentConfig(name=name)).eval()
    assert student.dim == width
    images = torch.zeros(1, 3, student.input_size, student.input_size, dtype=torch.uint8)
    assert student(images).shape == (1, width)


SMALL = re.compile(r"(?:^|_)(?:atto|femto|pico|nano|x*tiny|x+s\d*|mini|small|[st]\d?|\d*[a-z]0+)(?=_|$|\d)")
# Shapes of an LSTM take longest; one layer in each stage has as many channels as all of them.
FEWER = {"timm.models.sequencer": {"layers": (1, 1, 1, 1)}}


def how_large(name: str) -> tuple[bool, bool, list[int], int, str]:
    """What sorts the names of a family by the size of the model, roughly: words for small ones, then numbers."""
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return "test_" not in name, not SMALL.search(name), numbers[:1], len(name), name


def family_members() -> dict[str, str]:
    """A small model of each of timm's families, which are its modules."""
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm.model_entrypoint(name).__module__, []).append(name)
    return {family: min(names, key=how_large) for family, names in families.items()}


def test_every_family_of_timm_gives_one_embedding_per_image():
    members = family_members()
    assert len(members) > 80
    for family, name in members.items():
        config = timm.get_pretrained_cfg(name)
        assert embedding_width(name, FEWER.get(family, {}), config.input_size[-1] if config else 224) > 0


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "resnet10t", "tf_efficientnet_lite0", "convnext_atto", "swin_tiny_patch4_window7_224",
     "mobilenetv3_small_050", "eva02_tiny_patch14_224", "xcit_nano_12_p16_224"],
)  # fmt: skip
def test_students_of_every_kind_see_images_at_the_size_that_is_asked_for(name):
    size = 56 if "swin" in name or "14" in name else 64
    with torch.device("meta"):
        student = build_student(StudentConfig(name=name, img_size=size)).eval()
        seen = []
        first = next(module for module in student.network.modules() if isinstance(module, torch.nn.Conv2d))
        first.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[2:])))
        assert student(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape == (1, student.dim)
    assert student.input_size == size
    assert seen == [(size, size)]


def test_a_convolutional_student_takes_images_of_any_size(tmp_path, images):
    torch.manual_seed(0)
    student = build_student(StudentConfig(name="test_efficientnet", img_size=24)).eval()
    assert student.input_size == 24
    save_file(student.network.state_dict(), tmp_path / "start.safetensors")
    started = build_student(
        StudentConfig(name="test_efficientnet", img_size=24, weights=str(tmp_path / "start.safetensors"))
    ).eval()
    save_student(student, tmp_path)
    loaded = load_student(tmp_path).eval()
    assert loaded.input_size == 24
    assert torch.equal(started(images), student(images))
    assert torch.equal(loaded(images), student(images))


@pytest.mark.parametrize("how", ["train", "freeze_statistics", "freeze"])
def test_batch_norms_of_a_pretrained_student_learn_as_much_as_they_may(tmp_path, how):
    file = tmp_path / "weights.safetensors"
    save_weights(build_student(StudentConfig(name="test_efficientnet")).network.state_dict(), file)
    config = StudentConfig(name="test_efficientnet", weights=str(file), batch_norm=how, batch_norm_momentum=0.5)
    student = build_student(config)
    before = {name: value.clone() for name, value in student.network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1.0)
    student.eval()
    student.train()
    student(torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in student.network.state_dict().items() if not torch.equal(value, before[name])}
    assert "conv_stem.weight" in changed
    assert ("bn1.running_mean" in changed) == (how == "train")
    assert ("bn1.weight" in changed) == (how != "freeze")
    assert student.network.bn1.momentum == 0.5


@pytest.mark.parametrize(("size", "fitting"), [(30, "24 or 36"), (37, "36 or 48")])
def test_an_image_that_patches_do_not_cover_is_refused(size, fitting):
    with pytest.raises(TrainError, match=rf"patches of 12 pixels, .* never be seen; use --image-size {fitting}$"):
        build_student(TINY.model_copy(update={"img_size": size}))


def test_a_convolutional_network_takes_an_odd_size_as_it_is():
    student = build_student(StudentConfig(name="test_efficientnet", img_size=37)).eval()
    assert student.input_size == 37
    pictures = torch.zeros(2, 3, 37, 37, dtype=torch.uint8)
    assert student(pictures).shape == (2, student.dim)
    assert student.with_tokens(pictures)[1].shape[1:] == student.token_shape


def test_where_no_hub_is_reached_it_is_said_how_to_do_without(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        TrainError, match=r"cannot build student test_vit: .*; --student-weights FILE.safetensors needs"
    ):
        build_student(StudentConfig(name="test_vit", pretrained=True))


def test_batch_norms_without_statistics_are_not_frozen():
    with pytest.raises(TrainError, match=r"student.batch_norm=freeze keeps the statistics of pretrained weights"):
        build_student(StudentConfig(name="test_efficientnet", batch_norm="freeze"))


def test_what_is_compiled_of_a_student_is_used_with_its_tokens_and_without(images):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    student = build_student(TINY).eval()
    expected, alone = student.with_tokens(images), student(images)
    student.compile_network(backend=backend)
    found = student.with_tokens(images)
    assert len(compiled) == 1
    assert torch.equal(student(images), alone)
    assert len(compiled) == 2
    assert all(map(torch.equal, found, expected))


def test_a_student_whose_features_are_no_map_is_refused_for_regression():
    student = build_student(StudentConfig(name="efficientvim_m1", img_size=64))
    with pytest.raises(TrainError, match=r"keeps no map of the image before it pools, but a list; set regression"):
        assert student.token_shape
