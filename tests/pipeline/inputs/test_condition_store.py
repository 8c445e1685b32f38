"""What the DiT is conditioned on is encoded once, kept on disk, and shared."""

import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_teachers import encode_conditions
from transformers import CLIPTextModel, T5EncoderModel

from cache_schema import open_cache
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.datasets.base import DataError
from pipeline.inputs.condition_store import ConditionStore, DamagedConditions, default_store
from pipeline.probe.run import ProbeConfig, probe
from pipeline.refine import RefineConfig, refine

ENCODERS = (CLIPTextModel, T5EncoderModel, AutoencoderKL)


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Every embedding and latent, each with what changes when it is written again."""
    found = sorted(root.rglob("*.safetensors"))
    return {str(p.relative_to(root)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def encoders_in_memory() -> list[str]:
    gc.collect()
    return [type(o).__name__ for o in gc.get_objects() if isinstance(o, ENCODERS)]


@pytest.fixture
def samples(tiny_dataset):
    return tiny_dataset.samples[:5]


def test_what_is_read_is_what_the_teacher_encodes_bit_for_bit(load_teacher, tiny_dataset, samples, tmp_path):
    for use_captions in (True, False):
        store = ConditionStore(tmp_path, load_teacher(), tiny_dataset, use_captions=use_captions)
        store.prepare(samples, ["canonical", "hflip"])
        for view in ("canonical", "hflip"):
            found = store.read(samples, view)
            expected = encode_conditions(load_teacher(), tiny_dataset, samples, view, use_captions)
            for name in ("object", "context"):
                assert torch.equal(getattr(found, name), getattr(expected, name))
            assert torch.equal(found.text.tokens, expected.text.tokens)
            assert torch.equal(found.text.pooled, expected.text.pooled)


def test_half_precision_and_a_teacher_without_pooled_text_survive_the_disk(load_teacher, tiny_dataset, tmp_path):
    teacher = load_teacher(dtype=torch.bfloat16)
    store = ConditionStore(tmp_path, teacher, tiny_dataset)
    store.prepare(tiny_dataset.samples[:1])
    found = store.read(tiny_dataset.samples[:1], "canonical")
    assert found.object.dtype == found.text.tokens.dtype == torch.bfloat16


def test_nothing_is_encoded_twice_and_only_what_is_missing_is_encoded(load_teacher, tiny_dataset, samples, tmp_path):
    said = []
    first = ConditionStore(tmp_path, load_teacher(), tiny_dataset).prepare(samples, log=said.append)
    assert (first.captions, first.images) == (len({s.caption for s in samples}), 5)
    assert said == [f"encoded {first.captions} captions and 5 views into {tmp_path}"]
    before = files(tmp_path)
    again = ConditionStore(tmp_path, load_teacher(), tiny_dataset).prepare(samples, log=said.append)
    assert (again.captions, again.images, len(said)) == (0, 0, 1)
    more = ConditionStore(tmp_path, load_teacher(), tiny_dataset).prepare(samples, ["canonical", "hflip"])
    assert (more.captions, more.images) == (0, 5)
    assert {name: mark for name, mark in files(tmp_path).items() if name in before} == before


def test_what_is_stored_does_not_depend_on_what_was_encoded_beside_it(load_teacher, tiny_dataset, samples, tmp_path):
    ConditionStore(tmp_path / "all", load_teacher(), tiny_dataset).prepare(samples)
    for sample in reversed(samples):
        ConditionStore(tmp_path / "single", load_teacher(), tiny_dataset).prepare([sample])
    for name in files(tmp_path / "all"):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "single" / name).read_bytes()
    assert files(tmp_path / "all").keys() == files(tmp_path / "single").keys()


def test_stage_one_the_probe_and_the_build_share_a_store(load_teacher, tiny_dataset, tmp_path):
    config = BuildConfig(timesteps=(28,), image_size=32, encoding="float32", batch=3)
    assert default_store(tmp_path / "cache") == default_store(tmp_path / "lora") == tmp_path / "conditions"
    build(load_teacher(), tiny_dataset, config, tmp_path / "cache", log=str)
    before = files(tmp_path / "conditions")
    train = [s for s in tiny_dataset.samples if s.split in config.feature_splits]
    assert len([name for name in before if name.startswith("latents")]) == len(train)
    said = []
    refine(load_teacher(), tiny_dataset, RefineConfig(steps=1, rank=2, validation_images=2), tmp_path / "lora",
           log=said.append)  # fmt: skip
    probe(load_teacher(), tiny_dataset, ProbeConfig(taps=("hidden",), timesteps=(28,), images=8, per_class=2),
          tmp_path / "probe", log=said.append)  # fmt: skip
    assert files(tmp_path / "conditions") == before
    assert not any("encoded" in line for line in said)


def test_stage_one_encodes_only_what_it_will_see(load_teacher, tiny_dataset, tmp_path):
    def encoded(steps: int, folder: Path) -> int:
        config = RefineConfig(steps=steps, batch=2, rank=2, validation_images=2)
        refine(load_teacher(), tiny_dataset, config, folder / "lora", log=str)
        return len([name for name in files(folder / "conditions") if name.startswith("latents")])

    train = len([s for s in tiny_dataset.samples if s.split == "train"])
    assert encoded(3, tmp_path / "short") == 3 * 2 + 2
    assert encoded(train, tmp_path / "epochs") == train


def test_text_encoders_and_vae_are_not_in_memory_while_the_dit_runs(load_teacher, tiny_dataset, tmp_path):
    elsewhere = len(encoders_in_memory())  # other tests keep teachers for the whole session
    teacher = load_teacher()
    seen = []
    config = BuildConfig(timesteps=(28,), image_size=32, batch=26)
    original = teacher._forward

    def forward(*args):
        seen.append(len(encoders_in_memory()) - elsewhere)
        return original(*args)

    teacher._forward = forward
    build(teacher, tiny_dataset, config, tmp_path / "cache", log=str)
    refine(teacher, tiny_dataset, RefineConfig(steps=1, rank=2, validation_images=2, pictures_every=1),
           tmp_path / "lora", log=str)  # fmt: skip
    assert len(seen) > 5
    assert set(seen) == {0}
    assert (tmp_path / "lora/pictures/step-000001.png").is_file()


@pytest.mark.parametrize(
    "change", [lambda s: replace(s, box=(1.0, 1.0, 20.0, 20.0)), lambda s: replace(s, caption="quite another bird")]
)
def test_another_box_or_caption_is_encoded_anew(load_teacher, tiny_dataset, samples, tmp_path, change):
    store = ConditionStore(tmp_path, load_teacher(), tiny_dataset)
    store.prepare(samples)
    changed = store.prepare([change(samples[0])])
    assert changed.captions + changed.images == 1


@pytest.mark.parametrize("options", [{"resolution": 48}, {"dtype": torch.bfloat16}, {"seed": 1}])
def test_another_teacher_resolution_or_precision_is_encoded_anew(
    load_teacher, make_flux, tiny_dataset, samples, tmp_path, options
):
    ConditionStore(tmp_path / "c", load_teacher(), tiny_dataset).prepare(samples)
    if "seed" in options:
        from pipeline.teachers.flux import FluxTeacher

        other = FluxTeacher(make_flux(tmp_path / "flux", seed=1), resolution=32)
    else:
        other = load_teacher(**options)
    assert ConditionStore(tmp_path / "c", other, tiny_dataset).prepare(samples).images == 5


@pytest.mark.parametrize("kind", ["text", "latents"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "garbage", "remove"])
def test_a_damaged_file_is_named_removed_and_computed_anew(load_teacher, tiny_dataset, samples, tmp_path, kind, harm):
    store = ConditionStore(tmp_path, load_teacher(), tiny_dataset)
    store.prepare(samples)
    whole = store.read(samples, "canonical")
    file = sorted((tmp_path / kind).rglob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    harmed = {"flip": bytes(data), "truncate": bytes(data[:-40]), "empty": b"", "garbage": os.urandom(300)}
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(harmed[harm])
    with pytest.raises(DamagedConditions, match="run the same command again") as caught:
        store.read(samples, "canonical")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not file.exists()
    store.prepare(samples)
    assert torch.equal(store.read(samples, "canonical").object, whole.object)


def test_an_image_that_cannot_be_read_is_named(load_teacher, tiny_dataset, samples, tmp_path):
    class Unreadable:
        name, protocol, superclass, samples = "demo", "", "bird", tiny_dataset.samples

        def read(self, sample):
            raise PermissionError(13, "Permission denied")

    with pytest.raises(DataError, match=f"{samples[0].source} cannot be read: Permission denied"):
        ConditionStore(tmp_path, load_teacher(), Unreadable()).prepare(samples)


def test_a_build_on_conditions_from_stage_one_is_byte_for_byte_one_that_encoded_itself(
    load_teacher, tiny_dataset, tmp_path
):
    config = BuildConfig(timesteps=(22, 28), image_size=32, encoding="float32", batch=3)
    refine(load_teacher(), tiny_dataset, RefineConfig(steps=1, rank=2, validation_images=2), tmp_path / "lora", log=str)
    build(load_teacher(), tiny_dataset, config, tmp_path / "cache", log=str)
    alone = tmp_path / "elsewhere/conditions"
    build(load_teacher(), tiny_dataset, config, tmp_path / "other", log=str, conditions=alone)
    one, other = open_cache(tmp_path / "cache"), open_cache(tmp_path / "other")
    rows = list(range(len(one)))
    assert torch.equal(one.read(rows, tap="hidden").decode(), other.read(rows, tap="hidden").decode())


_KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
import conftest
from pipeline.inputs.condition_store import ConditionStore
from pipeline.teachers.flux import FluxTeacher
torch.set_num_threads(1)
dataset = conftest.make_tiny_dataset()
def check(calls=[]):
    calls.append(0)
    if len(calls) == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
ConditionStore(Path({store!r}), FluxTeacher(Path({teacher!r}), resolution=32), dataset).prepare(
    dataset.samples[:5], check=check)
"""


def test_a_killed_run_is_gone_on_with(load_teacher, flux_folder, tiny_dataset, samples, tmp_path):
    here = Path(__file__).parents[1]
    script = _KILLED.format(here=str(here), store=str(tmp_path / "c"), teacher=str(flux_folder), calls=4)
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=200)
    assert process.returncode == -9, process.stderr
    kept = files(tmp_path / "c")
    assert len(kept) == 3
    store = ConditionStore(tmp_path / "c", load_teacher(), tiny_dataset)
    store.prepare(samples)
    assert {name: mark for name, mark in files(tmp_path / "c").items() if name in kept} == kept
    assert torch.equal(
        store.read(samples, "canonical").object,
        encode_conditions(load_teacher(), tiny_dataset, samples, "canonical").object,
    )
