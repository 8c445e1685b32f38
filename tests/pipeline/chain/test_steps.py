"""What is cheap to know is said first, whatever it is that would take long."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pipeline.chain import steps
from pipeline.cli import app

NO_TEACHER = (["--teacher", "nowhere"], "teacher nowhere: no such folder")
NO_WEIGHTS = (["--teacher", "timm:resnet18:nowhere.safetensors"], "there is no file nowhere.safetensors")
NO_DEVICE = (["--device", "toaster"], "device 'toaster': no such device")
NO_LORA = (["--lora", "nowhere"], "LoRA nowhere: no pytorch_lora_weights.safetensors there")
NO_TAP = (["--taps", "double.99"], "has no tap 'double.99'")


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        *(("refine", wrong) for wrong in (NO_TEACHER, NO_DEVICE)),
        *(("probe", wrong) for wrong in (NO_TEACHER, NO_DEVICE, NO_LORA)),
        *(("build", wrong) for wrong in (NO_TEACHER, NO_WEIGHTS, NO_DEVICE, NO_LORA, NO_TAP)),
    ],
)
def test_what_is_wrong_with_a_teacher_is_said_before_the_data_set_is_opened(command, wrong, tmp_path, monkeypatch):
    arguments, complaint = wrong
    monkeypatch.setattr(steps, "open_data", lambda _: pytest.fail("the data set was opened"))
    found = CliRunner().invoke(app, [command, "--dataset", "demo", *arguments, "--output", str(tmp_path / "x")])
    assert complaint in str(found.exception)


def test_a_build_imports_no_library_of_diffusion_models_before_it_has_a_teacher_to_load():
    program = "import sys, pipeline.build.run; print({'diffusers', 'peft', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"
