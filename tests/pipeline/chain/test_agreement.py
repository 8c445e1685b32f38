"""What does not fit together is said before it costs days: in the plan of a run, and by each step."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cache_schema.errors import DitDistillError
from pipeline.chain.agreement import planned, remarks_on, remarks_on_plan
from pipeline.chain.text import forecast_text
from pipeline.cli import app
from pipeline.config import make_config
from pipeline.teachers import outline_teacher
from pipeline.teachers.architecture import INDEX_NAME

KLEIN = Path(__file__).parents[3] / "pipeline/teachers/published/flux-2-klein-4b"


def remarks(teacher: str, *settings: str, steps=("refine", "build")) -> list[str]:
    config = make_config("cars", teacher, settings)
    return remarks_on_plan(config, outline_teacher(teacher), steps)


def test_the_plan_of_a_step_distilled_teacher_at_28_steps_warns_before_stage_one_is_paid_for():
    trained, built = remarks("flux2-klein")
    assert "Stage I trains it at all noise levels" in trained
    assert "not trained at the noise levels of 28" in built
    assert remarks("flux2-klein", "build.num_steps=4", "build.timesteps=1,2,3,4", steps=["build"]) == []
    assert remarks("flux2-klein", steps=["verify"]) == []
    assert remarks("flux2-klein-base") == remarks("flux-kontext") == []


def test_guidance_that_was_asked_for_of_a_teacher_that_reads_none_is_named():
    said = "warning: --guidance 5 changes nothing: the teacher flux2-klein-base embeds no guidance"
    assert remarks("flux2-klein-base", "teacher.guidance=5") == [said]
    assert remarks("flux2-klein-base", "teacher.guidance=5", steps=["verify"]) == []
    assert remarks("flux2-klein-base", "teacher.guidance=3.5") == remarks("flux-kontext", "teacher.guidance=5") == []
    asked = make_config("cars", "flux2-klein-base", ["teacher.guidance=5"]).teacher
    assert remarks_on(planned(asked), None, 28, asked) == [said]


def test_a_run_prints_what_its_plan_warns_of(tmp_path):
    command = ["run", "--teacher", "flux2-klein", "--limit", "2", "--dry-run", "--output", str(tmp_path)]
    said = CliRunner().invoke(app, command).output
    assert "warning: flux2-klein is distilled to a few steps, and Stage I trains it at all noise levels" in said
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert len(found["warnings"]) == 2
    assert forecast_text(found).endswith(found["warnings"][-1])


@pytest.mark.parametrize(("name", "said"), [("Flux2KleinPipeline", True), ("Flux2KleinKVPipeline", False)])
def test_a_folder_is_step_distilled_where_it_says_so_and_where_its_pipeline_has_no_other_weights(name, said, tmp_path):
    shutil.copytree(KLEIN, tmp_path / "klein")
    index = (
        json.loads((KLEIN / INDEX_NAME).read_text()) | {"_class_name": name} | ({"is_distilled": True} if said else {})
    )
    (tmp_path / "klein" / INDEX_NAME).write_text(json.dumps(index))
    assert outline_teacher(str(tmp_path / "klein")).step_distilled
    assert not outline_teacher(str(KLEIN)).step_distilled


def test_a_guidance_of_stage_one_alone_is_said_and_one_that_nothing_reads_is_refused():
    assert remarks("flux-dev", "refine.train_guidance=1") == [
        "warning: Stage I runs with guidance 1, the build with 3.5"
    ]
    assert remarks("flux-dev", "refine.train_guidance=3.5") == []
    with pytest.raises(DitDistillError, match="--train-guidance 1: the teacher flux2-klein-base embeds no guidance"):
        remarks("flux2-klein-base", "refine.train_guidance=1")


def test_workers_that_load_the_teacher_elsewhere_are_told_the_same(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (tmp_path / "refine.json").write_text(json.dumps({"identity": {"guidance": 1.0, "resolution": 512}}))
    teacher = planned(make_config("cars", "flux-dev").teacher)
    assert remarks_on(teacher, tmp_path, 28) == [
        f"warning: the LoRA {tmp_path} was refined with guidance 1.0, this runs with guidance 3.5"
    ]


def test_a_probe_says_it_too(flux_folder, tmp_path):
    (tmp_path / "lora").mkdir()
    command = ["refine", "--teacher", str(flux_folder), "--resolution", "32", "--limit", "24", "--steps", "1",
               "--validation-images", "2", "--output", str(tmp_path / "lora")]  # fmt: skip
    assert CliRunner().invoke(app, command).exit_code == 0
    command = ["probe", "--teacher", str(flux_folder), "--resolution", "48", "--limit", "42", "--lora",
               str(tmp_path / "lora"), "--taps", "velocity", "--timesteps", "28", "--images", "4", "--per-class", "2",
               "--output", str(tmp_path / "probe")]  # fmt: skip
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    assert "was refined with resolution 32, this runs with resolution 48" in said.output


def test_the_build_mirrors_what_stage_one_mirrors():
    for dataset in ("cars", "cub", "dogs", "folder", "nabirds"):
        config = make_config(dataset, "flux-kontext")
        assert (config.refine.flip, "hflip" in config.build.views, config.refine.grad_clip) == (True, True, 1.0)
    said = CliRunner().invoke(app, ["refine", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    assert "--no-flip" in said
    assert "for a build that caches the view hflip; default flip, demo no-flip." in said
