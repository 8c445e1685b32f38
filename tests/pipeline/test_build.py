"""A build is resumable, reproducible and honest about bad images."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cache_schema import open_cache
from cache_schema.errors import CacheMismatch, DitDistillError
from cache_schema.verify import verify
from pipeline.build import build
from pipeline.build_config import BuildConfig
from pipeline.conditions import encode_conditions
from pipeline.curriculum import add_noise, sample_noise
from pipeline.datasets.demo import DemoConfig, DemoDataset
from pipeline.features import teacher_features
from pipeline.tolerance import Tolerance

CONFIG = BuildConfig(
    timesteps=(16, 28),
    views=("canonical", "hflip"),
    image_size=32,
    image_format="png",
    batch=3,
    samples_per_shard=4,
    encoding="float32",
)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, the manifest without the part that says when and where it was built."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "manifest.json":
            document = json.loads(data)
            document.pop("provenance")
            data = json.dumps(document, sort_keys=True).encode()
        digests[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return digests


@pytest.fixture(scope="module")
def built(teacher, tiny_dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "cache"
    build(teacher, tiny_dataset, CONFIG, folder, log=str)
    return folder


def test_the_cache_holds_what_the_teacher_computes_for_each_view_and_timestep(built, teacher, tiny_dataset):
    cache = open_cache(built)
    by_id = {s.id: s for s in tiny_dataset.samples}
    sigmas = teacher.sigmas(28)
    for row in (0, 7, 25):
        sample = by_id[cache.samples["id"][row].as_py()]
        for v, view in enumerate(CONFIG.views):
            stored = cache.read([row], tap="hidden", timesteps=[16, 28], view=v).decode()
            c = encode_conditions(teacher, tiny_dataset, [sample], view)
            noise = sample_noise(sample.id, view, 0, tuple(c.object.shape[1:]))[None]
            for t, p in enumerate((16, 28)):
                sigma = torch.tensor([sigmas[p - 1]])
                expected = teacher.features(add_noise(c.object, noise, sigma), c.context, sigma, c.text, ["hidden"])
                torch.testing.assert_close(stored[:, t], expected["hidden"], atol=1e-5, rtol=1e-4)


def test_rows_with_features_come_first_and_test_images_have_pixels_only(built):
    cache = open_cache(built)
    splits = cache.samples["split"].to_pylist()
    assert len(cache) == 26
    assert set(splits[:26]) == {"train", "unlabeled"}
    assert set(splits[26:]) == {"test"}
    assert all(data.startswith(b"\x89PNG") for data in cache.images([0, 30]))
    assert cache.manifest.curriculum.sigmas[1] < cache.manifest.curriculum.sigmas[0]


def test_building_again_changes_nothing_and_computes_nothing(built, teacher, tiny_dataset, monkeypatch):
    before = contents(built)
    monkeypatch.setattr(teacher, "features", None)
    build(teacher, tiny_dataset, CONFIG, built, log=str)
    assert contents(built) == before
    assert verify(built) == []


def test_two_builds_differ_in_no_byte_but_the_provenance(built, teacher, tiny_dataset, tmp_path):
    build(teacher, tiny_dataset, CONFIG, tmp_path / "again", log=str)
    assert contents(tmp_path / "again") == contents(built)


def test_another_setting_is_another_cache_and_does_not_touch_the_first(built, teacher, tiny_dataset):
    before = contents(built)
    with pytest.raises(CacheMismatch, match=r"curriculum\.seed"):
        build(teacher, tiny_dataset, replace(CONFIG, seed=1), built, log=str)
    assert contents(built) == before


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "int8"])
def test_every_encoding_keeps_the_direction_of_the_features(encoding, teacher, tiny_dataset, built, tmp_path):
    build(teacher, tiny_dataset, replace(CONFIG, encoding=encoding), tmp_path / "c", log=str)
    exact, stored = open_cache(built), open_cache(tmp_path / "c")
    a, b = (c.read([0, 5], tap="hidden", timesteps=[16, 28]).decode() for c in (exact, stored))
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.999
    assert min(f.cosine_min for f in stored.manifest.fidelity) > 0.999


def test_test_features_are_built_when_asked_for(teacher, tiny_dataset, tmp_path):
    config = replace(CONFIG, feature_splits=("train", "test"), views=("canonical",), timesteps=(28,))
    manifest = build(teacher, tiny_dataset, config, tmp_path / "c", log=str)
    assert manifest.dataset.feature_splits == ["train", "test"]
    assert manifest.dataset.feature_rows == 40


def test_without_captions_the_text_is_the_empty_prompt(teacher, tiny_dataset):
    samples = tiny_dataset.samples[:2]
    features = teacher_features(teacher, tiny_dataset, samples, replace(CONFIG, text="none"), [0.5, 0.1])["hidden"]
    captioned = teacher_features(teacher, tiny_dataset, samples, CONFIG, [0.5, 0.1])["hidden"]
    assert features.shape == captioned.shape == (2, 2, 2, 16, 32)
    assert not torch.allclose(features, captioned)


class Damaged:
    """A data set in which some files went bad after it was listed."""

    def __init__(self, inner, damage):
        self.inner, self.damage = inner, damage
        self.name, self.protocol, self.superclass = inner.name, inner.protocol, inner.superclass
        self.samples = [replace(s, box=(200, 200, 300, 300)) if damage.get(s.id) == "box" else s for s in inner.samples]

    def read(self, sample):
        kind = self.damage.get(sample.id)
        if kind == "missing":
            raise FileNotFoundError(2, "No such file or directory", sample.source)
        data = self.inner.read(sample)
        return {"empty": b"", "truncated": data[: len(data) // 2]}.get(kind, data)


def test_bad_images_are_quarantined_with_their_reason_and_leave_no_hole(teacher, tiny_dataset, tmp_path):
    train = [s.id for s in tiny_dataset.samples if s.split == "train"]
    damage = dict(zip(train, ["missing", "empty", "truncated", "box"], strict=False))
    said = []
    build(
        teacher,
        Damaged(tiny_dataset, damage),
        CONFIG,
        tmp_path / "c",
        log=said.append,
        tolerance=Tolerance(max_bad=0.1),
    )
    cache = open_cache(tmp_path / "c")
    reasons = {r["id"]: r["reason"] for r in cache.samples.to_pylist() if r["state"] == "quarantined"}
    assert set(reasons) == set(damage)
    assert "No such file" in reasons[train[0]]
    assert reasons[train[1]] == "the file is empty"
    assert "not a complete image" in reasons[train[2]]
    assert "no pixel inside" in reasons[train[3]]
    assert len(cache) == 22
    assert any("4 of 46 images are quarantined" in line for line in said)


BUILD_SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[3])
from test_build import CONFIG
from pipeline.build import build
from pipeline.datasets.demo import DemoConfig, DemoDataset
from pipeline.features import teacher_features
from pipeline.tolerance import Tolerance
from pipeline.teachers.flux import FluxTeacher
dataset = DemoDataset(DemoConfig(groups=2, train_classes=4, test_classes=4, images_per_class=5, unlabeled=6))
teacher = FluxTeacher(Path(sys.argv[1]), resolution=32)
build(teacher, dataset, CONFIG, Path(sys.argv[2]))
"""


def start_build(flux_folder: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD_SCRIPT, str(flux_folder), str(output), str(Path(__file__).parent)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def test_a_killed_build_ends_byte_identical_to_an_uninterrupted_one(flux_folder, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start_build(flux_folder, whole).wait() == 0
    shards = len(list((whole / "journal").glob("features-*")))
    assert shards == 7
    for wanted in (0, 2, 5):
        process = start_build(flux_folder, broken)
        while process.poll() is None and len(list((broken / "journal").glob("features-*"))) <= wanted:
            pass  # kill as soon as one more shard is there: in the middle of the next
        process.send_signal(signal.SIGKILL)
        process.wait()
    # A shard exists when its record exists: those recorded by now must not be written again.
    records = [json.loads(p.read_text()) for p in (broken / "journal").glob("features-*.json")]
    kept = {broken / name: (broken / name).stat().st_mtime_ns for record in records for name in record["files"]}
    assert kept
    assert start_build(flux_folder, broken).wait() == 0
    assert all(p.stat().st_mtime_ns == written for p, written in kept.items())
    assert contents(broken) == contents(whole)


def test_a_split_without_images_is_refused(teacher, tmp_path):
    dataset = DemoDataset(DemoConfig(groups=2, train_classes=2, test_classes=2, images_per_class=2, unlabeled=0))
    with pytest.raises(DitDistillError, match="no usable image in the splits unlabeled of demo"):
        build(teacher, dataset, replace(CONFIG, feature_splits=("unlabeled",)), tmp_path / "c", log=str)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"views": ("upside-down",)}, "--views upside-down"),
        ({"feature_splits": ()}, "--features"),
        ({"taps": ("hidden", "hidden")}, "--taps"),
        ({"batch": 0}, "--batch"),
        ({"timesteps": (40,)}, "timestep 40"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(setting, complaint):
    with pytest.raises(DitDistillError, match=complaint):
        BuildConfig(**setting)
