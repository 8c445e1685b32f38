"""Runs that were made before methods had names: their config says `mode` and holds the fields of every mode."""

import json

import pytest
import torch

from trainer.evaluation.evaluate import evaluate_run
from trainer.methods.settings import load_config, migrate
from trainer.methods.trained import load_trained
from trainer.reports.report import load_runs, summarise
from trainer.training.loop import train
from trainer.training.run_folder import check_run

CPU = torch.device("cpu")

# As such a version wrote it, field by field.
OLD_CONFIG = {
    "cache": "", "mode": "distill", "seed": 0, "epochs": 3, "updates": 2, "batch_size": 6, "unlabeled_per_batch": 0,
    "tap": "hidden", "timesteps": None, "views": None, "augment": "none", "device": "cpu", "precision": "auto",
    "workers": 0, "threads": 1, "image_memory_gb": 1.0, "verify_reads": True, "log_every": 1, "eval_every": 0,
    "checkpoint_every": 1,
    "student": {
        "name": "vit_tiny_patch16_224", "pretrained": False, "weights": None, "img_size": 24, "patch_size": 12,
        "depth": 1, "embed_dim": 32, "num_heads": 2, "drop_path_rate": None, "extra": {},
    },
    "gim": {
        "queries": 3, "bridge_layers": 1, "infuse_layers": 1, "heads": None, "ffn_ratio": 4.0,
        "position_embedding": True, "timestep_embedding": True, "token_norm": "layer", "final_norm": True,
        "mask_student": 0.0, "detach_student": False,
    },
    "loss": {
        "tau": 0.05, "alpha": 1.0, "alpha_warmup": 0.0, "drc_on": "ed", "drc_student_weight": 1.0,
        "share_proxies": True, "cal": "raw", "cal_target": "as_trained", "stop_gradient": False,
    },
    "optim": {
        "name": "adam", "lr": 0.001, "weight_decay": 0.0, "warmup": 0.0, "final_lr_ratio": 0.0, "grad_clip": None,
        "gim_lr_scale": 1.0, "proxy_lr_scale": 1.0,
    },
}  # fmt: skip


@pytest.fixture
def old_run(tiny_config, cache, cache_path, tmp_path):
    """A run's folder with its config and result in the old form; weights and log have kept theirs."""

    def make(mode):
        run = tmp_path / mode
        train(tiny_config(updates=2, mode=mode), cache, run)
        scores = evaluate_run(run, cache, CPU, load_trained)[0]
        config = {**OLD_CONFIG, "cache": str(cache_path), "mode": mode}
        (run / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        result = json.loads((run / "result.json").read_text())
        del result["method"]
        (run / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        return run, scores

    return make


@pytest.mark.parametrize("mode", ["baseline", "distill"])
def test_an_old_run_is_evaluated_and_reported_as_it_was(old_run, cache, mode):
    run, scores = old_run(mode)
    assert evaluate_run(run, cache, CPU, load_trained)[0] == scores
    summary = summarise(load_runs([run], cache, CPU), cache.manifest.cache_id, 1.0)
    assert summary[mode]["student_updates"] == 2


@pytest.mark.parametrize("mode", ["baseline", "distill"])
def test_an_old_config_is_that_of_the_method_its_mode_stands_for(old_run, tiny_config, mode):
    run, _ = old_run(mode)
    (run / "result.json").unlink()  # as if it had not come to its end
    assert load_config(run / "config.json") == tiny_config("image_memory_gb=1.0", "workers=0", updates=2, mode=mode)
    check_run(run, tiny_config(updates=2, mode=mode), resume=True)


def test_fields_of_other_modes_are_dropped_and_no_others():
    baseline = migrate({**OLD_CONFIG, "mode": "baseline"})
    assert baseline["loss"] == {"tau": 0.05}
    assert "gim_lr_scale" not in baseline["optim"]
    assert not {"gim", "tap", "timesteps", "unlabeled_per_batch", "mode"} & set(baseline)
    kept = migrate(OLD_CONFIG)
    old = {name: value for name, value in OLD_CONFIG.items() if name != "tap"}  # which is what no tap means now
    assert {**kept, "mode": "distill"} == {**old, "method": "gcd", "augment": {}}
