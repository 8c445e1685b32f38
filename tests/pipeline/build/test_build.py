"""A build is resumable, reproducible and honest about bad images."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from build_process import contents
from tiny_teachers import direct_features, encode_conditions

from cache_schema import open_cache
from cache_schema.care.verify import verify
from cache_schema.errors import CacheMismatch, DitDistillError, LowFidelity
from cache_schema.format.manifest_file import load_manifest
from cache_schema.format.samples import samples_table
from cache_schema.storage.local import LocalFolder
from cache_schema.writing.writer import CacheWriter
from pipeline.build.config import BuildConfig
from pipeline.build.describe import describe_cache
from pipeline.build.run import build
from pipeline.curriculum import add_noise, sample_noise
from pipeline.datasets.demo import DemoConfig, DemoDataset
from pipeline.inputs.scan import scan
from pipeline.teachers.flux import FluxTeacher

CONFIG = BuildConfig(
    timesteps=(16, 28),
    views=("canonical", "hflip"),
    image_size=32,
    image_format="png",
    batch=3,
    samples_per_shard=4,
    encoding="float32",
)


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


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "int8", "float8_e4m3"])
def test_every_encoding_keeps_the_direction_of_the_features(encoding, teacher, tiny_dataset, built, tmp_path):
    build(teacher, tiny_dataset, replace(CONFIG, encoding=encoding), tmp_path / "c", log=str)
    exact, stored = open_cache(built), open_cache(tmp_path / "c")
    a, b = (c.read([0, 5], tap="hidden", timesteps=[16, 28]).decode() for c in (exact, stored))
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.999
    assert min(f.cosine_min for f in stored.manifest.fidelity) > 0.999


def test_a_cache_that_loses_too_much_is_not_sealed_and_can_be_accepted_later(teacher, tiny_dataset, tmp_path):
    strict = replace(CONFIG, encoding="float8_e4m3", min_cosine=0.99999)
    with pytest.raises(LowFidelity, match=r"0\.99999"):
        build(teacher, tiny_dataset, strict, tmp_path / "c", log=str)
    assert not load_manifest(LocalFolder(tmp_path / "c")).sealed
    sealed = build(teacher, tiny_dataset, replace(strict, min_cosine=0.99), tmp_path / "c", log=str)
    assert all(0.99 < figure.cosine_mean < 0.99999 for figure in sealed.fidelity)


@pytest.mark.parametrize(
    "setting",
    [
        {"store": "webdataset", "encoding": "int8"},
        {"pool": 2, "encoding": "bfloat16"},
        {"pca": 8, "encoding": "int8", "compression": "blosc:zstd"},
    ],
)
def test_a_cache_can_be_stored_in_every_way(setting, teacher, tiny_dataset, built, tmp_path):
    manifest = build(teacher, tiny_dataset, replace(CONFIG, **setting), tmp_path / "c", log=str)
    assert verify(tmp_path / "c") == []
    stored = open_cache(tmp_path / "c").read([0, 5], tap="hidden", timesteps=[16, 28]).decode()
    tap = manifest.taps[0]
    assert stored.shape == (2, 2, tap.tokens, tap.channels)
    assert manifest.store.kind == setting.get("store", "zarr")
    assert (tap.tokens, tap.channels) == (4 if "pool" in setting else 16, setting.get("pca", 32))
    exact = open_cache(built).read([0, 5], tap="hidden", timesteps=[16, 28]).decode()
    if tap.channels == 32:
        pooled = exact.unflatten(2, (4, 4)).unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).flatten(2, 3)
        expected = pooled if "pool" in setting else exact
        assert torch.nn.functional.cosine_similarity(stored, expected, dim=-1).min() > 0.999


def test_test_features_are_built_when_asked_for(teacher, tiny_dataset, tmp_path):
    config = replace(CONFIG, feature_splits=("train", "test"), views=("canonical",), timesteps=(28,))
    manifest = build(teacher, tiny_dataset, config, tmp_path / "c", log=str)
    assert manifest.dataset.feature_splits == ["train", "test"]
    assert manifest.dataset.feature_rows == 40


def test_without_captions_the_text_is_the_empty_prompt(teacher, tiny_dataset):
    samples = tiny_dataset.samples[:2]
    features = direct_features(teacher, tiny_dataset, samples, replace(CONFIG, text="none"), [0.5, 0.1])["hidden"]
    captioned = direct_features(teacher, tiny_dataset, samples, CONFIG, [0.5, 0.1])["hidden"]
    assert features.shape == captioned.shape == (2, 2, 2, 16, 32)
    assert not torch.allclose(features, captioned)


@pytest.mark.parametrize(("batch", "expected"), [(3, 510), (512, 512), (600, 512), (7, 511)])
def test_a_shard_is_made_of_whole_batches(batch, expected, teacher, tiny_dataset):
    config = replace(CONFIG, batch=batch, samples_per_shard=None)
    table = samples_table([entry.row() for entry in scan(tiny_dataset, config.feature_splits)])
    assert describe_cache(teacher, tiny_dataset, config, table).store.samples_per_shard == expected


def test_a_slow_store_makes_the_teacher_wait(tiny_dataset, flux_folder, tmp_path, monkeypatch):
    """While shard k is written, k + 1 is computed and nothing beyond it."""
    computed, ahead = [], []

    class Counting(FluxTeacher):
        def features(self, noisy, *arguments):
            computed.append(len(noisy))
            return super().features(noisy, *arguments)

    written = CacheWriter.write_shard

    def slow_write(self, shard, *arguments):
        time.sleep(0.03)  # the teacher needs less for a shard
        ahead.append(sum(computed) - shard * 2)
        written(self, shard, *arguments)

    monkeypatch.setattr(CacheWriter, "write_shard", slow_write)
    config = replace(CONFIG, samples_per_shard=2, batch=2, views=("canonical",), timesteps=(28,))
    build(Counting(flux_folder, resolution=32), tiny_dataset, config, tmp_path / "c", log=str)
    assert len(ahead) == 13
    assert max(ahead) <= 4


def test_a_split_without_images_is_refused(teacher, tmp_path):
    dataset = DemoDataset(
        DemoConfig(groups=2, train_classes=2, test_classes=2, train_images=2, test_images=2, unlabeled=0)
    )
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
        ({"massive_factor": 5.0}, "--massive-factor 5: massive channels are kept; add --massive-channels remove"),
        ({"crops_scale": (0.1, 0.5)}, "--crops-scale: none of the views is a random crop; add crops:K to --views"),
        ({"crops_ratio": (1.0, 1.0), "views": ("hflip",)}, "--crops-ratio: none of the views is a random crop"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(setting, complaint):
    with pytest.raises(DitDistillError, match=complaint):
        BuildConfig(**setting)
