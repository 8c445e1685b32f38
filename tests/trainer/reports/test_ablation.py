import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_schema.errors import CacheUnsealed
from trainer.cli import app
from trainer.errors import TrainError
from trainer.reports import ablation_run
from trainer.reports.ablation_plan import (
    VARIANTS,
    Variant,
    choose_variants,
    left_out,
    make_cells,
    read_sweep,
    unlabelled_of,
)
from trainer.reports.ablation_run import run_cells
from trainer.reports.ablation_table import as_csv, as_markdown, tabulate
from trainer.reports.control_targets import TIMESTEP
from trainer.runs import load_result

TINY = ("updates=2", "epochs=1")


def test_a_run_is_told_apart_by_its_config_and_not_by_where_its_cache_lies(cache):
    def name(path="a", **settings):
        given = [f"{field.replace('__', '.')}={value}" for field, value in settings.items()]
        return make_cells(path, [VARIANTS["gcd"]], 1, "small", given)[0].name

    assert name() == name("b") == name(log_every=3)
    assert name() != name(loss__alpha=3)


def test_settings_are_for_the_methods_that_have_them(cache):
    cells = make_cells("a", [VARIANTS["baseline"], VARIANTS["gcd"]], 2, "small", ["loss.alpha=3", "epochs=4"])
    assert [(cell.config.method, cell.config.seed, cell.config.epochs) for cell in cells] == [
        ("baseline", 0, 4), ("gcd", 0, 4), ("baseline", 1, 4), ("gcd", 1, 4)
    ]  # fmt: skip
    assert cells[1].config.loss.alpha == 3
    with pytest.raises(TrainError, match=r"no such field: loss\.alfa"):
        make_cells("a", [VARIANTS["gcd"]], 1, "small", ["loss.alfa=3"])


def test_an_ablation_of_the_paper_preset_wants_weights_as_a_run_does():
    with pytest.raises(TrainError, match=r"preset paper trains a pretrained student: .*student\.pretrained=true"):
        make_cells("a", [VARIANTS["gcd"]], 1, "paper", [])
    assert make_cells("a", [VARIANTS["gcd"]], 1, "paper", ["student.weights=some.safetensors"])


def test_a_run_is_told_apart_by_how_often_it_is_scored_where_its_training_goes_by_that():
    def names(*settings):
        return {make_cells("a", [VARIANTS["gcd"]], 1, "small", [*settings, f"eval_every={n}"])[0].name for n in (1, 2)}

    assert len(names("validation_classes=0.2")) == 1
    assert len(names("validation_classes=0.2", "loss.alpha_gate=validation")) == 2


def test_controls_without_a_teacher_take_the_unlabelled_images_that_the_method_takes():
    chosen = [VARIANTS[name] for name in ("baseline", "gcd", "pseudo-labels", "consistency")]

    def taken(preset, *settings):
        configs = [cell.config for cell in make_cells("a", chosen, 1, preset, settings)]
        assert [config.unlabelled.by for config in configs[2:]] == ["pseudo", "consistency"]
        assert configs[0].unlabelled.per_batch == 0
        return [(configs[1].unlabeled_per_batch, configs[1].unlabeled_from)] + [
            (config.unlabelled.per_batch, config.unlabelled.images_from) for config in configs[2:]
        ]

    assert taken("demo") == 3 * [(32, "unlabeled")]
    assert taken("small", "unlabeled_per_batch=8", "unlabeled_from=both") == 3 * [(8, "both")]
    assert taken("small")[1:] == 2 * [(32, "unlabeled")]  # where the method takes none


@pytest.mark.parametrize(("setting", "option"), [("seed=5", "seeds"), ("method=gcd", "variants"), ("cache=b", "cache")])
def test_what_tells_runs_apart_is_no_setting_of_all_of_them(setting, option):
    for given in (lambda: make_cells("a", [VARIANTS["gcd"]], 2, "small", [setting]), lambda: read_sweep(setting)):
        with pytest.raises(TrainError, match=f"is chosen by --{option}: a setting would make"):
            given()


def test_a_control_of_one_timestep_draws_none_whatever_all_runs_are_told():
    told = ["loss.align=relational", "timesteps_per_step=none"]
    (cell,) = make_cells("a", [VARIANTS["pixels-by-gim"]], 1, "recommended", told, {"pixels": Path("pixels")})
    assert (cell.config.timesteps, cell.config.timesteps_per_step) == ((TIMESTEP,), None)


def test_a_cache_that_is_not_sealed_is_compared_on_where_that_is_asked_for(make_cache, tiny_settings, tmp_path):
    partial = make_cache(seal=False)
    cells = make_cells(str(partial.root), [VARIANTS["baseline"]], 1, "small", [*tiny_settings[1::2], "updates=1"])
    with pytest.raises(CacheUnsealed):
        list(run_cells(cells, tmp_path / "runs", "test", 1))
    (scored,) = run_cells(cells, tmp_path / "runs", "test", 1, allow_partial=True)
    assert scored.result["cache_id"] == partial.manifest.cache_id


def test_a_sweep_is_a_variant_for_each_value():
    assert [v.settings for v in read_sweep("timesteps=10/10,22")] == [("timesteps=10",), ("timesteps=10,22",)]
    with pytest.raises(TrainError, match="write FIELD=VALUE/VALUE"):
        read_sweep("gim.queries=4//8")
    with pytest.raises(TrainError, match=r"no such field: gim\.querys"):
        read_sweep("gim.querys=4")


def test_what_gcd_would_be_without_unlabelled_images_is_made_only_where_it_takes_some(cache):
    none, some = unlabelled_of("recommended", []), unlabelled_of("recommended", ["unlabeled_per_batch=8"])
    assert "no-unlabelled" not in {v.name for v in choose_variants(cache, [], [], None, taken=none)}
    assert any("no-unlabelled would be gcd once more" in reason for reason in left_out(cache, taken=none))
    assert "no-unlabelled" in {v.name for v in choose_variants(cache, [], [], None, taken=some)}


def test_controls_are_those_that_a_cache_allows(cache, make_cache):
    assert "pseudo-labels" in {v.name for v in choose_variants(cache, [], [], None)}
    bare = make_cache(classes={"train": (0, 1), "test": (10, 11)}, feature_splits=("train", "test"))
    assert not {v.name for v in choose_variants(bare, [], [], None)} & {"pseudo-labels", "no-unlabelled"}
    with pytest.raises(TrainError, match="pseudo-labels needs unlabelled images"):
        choose_variants(bare, ["pseudo-labels"], [], None)
    taken = unlabelled_of("small", ["unlabeled_from=train", "unlabeled_per_batch=8"])
    again = choose_variants(bare, [], [], None, taken=taken)
    assert {"pseudo-labels", "consistency", "no-unlabelled"} <= {v.name for v in again}
    with pytest.raises(TrainError, match="there is no 'magic'"):
        choose_variants(cache, ["magic"], [], None)
    assert [v.name for v in choose_variants(cache, ["gcd"], [], "r")] == ["baseline", "gcd", "random-teacher"]


@pytest.fixture
def cells(cache, cache_path, tiny_settings):
    settings = [*tiny_settings[1::2], *TINY]
    variants = [VARIANTS[name] for name in ("baseline", "gcd")]
    return make_cells(str(cache_path), variants, 2, "small", settings), variants


def test_finished_runs_are_not_made_again_and_the_tables_pair_them(cells, make_cache, tmp_path, monkeypatch):
    cells, variants = cells
    first = list(run_cells(cells, tmp_path, "test", 1))
    monkeypatch.setattr(ablation_run, "run_cell", None)
    again = list(run_cells(cells, tmp_path, "test", 1))
    rows = tabulate(again, variants)
    assert as_markdown(rows).splitlines()[2:] == as_markdown(tabulate(first, variants)).splitlines()[2:]
    assert rows[0].gain is None
    gain = np.mean(rows[1].column("recall_at_1")) - np.mean(rows[0].column("recall_at_1"))
    assert rows[1].gain.value == pytest.approx(gain)
    lines = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [(line["variant"], line["seed"]) for line in lines] == [
        ("baseline", "0"), ("baseline", "1"), ("gcd", "0"), ("gcd", "1")
    ]  # fmt: skip
    assert float(lines[2]["ed_masked"]) == rows[1].auxiliary("masked")[0]
    other = str(make_cache("other", content="other").root)  # whose runs would have the same names
    elsewhere = [replace(cell, config=cell.config.model_copy(update={"cache": other})) for cell in cells]
    with pytest.raises(TrainError, match="give another --output"):
        list(run_cells(elsewhere, tmp_path, "test", 1))


def test_runs_of_features_that_are_others_now_are_not_taken_for_these(
    cache_path, make_cache, tiny_settings, tmp_path, monkeypatch
):
    other = make_cache("other")
    variant = Variant("others", "", "gcd", (f"features={other.root}",))
    (cell,) = make_cells(str(cache_path), [variant], 1, "small", [*tiny_settings[1::2], *TINY])
    list(run_cells([cell], tmp_path / "runs", "test", 1))
    monkeypatch.setattr(ablation_run, "run_cell", None)
    assert len(list(run_cells([cell], tmp_path / "runs", "test", 1))) == 1
    shutil.rmtree(other.root)
    make_cache("other", tokens=6)
    with pytest.raises(TrainError, match="give another --output"):
        list(run_cells([cell], tmp_path / "runs", "test", 1))
    result = tmp_path / "runs" / cell.name / "result.json"  # as older versions wrote it
    result.write_text(json.dumps({n: value for n, value in load_result(result.parent).items() if n != "other_caches"}))
    assert len(list(run_cells([cell], tmp_path / "runs", "test", 1))) == 1


def test_the_command_makes_runs_and_tables(cache_path, tiny_settings, tmp_path):
    arguments = ["ablate", "--cache", cache_path, "--output", tmp_path, "--variants", "relational", "--seeds", 1,
                 "--preset", "small", *tiny_settings, "--set", "updates=2"]  # fmt: skip
    planned = CliRunner().invoke(app, [*map(str, arguments), "--plan"])
    assert planned.exit_code == 0
    assert not list(tmp_path.iterdir())
    found = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert "2 of 2" in found.output
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == set(planned.output.split())
    assert all((tmp_path / f"ablation.{kind}").stat().st_size for kind in ("csv", "md", "png"))


KILLED = """
import sys
from pathlib import Path
from trainer.reports.ablation_plan import VARIANTS, make_cells
from trainer.reports.ablation_run import run_cells

if __name__ == "__main__":
    cells = make_cells(sys.argv[1], [VARIANTS["baseline"], VARIANTS["gcd"]], 1, "small", sys.argv[3:])
    for scored in run_cells(cells, Path(sys.argv[2]), "test", 2):
        print("made", scored.cell.name, flush=True)
"""


def test_two_jobs_make_the_numbers_of_one_and_end_with_a_killed_ablation_that_goes_on(
    cells, cache_path, tiny_settings, tmp_path
):
    cells = [cell for cell in cells[0] if cell.config.seed == 0]
    script = tmp_path / "ablation.py"
    script.write_text(KILLED)
    command = [sys.executable, script, cache_path, tmp_path / "two", *tiny_settings[1::2], *TINY]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        first = next(line.split()[1] for line in process.stdout if line.startswith("made "))
        process.kill()
        process.stdout.read()  # to its end: the workers, who hold it open too, have ended
    made = [cell for cell in cells if (tmp_path / "two" / cell.name / "queries-test.json").is_file()]
    assert first in [cell.name for cell in made]
    together = {run.cell.name: run for run in run_cells(cells, tmp_path / "two", "test", 1)}
    for run in run_cells(cells, tmp_path / "one", "test", 1):
        assert together[run.cell.name].scores == run.scores
        assert together[run.cell.name].result["final_losses"] == run.result["final_losses"]
