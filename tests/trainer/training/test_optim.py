"""What decays, what moves how fast, and what a batch that is cut into parts adds up to."""

import pytest
import torch
from safetensors.torch import load_file

from trainer.errors import TrainError
from trainer.methods.method import Moment
from trainer.training.assembly import assemble
from trainer.training.loop import train
from trainer.training.step import train_step

CPU = torch.device("cpu")
START = Moment(0, 4)


def settings_by_name(parts) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in parts.method.named_parameters()}
    groups = parts.optimizer.param_groups
    found = {
        names[id(p)]: {k: group[k] for k in ("weight_decay", "lr_scale")} for group in groups for p in group["params"]
    }
    assert set(found) == set(names.values())
    return found


def test_matrices_decay_and_norms_biases_embeddings_tokens_and_proxies_do_not(cache, tiny_config):
    of = settings_by_name(assemble(tiny_config("optim.name=adamw", "optim.weight_decay=0.1"), cache))
    decayed = {name for name, group in of.items() if group["weight_decay"]}
    assert {group["weight_decay"] for group in of.values()} == {0.0, 0.1}
    assert {"student.network.blocks.0.attn.qkv.weight", "student.network.patch_embed.proj.weight",
            "gim.tokens.project.weight"} <= decayed  # fmt: skip
    assert not {"student.network.pos_embed", "student.network.cls_token", "student.network.norm.weight", "gim.queries",
                "gim.mask_token", "gim.tokens.position", "gim.tokens.timestep", "drc.proxies"} & decayed  # fmt: skip
    assert not [name for name in decayed if name.endswith(".bias") or "norm" in name]


def test_layers_move_the_slower_the_earlier_they_are(cache, tiny_config):
    plain = settings_by_name(assemble(tiny_config(optim__proxy_lr_scale=7), cache))
    of = settings_by_name(
        assemble(tiny_config("optim.layer_decay=0.5", "student.depth=2", optim__proxy_lr_scale=7), cache)
    )
    scale = {name: group["lr_scale"] for name, group in of.items()}
    assert scale["student.network.norm.weight"] == 1
    assert scale["student.network.blocks.1.attn.qkv.weight"] == 1
    assert scale["student.network.blocks.0.attn.qkv.weight"] == 0.5
    assert scale["student.network.patch_embed.proj.weight"] == 0.25
    assert (scale["drc.proxies"], plain["drc.proxies"]["lr_scale"], scale["gim.queries"]) == (7, 7, 1)


@pytest.mark.parametrize("mode", ["baseline", "distill"])
def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole(cache, tiny_config, mode):
    extra = ["unlabeled_per_batch=3"] if mode == "distill" else []
    losses, gradients = {}, {}
    for count in (1, 3):
        config = tiny_config(f"optim.accumulate={count}", "precision=float32", *extra, mode=mode)
        parts = assemble(config, cache)
        losses[count] = train_step(parts.method, parts.optimizer, parts.batches[0].to(CPU), 1e-3, config, START)
        gradients[count] = {name: parameter.grad for name, parameter in parts.method.named_parameters()}
    torch.testing.assert_close(losses[3], losses[1])
    torch.testing.assert_close(gradients[3], gradients[1])


def test_a_batch_that_cannot_be_cut_into_equal_parts_is_refused(cache, tiny_config):
    with pytest.raises(TrainError, match="accumulate: 6 labelled images per update are not 4 equal parts"):
        assemble(tiny_config("optim.accumulate=4"), cache)
    with pytest.raises(TrainError, match="accumulate: 1 unlabelled images per update are not 3 equal parts"):
        assemble(tiny_config("optim.accumulate=3", "unlabeled_per_batch=1"), cache)


def test_the_student_that_is_kept_is_the_average_and_the_method_that_is_saved_with_it_too(cache, tiny_config, tmp_path):
    kept = {}
    for name, setting in (("last", "optim.ema=none"), ("average", "optim.ema=0.9")):
        train(tiny_config(setting, updates=4), cache, tmp_path / name)
        kept[name] = [load_file(tmp_path / name / file) for file in ("student.safetensors", "gim.safetensors")]
    config = tiny_config("optim.ema=0.9", updates=4)
    parts = assemble(config, cache)
    states = []
    for update in range(4):
        rate = 0.5e-3 * (1 + torch.cos(torch.tensor(torch.pi * update / 4)).item())
        train_step(parts.method, parts.optimizer, parts.batches[update].to(CPU), rate, config, Moment(update, 4))
        states.append({name: value.clone() for name, value in parts.method.student.network.state_dict().items()})
    mean = states[0]
    for step, state in enumerate(states[1:], start=1):
        decay = min(0.9, 1 - (1 + step) ** (-2 / 3))
        mean = {name: decay * value + (1 - decay) * state[name] for name, value in mean.items()}
    torch.testing.assert_close(kept["last"][0], states[-1])
    torch.testing.assert_close(kept["average"][0], mean)
    assert not torch.equal(kept["last"][1]["queries"], kept["average"][1]["queries"])


def test_a_compiled_student_has_the_names_of_one_that_is_not(cache, tiny_config):
    plain, compiled = (assemble(tiny_config(compile=flag), cache).method for flag in (False, True))
    assert compiled.student.network._compiled_call_impl is not None
    assert plain.state_dict().keys() == compiled.state_dict().keys()
