"""A modulated tap is what the attention of a block reads: its input after layer norm, scale and shift of AdaLN."""

from pathlib import Path

import pytest
import torch
from tiny_teachers import save_tiny_klein, save_tiny_sd3
from torch.nn.functional import layer_norm, silu

from pipeline.config import make_config
from pipeline.presets import TEACHERS, preset_values
from pipeline.teachers import load_teacher, outline_teacher
from pipeline.teachers.architecture import Place


@pytest.fixture(scope="module")
def folders(flux_folder, tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("modulated")
    return {"flux": flux_folder, "flux2": save_tiny_klein(base / "klein"), "sd3": save_tiny_sd3(base / "sd3")}


@pytest.fixture(scope="module", params=["flux", "flux2", "sd3"])
def teacher(request, folders):
    side = 32 if request.param == "flux" else 64
    return load_teacher(str(folders[request.param]), resolution=side, dtype=torch.float32, device="cpu")


def inputs(teacher, batch=2):
    shape = teacher.tap_shape("velocity")
    noisy, context = torch.randn(2, batch, shape.tokens, shape.channels, generator=torch.Generator().manual_seed(0))
    return noisy, context, torch.linspace(0.2, 0.8, batch), teacher.encode_text(["red crown", "blue wings"])


def normalised(tokens):
    return layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def by_hand(family, block, given):
    """What the equations of AdaLN make of a block's input, from the weights alone: the image's tokens of (B, L, C)."""
    tokens = given["hidden_states"]
    if family == "flux2":
        modulation = given["temb_mod_img"] if "temb_mod_img" in given else given["temb_mod"]
        modulation = modulation.reshape(
            len(tokens), -1, 3, tokens.shape[-1]
        )  # B, attention and MLP, shift scale gate, C
        shift, scale = modulation[:, 0, 0, None], modulation[:, 0, 1, None]
    else:
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        shift, scale = norm.linear(silu(given["temb"])).chunk(norm.linear.out_features // tokens.shape[-1], dim=1)[:2]
        shift, scale = shift[:, None], scale[:, None]
    return (1 + scale) * normalised(tokens) + shift


def object_tokens(teacher, tokens, text):
    rows, columns = teacher.grid
    if teacher.family == "sd3":  # the right half of a wide picture
        return tokens.reshape(len(tokens), rows, 2 * columns, -1)[:, :, columns:].flatten(1, 2)
    if tokens.shape[1] > 2 * rows * columns:  # FLUX.2's single blocks have the text in front
        tokens = tokens[:, text.tokens.shape[1] :]
    return tokens[:, : rows * columns]


def test_modulated_taps_are_adaln_of_what_the_block_is_given_and_nothing_behind_them_runs(teacher):
    noisy, context, sigma, text = inputs(teacher)
    blocks, given = teacher._blocks(), []
    names = ("hidden_states", "encoder_hidden_states", "temb")
    hooks = [
        b.register_forward_pre_hook(
            lambda m, i, k: given.append(dict(zip(names, i, strict=False)) | k), with_kwargs=True
        )
        for b in blocks
    ]
    with torch.no_grad():
        teacher.predict(noisy, context, sigma, text)
    for hook in hooks:
        hook.remove()
    for depth, tap in enumerate(teacher.architecture.taps()):
        ran: list[tuple[int, str]] = []
        hooks = [
            module.register_forward_hook(lambda m, i, o, at=(n, name), ran=ran: ran.append(at))
            for n, block in enumerate(blocks)
            for name, module in block.named_modules()
            if name in ("", "attn")
        ]
        found = teacher.features(noisy, context, sigma, text, [f"{tap}.modulated"])[f"{tap}.modulated"]
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            expected = object_tokens(teacher, by_hand(teacher.family, blocks[depth], given[depth]), text)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert max((n for n, _ in ran), default=-1) == depth - 1, (
            "neither the attention of the block nor the block ends"
        )
        shape = teacher.tap_shape(f"{tap}.modulated")
        assert found.shape == (2, shape.tokens, shape.channels)


def test_raw_and_modulated_taps_of_every_block_come_out_of_one_pass(teacher):
    given = inputs(teacher)
    taps = teacher.taps(modulated=True)
    assert len(taps) == 2 * len(teacher.taps()) - 1
    assert [tap for tap in taps if not tap.endswith(".modulated")] == teacher.taps()
    found = teacher.features(*given, taps[::-1])
    assert list(found) == taps[::-1]
    for tap in (taps[0], taps[3], taps[-3]):
        assert torch.equal(found[tap], teacher.features(*given, [tap])[tap])


def test_a_reused_context_is_seen_by_modulated_taps(folders):
    reused = load_teacher(str(folders["flux2"]), resolution=64, dtype=torch.float32, device="cpu", context="reused")
    noisy, context, sigma, text = inputs(reused)
    taps = ["double.1.modulated", "single.1.modulated"]
    for name, tokens in reused.features(noisy, context, sigma, text, taps).items():
        assert torch.equal(tokens, reused.features(noisy, context, sigma, text, [name])[name])
        assert not torch.allclose(tokens, reused.features(noisy, context + 1, sigma, text, [name])[name], atol=1e-3)


@pytest.mark.parametrize("name", [name for name in TEACHERS if name.startswith("flux")])
def test_the_flux_families_are_read_in_their_middle_unless_told_otherwise(name):
    [tap] = preset_values("cars", name)["build"]["taps"]
    architecture = outline_teacher(name).architecture
    assert tap == architecture.middle()
    blocks = len(architecture.taps())
    assert architecture.place(tap, name) == Place(blocks // 2, modulated=True)
    assert architecture.place("hidden", name) == Place(blocks - 1)


def test_so_are_folders_of_these_families_unless_a_tap_is_named(folders):
    assert make_config("cars", str(folders["flux"])).build.taps == ("single.0.modulated",)
    assert make_config("cars", str(folders["flux2"])).build.taps == ("single.0.modulated",)
    assert make_config("cars", str(folders["sd3"])).build.taps == ("hidden",)
    assert make_config("cars", str(folders["flux"]), ["build.taps=hidden"]).build.taps == ("hidden",)
    assert make_config("cars", "/no/such/folder").build.taps == ("hidden",), "who opens it says that it is not there"


def test_the_demo_teacher_is_read_at_its_end():
    assert preset_values("demo")["build"].get("taps", ["hidden"]) == ["hidden"]


@pytest.mark.parametrize(
    ("taps", "run"),
    [
        (("single.9.modulated",), 28),
        (("single.9",), 29),
        (("double.0.modulated",), 0),
        (("double.3", "single.0"), 20),
        (("hidden",), 57),
        (("velocity", "double.0"), 57),
    ],
)
def test_how_many_blocks_a_pass_runs_is_known_before_any_weight_is_loaded(taps, run):
    assert outline_teacher("flux-dev").architecture.blocks_run(taps, "flux-dev") == run
