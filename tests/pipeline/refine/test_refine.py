"""Stage I: the loss is the paper's, and the LoRA learns through the object tokens alone."""

import json

import pytest
import torch
from diffusers import FluxKontextPipeline
from safetensors.torch import load_file, save_file
from tiny_teachers import encode_conditions

from cache_schema.errors import DitDistillError
from pipeline.inputs.conditions import Conditions
from pipeline.refine import RefineConfig, cdr_loss, refine
from pipeline.refine.loss import hold_out
from pipeline.teachers.base import TeacherError, TextEmbedding
from pipeline.teachers.flux import FluxTeacher
from pipeline.teachers.lora import add_lora, save_lora
from pipeline.teachers.weights import LORA_NAME, file_digest


class Oracle:
    """Knows clean object and noise, and says exactly z_O − ε plus an offset."""

    def __init__(self, clean, noise, offset):
        self.answer = clean - noise + offset
        self.seen = None

    def predict(self, noisy, context, sigma, text):
        self.seen = noisy
        return self.answer


def test_the_loss_is_the_mean_square_distance_to_z_minus_epsilon():
    clean, noise = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    conditions = Conditions(clean, torch.zeros_like(clean), TextEmbedding(torch.zeros(2, 1, 1), torch.zeros(2, 1)))
    sigma = torch.tensor([0.25, 1.0])
    exact, off = Oracle(clean, noise, 0.0), Oracle(clean, noise, 0.5)
    assert cdr_loss(exact, conditions, noise, sigma).item() == 0.0
    assert cdr_loss(off, conditions, noise, sigma).item() == pytest.approx(0.25)
    # t = 1 − σ: a quarter of noise and three quarters of the object; at σ = 1 nothing but noise.
    torch.testing.assert_close(exact.seen[0], 0.75 * clean[0] + 0.25 * noise[0])
    torch.testing.assert_close(exact.seen[1], noise[1])


def one_backward(teacher, tiny_dataset):
    parameters = add_lora(teacher.transformer, 4, seed=0)
    for parameter in parameters:  # B = 0 would hide half of the gradients
        parameter.data.normal_(0, 0.05)
    conditions = encode_conditions(teacher, tiny_dataset, tiny_dataset.samples[:2], "canonical")
    grads = []

    def watch(module, args, output):
        output.register_hook(grads.append)

    teacher.transformer.proj_out.register_forward_hook(watch)
    noise = torch.randn_like(conditions.object)
    cdr_loss(teacher, conditions, noise, torch.tensor([0.3, 0.7])).backward()
    return parameters, grads[0]


def test_the_lora_receives_gradients_only_through_the_object_tokens(load_teacher, tiny_dataset):
    teacher = load_teacher()
    parameters, output_grad = one_backward(teacher, tiny_dataset)
    objects = teacher.grid[0] * teacher.grid[1]
    assert output_grad.shape[1] == 2 * objects
    assert output_grad[:, :objects].abs().min(dim=-1).values.max() > 0
    assert not output_grad[:, objects:].any()
    # What feeds only text or context outputs of the last block is not reached; every other projection is.
    assert sum(p.grad is not None and bool(p.grad.any()) for p in parameters) > 0.8 * len(parameters)


def test_the_frozen_weights_receive_none(load_teacher, tiny_dataset):
    teacher = load_teacher()
    one_backward(teacher, tiny_dataset)
    frozen = [p for n, p in teacher.transformer.named_parameters() if "lora" not in n]
    assert frozen
    assert all(p.grad is None for p in frozen)


def test_the_saved_lora_means_the_same_to_diffusers_and_to_the_build(load_teacher, flux_folder, tiny_dataset, tmp_path):
    teacher = load_teacher()
    for parameter in add_lora(teacher.transformer, 4, seed=0):
        parameter.data.normal_(0, 0.05)
    save_lora(FluxKontextPipeline, teacher.transformer, tmp_path)
    c = encode_conditions(teacher, tiny_dataset, tiny_dataset.samples[:2], "canonical")
    sigma = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        expected = teacher.predict(c.object, c.context, sigma, c.text)
        plain = load_teacher().predict(c.object, c.context, sigma, c.text)
        built = load_teacher(lora=tmp_path).predict(c.object, c.context, sigma, c.text)
        theirs = load_teacher()
        theirs.transformer_pipe.load_lora_weights(tmp_path)
        loaded = theirs.predict(c.object, c.context, sigma, c.text)
    assert not torch.allclose(plain, expected, atol=1e-3)
    torch.testing.assert_close(loaded, expected)
    torch.testing.assert_close(built, expected, atol=1e-5, rtol=1e-4)


def test_refining_lowers_the_held_out_loss_and_leaves_a_record(load_teacher, tiny_dataset, tmp_path):
    said = []
    config = RefineConfig(steps=40, batch=4, lr=1e-2, rank=4, validation_images=6, validate_every=20)
    record = refine(load_teacher(), tiny_dataset, config, tmp_path, log=said.append)
    losses = [entry["validation_loss"] for entry in record["validation"]]
    assert [entry["step"] for entry in record["validation"]] == [0, 20, 40]
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "refine.json").read_text()) == record
    assert record["lora_digest"] == file_digest(tmp_path / "pytorch_lora_weights.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert [line["step"] for line in lines if "validation_loss" in line] == [20, 40]
    assert "encoded" in said[0]
    assert "held-out CDR loss" in said[1]


def test_gradients_that_are_not_finite_stop_the_run_before_they_reach_the_weights(load_teacher, tiny_dataset, tmp_path):
    """As cuDNN's attention gave them on an H200: the loss of the step says nothing of it."""
    teacher, seen = load_teacher(), []

    def spoil(_module, _given, _returned):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        tensor = next(p for n, p in teacher.transformer.named_parameters() if "lora_B" in n)
        if not tensor._backward_hooks:
            tensor.register_hook(lambda gradient: gradient * float("nan"))

    teacher.transformer.register_forward_hook(spoil)
    with pytest.raises(DitDistillError, match=r"loss of step 1 is finite, its gradients are not \(1 of \d+ .*lora_B"):
        refine(teacher, tiny_dataset, RefineConfig(steps=1, batch=2, rank=2, validation_images=2), tmp_path)
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()
    assert not any(seen[-1:])  # which is why that kernel is not used here


def test_refining_twice_from_one_seed_gives_the_same_lora(load_teacher, tiny_dataset, tmp_path):
    config = RefineConfig(steps=3, batch=2, rank=2, validation_images=2)
    first, second = (refine(load_teacher(), tiny_dataset, config, tmp_path / n, log=str) for n in "ab")
    assert first["lora_digest"] == second["lora_digest"]


def test_held_out_images_are_not_trained_on(tiny_dataset):
    train = [s for s in tiny_dataset.samples if s.split == "train"]
    kept, held = hold_out(train, 7)
    assert len(held) == 7
    assert sorted([*kept, *held], key=lambda s: s.id) == sorted(train, key=lambda s: s.id)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch": 0}, {"rank": 0}, {"lr": 0.0}, {"validation_images": 0}])
def test_a_setting_that_makes_no_sense_is_named(bad):
    with pytest.raises(DitDistillError, match=next(iter(bad)).replace("_", "-")):
        RefineConfig(**bad)


def test_a_missing_or_foreign_lora_is_refused_in_one_line(load_teacher, tmp_path):
    with pytest.raises(TeacherError, match="make one with dit-cache refine"):
        load_teacher(lora=tmp_path / "nothing")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(TeacherError, match="does not fit this teacher") as caught:
        load_teacher(lora=tmp_path)
    assert "\n" not in str(caught.value)


def wrong_layer(tensors):
    return {k.replace("transformer_blocks.1.", "transformer_blocks.9."): v for k, v in tensors.items()}


def wrong_shape(tensors):
    return {
        k: torch.cat([v, v], -1) if k.endswith("blocks.0.attn.to_q.lora_A.weight") else v for k, v in tensors.items()
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: {k: v for k, v in t.items() if "lora_A" in k}, r"attn\S+ has lora_A but no lora_B; the file is not"),
        (lambda t: {k: v for k, v in t.items() if "0.attn.to_k.lora_A" not in k}, "to_k has lora_B but no lora_A"),
        (wrong_layer, r"has no layer \S*transformer_blocks\.9\.\S+ \(\d+ of the LoRA's \d+ layers\)"),
        (wrong_shape, r"size mismatch for \S+blocks\.0\.attn\.to_q\S*: copying a param"),
        (lambda t: t | {"text_encoder.q.lora_A.weight": torch.ones(1, 2)}, r"1 of its tensors are not the transformer"),
        (lambda t: t | {"transformer.proj_out.alpha": torch.ones(1)}, r"no halves of a LoRA .* proj_out\.alpha"),
        (lambda t: {f"lora_unet_{k}": v for k, v in t.items()}, "holds no weights for the transformer"),
        (
            lambda t: t | {min(t): t[min(t)] / 0},
            r"1 of its \d+ tensors are not finite floating-point numbers, such as tr",
        ),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "are not finite floating-point numbers"),
    ],
)
def test_a_lora_of_which_a_part_would_be_left_out_is_refused_by_name(load_teacher, tmp_path, change, complaint):
    teacher = load_teacher()
    add_lora(teacher.transformer, 2, seed=0)
    file = save_lora(FluxKontextPipeline, teacher.transformer, tmp_path)
    load_teacher(lora=tmp_path).load("transformer")
    save_file(change(load_file(file)), file)
    with pytest.raises(TeacherError, match=complaint) as caught:
        load_teacher(lora=tmp_path).load("transformer")
    assert "\n" not in str(caught.value)


def test_a_lora_refined_on_another_teacher_is_refused(load_teacher, make_flux, tiny_dataset, tmp_path):
    refine(load_teacher(), tiny_dataset, RefineConfig(steps=1, rank=2, validation_images=2), tmp_path / "lora", log=str)
    load_teacher(lora=tmp_path / "lora")
    other = make_flux(tmp_path / "other", seed=1)
    with pytest.raises(TeacherError, match=r"was refined on .*refine again, or name that teacher"):
        FluxTeacher(other, resolution=32, lora=tmp_path / "lora")


def test_equal_weights_have_one_digest_however_their_file_orders_its_header(tmp_path):
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    header = {"__metadata__": {"format": "pt", "adapter": "{}"}}
    save_file(tensors, tmp_path / "one.safetensors", metadata=header["__metadata__"])
    data = (tmp_path / "one.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    turned = json.dumps(dict(reversed(json.loads(data[8 : 8 + size]).items()))).encode()
    (tmp_path / "two.safetensors").write_bytes(len(turned).to_bytes(8, "little") + turned + data[8 + size :])
    (tmp_path / "three.safetensors").write_bytes(data[:-1] + b"x")

    one, two, three = (file_digest(tmp_path / f"{name}.safetensors") for name in ("one", "two", "three"))
    assert one == two != three


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 8, b"\x05" + bytes(7) + b"12{", b"\x02" + bytes(7) + b"{}"])
def test_a_file_that_is_no_safetensors_has_a_digest_all_the_same(tmp_path, data):
    (tmp_path / "odd.safetensors").write_bytes(data)
    assert len(file_digest(tmp_path / "odd.safetensors")) == 64


def test_the_file_of_a_lora_does_not_depend_on_the_order_of_a_set(load_teacher, tmp_path):
    teacher = load_teacher()
    add_lora(teacher.transformer, 2, seed=0)
    written = []
    for names in (["to_k", "to_q", "to_v"], ["to_v", "to_q", "to_k"]):
        teacher.transformer.peft_config["default"].target_modules = names
        written.append(file_digest(save_lora(FluxKontextPipeline, teacher.transformer, tmp_path)))
    assert written[0] == written[1]
    assert [path.name for path in tmp_path.iterdir()] == [LORA_NAME]
