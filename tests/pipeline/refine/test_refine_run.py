"""Stage I as a run: it goes on where it was killed, on any number of processes, and shows what it learns."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_teachers import encode_conditions

from cache_schema.errors import DitDistillError
from pipeline.refine import RefineConfig, cdr_loss, refine
from pipeline.refine.checkpoint import Progress, newest_progress, save_checkpoint
from pipeline.refine.draws import noise_of, rows_of
from pipeline.refine.metrics import MetricsLog
from pipeline.teachers.lora import add_lora

CONFIG = RefineConfig(
    steps=8,
    batch=2,
    lr=1e-2,
    rank=2,
    validation_images=4,
    validate_every=4,
    checkpoint_every=3,
    pictures_every=4,
    picture_images=2,
)
LORA = "pytorch_lora_weights.safetensors"

# One Stage I run in a process of its own, on the tiny teacher and data set of the tests.
CHILD = """
import importlib.util, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("fixtures", sys.argv[1])
fixtures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)
from pipeline.refine import RefineConfig, refine
dataset = fixtures.make_tiny_dataset()
teacher = fixtures.FluxTeacher(Path(sys.argv[2]), resolution=fixtures.RESOLUTION)
refine(teacher, dataset, RefineConfig(**json.loads(sys.argv[4])), Path(sys.argv[3]))
"""


# Before that, the second of two processes is told to stop at its second step; it says where both of them left.
STOPPED = """
import os, signal
def stopping(self, *args):
    if os.environ["RANK"] == "1" and torch.is_grad_enabled():
        steps.append(None)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    return predict(self, *args)
steps, predict = [], fixtures.FluxTeacher.predict
fixtures.FluxTeacher.predict = stopping
try:
    refine(teacher, dataset, RefineConfig(**json.loads(sys.argv[4])), Path(sys.argv[3]))
except KeyboardInterrupt:
    Path(sys.argv[3], "stopped-" + os.environ["RANK"]).touch()
fixtures.FluxTeacher.predict = predict
teacher = fixtures.FluxTeacher(Path(sys.argv[2]), resolution=fixtures.RESOLUTION)
"""


def child(flux_folder: Path, output: Path, prefix: list[str], **settings: object) -> list[str]:
    fixtures = Path(__file__).parents[1] / "conftest.py"
    return [*prefix, str(fixtures), str(flux_folder), str(output), json.dumps(settings)]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


class Killed(Exception):  # noqa: N818 - what happened
    pass


def refine_until(load_teacher, dataset, output, step):
    """Run Stage I and leave it abruptly when the given step is about to be computed."""
    teacher = load_teacher()
    predict, calls = teacher.predict, 0

    def counting(*args):
        nonlocal calls
        if torch.is_grad_enabled():
            calls += 1
            if calls == step:
                raise Killed
        return predict(*args)

    teacher.predict = counting
    with pytest.raises(Killed):
        refine(teacher, dataset, CONFIG, output, log=str)


def test_a_run_that_was_cut_short_ends_where_the_uninterrupted_one_does(load_teacher, tiny_dataset, tmp_path):
    whole = refine(load_teacher(), tiny_dataset, CONFIG, tmp_path / "whole", log=str)
    for step in (5, 3):  # in the second run: step 3 + 3
        refine_until(load_teacher, tiny_dataset, tmp_path / "cut", step)
    said = []
    resumed = refine(load_teacher(), tiny_dataset, CONFIG, tmp_path / "cut", log=said.append)

    assert said[0].startswith("going on from step 3 of 8")
    assert resumed["lora_digest"] == whole["lora_digest"]
    assert resumed["validation"] == whole["validation"]
    assert (tmp_path / "cut/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    assert not list((tmp_path / "cut").glob("*checkpoint*"))


@pytest.fixture
def one_thread():
    """Sums over several threads are rounded in another order in every process."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.mark.usefixtures("one_thread")
def test_what_was_measured_is_in_the_file_at_once_and_goes_on_after_a_kill(tmp_path):
    with MetricsLog(tmp_path, 0) as killed:
        for step in (1, 2, 3):
            killed.write(step, loss=0.5)
        assert losses(tmp_path) == [0.5] * 3
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')
        with MetricsLog(tmp_path, 2) as resumed:
            resumed.write(3, loss=0.25)
        assert losses(tmp_path) == [0.5, 0.5, 0.25]


def test_a_killed_process_resumes_from_a_whole_checkpoint(load_teacher, flux_folder, tiny_dataset, tmp_path):
    settings = {"steps": 100_000, "batch": 2, "lr": 1e-2, "rank": 2, "validation_images": 4, "checkpoint_every": 1}
    command = child(flux_folder, tmp_path / "run", [sys.executable, "-c", CHILD], **settings)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list((tmp_path / "run").glob("checkpoint-*")):
            os.sched_yield()
        process.send_signal(signal.SIGKILL)
    (folder,) = sorted((tmp_path / "run").glob("checkpoint-*"))[-1:]
    step = int(folder.name.rpartition("-")[2])
    config = RefineConfig(**settings | {"steps": step + 2})

    resumed = refine(load_teacher(), tiny_dataset, config, tmp_path / "run", log=str)
    whole = refine(load_teacher(), tiny_dataset, config, tmp_path / "whole", log=str)
    assert resumed["lora_digest"] == whole["lora_digest"]


def test_a_run_that_is_told_to_stop_saves_the_step_it_is_at(load_teacher, tiny_dataset, tmp_path):
    teacher, said = load_teacher(), []
    predict = teacher.predict

    def stopping(*args):
        if torch.is_grad_enabled():
            said.append("step")
            if said.count("step") == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        return predict(*args)

    teacher.predict = stopping
    with pytest.raises(KeyboardInterrupt):
        refine(teacher, tiny_dataset, CONFIG, tmp_path / "cut", log=said.append)
    assert said[-1] == "stopped after step 5 of 8; step 5 is kept"
    whole = refine(load_teacher(), tiny_dataset, CONFIG, tmp_path / "whole", log=str)
    resumed = refine(load_teacher(), tiny_dataset, CONFIG, tmp_path / "cut", log=said.append)
    assert any(line.startswith("going on from step 5 of 8") for line in said)
    assert resumed["lora_digest"] == whole["lora_digest"]
    assert (tmp_path / "cut/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


def test_two_processes_that_stop_together_and_go_on_compute_what_one_with_twice_the_accumulation_does(
    load_teacher, flux_folder, tiny_dataset, tmp_path
):
    settings = {"steps": 3, "batch": 1, "lr": 1e-3, "rank": 2, "validation_images": 4}
    script = tmp_path / "child.py"
    setup, last = CHILD.rstrip().rsplit("\n", 1)
    script.write_text(f"{setup}\n{STOPPED}{last}\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(
        child(flux_folder, tmp_path / "two", launch, **settings), check=True, capture_output=True, timeout=120
    )
    assert sorted(path.name for path in (tmp_path / "two").glob("stopped-*")) == ["stopped-0", "stopped-1"]
    refine(load_teacher(), tiny_dataset, RefineConfig(**settings, accumulate=2), tmp_path / "one", log=str)

    # Adam turns gradients that are nothing but rounding errors into steps of full size, so weights are not compared,
    # but what they do.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    c = encode_conditions(load_teacher(), tiny_dataset, tiny_dataset.samples[:2], "canonical")
    with torch.no_grad():
        before, one, two = (
            load_teacher(lora=lora).predict(c.object, c.context, torch.tensor([0.3, 0.7]), c.text)
            for lora in (None, tmp_path / "one", tmp_path / "two")
        )
    assert (two - one).abs().max() < (one - before).abs().max() / 100
    assert json.loads((tmp_path / "two/refine.json").read_text())["processes"] == 2


def test_a_finished_run_is_left_as_it_is(load_teacher, tiny_dataset, tmp_path):
    first = refine(load_teacher(), tiny_dataset, CONFIG, tmp_path, log=str)
    before = (tmp_path / LORA).stat().st_mtime_ns
    said = []
    assert refine(load_teacher(), tiny_dataset, CONFIG, tmp_path, log=said.append) == first
    assert (tmp_path / LORA).stat().st_mtime_ns == before
    assert "refined already" in said[0]


@pytest.mark.parametrize(("change", "named"), [({"lr": 1e-3}, "lr was 0.01, now it is 0.001"), ({"steps": 9}, "steps")])
def test_other_settings_do_not_overwrite_a_finished_run(load_teacher, tiny_dataset, tmp_path, change, named):
    refine(load_teacher(), tiny_dataset, CONFIG, tmp_path, log=str)
    with pytest.raises(DitDistillError, match=named):
        refine(load_teacher(), tiny_dataset, RefineConfig(**{**vars(CONFIG), **change}), tmp_path, log=str)


def test_other_settings_do_not_go_on_from_a_checkpoint(load_teacher, tiny_dataset, tmp_path):
    refine_until(load_teacher, tiny_dataset, tmp_path, 5)
    with pytest.raises(DitDistillError, match="seed was 0, now it is 1"):
        refine(load_teacher(), tiny_dataset, RefineConfig(**{**vars(CONFIG), "seed": 1}), tmp_path, log=str)


def test_fewer_steps_than_were_made_are_refused_and_as_many_are_measured(load_teacher, tiny_dataset, tmp_path):
    refine_until(load_teacher, tiny_dataset, tmp_path, 5)  # at step 4, the checkpoint is of step 3
    few, as_many = (RefineConfig(**{**vars(CONFIG), "steps": steps}) for steps in (2, 3))
    with pytest.raises(DitDistillError, match="has come to step 3 already: give --steps 3 or more"):
        refine(load_teacher(), tiny_dataset, few, tmp_path, log=str)
    record = refine(load_teacher(), tiny_dataset, as_many, tmp_path, log=str)
    assert [at["step"] for at in record["validation"]] == [0, 3]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(load_teacher, tiny_dataset, tmp_path, name):
    refine_until(load_teacher, tiny_dataset, tmp_path, 5)
    file = tmp_path / "checkpoint-00000003" / name
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DitDistillError, match="checkpoint-00000003: not a checkpoint that can be read"):
        refine(load_teacher(), tiny_dataset, CONFIG, tmp_path, log=str)


def test_a_run_leaves_pictures_events_and_a_card(load_teacher, tiny_dataset, tmp_path):
    record = refine(load_teacher(), tiny_dataset, CONFIG, tmp_path, log=str)

    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["step-000004.png", "step-000008.png"]
    # Context, object and four noise levels side by side; two images below each other.
    width, height = Image.open(tmp_path / "pictures" / pictures[0]).size
    assert width > 6 * 160
    assert height > 2 * 160
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("validation_loss")] == [4, 8]
    card = (tmp_path / "README.md").read_text()
    assert record["lora_digest"][:12] in card
    assert f"| 8 | {record['validation'][-1]['validation_loss']:.4f} |" in card


def test_a_checkpoint_that_finds_no_room_says_so(tmp_path, no_large_files):
    weight = torch.nn.Parameter(torch.zeros(50_000))
    with pytest.raises(DitDistillError, match=r"cannot write .*tensors\.safetensors: File too large; raise the file"):
        save_checkpoint(tmp_path, Progress({}), {"a": weight}, torch.optim.Adam([weight]))
    assert newest_progress(tmp_path) is None


def test_gradient_checkpointing_changes_no_gradient(load_teacher, tiny_dataset):
    grads = []
    for checkpointing in (False, True):
        teacher = load_teacher()
        parameters = add_lora(teacher.transformer, 2, seed=0)
        for place, parameter in enumerate(parameters):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)) / 20
        if checkpointing:
            teacher.transformer.enable_gradient_checkpointing()
        conditions = encode_conditions(teacher, tiny_dataset, tiny_dataset.samples[:2], "canonical")
        noise, sigma = noise_of(0, 0, 0, tuple(conditions.object.shape))
        cdr_loss(teacher, conditions, noise, sigma).backward()
        grads.append([p.grad for p in parameters])
    for plain, again in zip(*grads, strict=True):
        assert (plain is None) == (again is None)
        if plain is not None:
            torch.testing.assert_close(again, plain)


def test_decoding_undoes_encoding_as_far_as_the_vae_can(teacher):
    pixels = torch.randint(0, 256, (2, 3, teacher.resolution, teacher.resolution), dtype=torch.uint8)
    latents = teacher.encode_images(pixels)
    decoded = teacher.decode_images(latents)
    expected = teacher.vae.decode(teacher.vae.encode(pixels / 127.5 - 1).latent_dist.mode()).sample
    assert decoded.dtype == torch.uint8
    assert (decoded.float() - ((expected + 1) * 127.5).clamp(0, 255)).abs().max() <= 1


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 30), st.integers(1, 10))
def test_every_epoch_shows_every_image_once_however_the_work_is_cut(seed, slots, batch, count, epochs):
    per_step = slots * batch
    steps = -(-epochs * count // per_step)
    seen = [
        row for step in range(steps) for slot in range(slots) for row in rows_of(seed, step, slot, slots, batch, count)
    ]
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert seen == [row for n in range(len(seen)) for row in rows_of(seed, n, 0, 1, 1, count)]
