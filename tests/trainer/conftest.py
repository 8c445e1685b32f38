"""A tiny teacher cache with a real signal in it, made through the public contract."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from cache_schema import (
    Cache,
    CropsInfo,
    Curriculum,
    DatasetInfo,
    Encoding,
    ImagesInfo,
    TapInfo,
    TeacherInfo,
    create_cache,
    fingerprint_samples,
    make_samples,
    open_cache,
    plan_manifest,
)
from cache_schema import cli as commands
from trainer.cli import app
from trainer.config import TrainConfig
from trainer.export.export import export_run
from trainer.methods.settings import make_config
from trainer.training import loop
from trainer.training.loop import train

SIZE, TOKENS, CHANNELS, TIMESTEPS, VIEWS = 24, 4, 6, (10, 22), ("canonical", "hflip")
CLASSES = {"train": (0, 1, 2), "test": (10, 11), "unlabeled": (20,)}

TINY = (
    "student.name=vit_tiny_patch16_224", "student.img_size=24", "student.patch_size=12", "student.depth=1",
    "student.embed_dim=32", "student.num_heads=2", "student.pretrained=false", "batch_size=6", "epochs=3",
    "threads=1", "device=cpu", "log_every=1",
)  # fmt: skip
TINY_GIM = ("gim.queries=3", "gim.bridge_layers=1")


def draw_image(label: int, index: int) -> Image.Image:
    """A left half in the class's colour, a right half that is dark: its mirror image is another picture."""
    random = np.random.default_rng((label, index))
    pixels = random.integers(0, 40, (SIZE, SIZE, 3))
    pixels[:, : SIZE // 2] += np.array([37 * label % 200, 83 * label % 200, 53 * label % 200])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_crop(name: str, view: str) -> list[float]:
    """A box of whole pixels of the stored images, of a sample and a view `crop.k` alone."""
    random = np.random.default_rng([*name.encode(), *view.encode()])
    left, top = random.integers(0, SIZE // 2, 2).tolist()
    right, bottom = random.integers(SIZE // 2 + 1, SIZE + 1, 2).tolist()
    return [edge / SIZE for edge in (left, top, right, bottom)]


def draw_features(row: int, label: int, tokens: int, views: int) -> np.ndarray:
    """(V, T, L, C_t): channel 0 is the row, 1 the view, 2 the timestep, the others say the class."""
    features = np.zeros((views, len(TIMESTEPS), tokens, CHANNELS), np.float32)
    features[..., 0] = row
    features[..., 1] = np.arange(views)[:, None, None]
    features[..., 2] = np.array(TIMESTEPS)[None, :, None]
    features[..., 3:] = np.random.default_rng(label).normal(size=3)
    return features


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def build_cache(
    path: Path,
    per_class: int = 5,
    feature_splits: tuple[str, ...] = ("train", "unlabeled", "test"),
    seal: bool = True,
    views: tuple[str, ...] = VIEWS,
    tokens: int = TOKENS,
    content: str = "",
    classes: Mapping[str, tuple[int, ...]] = CLASSES,
    picture: tuple[int, int] = (SIZE, SIZE),
    shape: tuple[Literal["square", "aspect"], int] = ("square", SIZE),
    about: Callable[[str, int, int], dict[str, Any]] = lambda split, label, index: {},
    shards: int | None = None,
) -> Cache:
    """A cache whose features say what they are of; among `views` may be crops. shards: how many more are made now."""
    rows = []
    crops = [view for view in views if view.startswith("crop.")]
    for split, labels in classes.items():
        for label in labels:
            for index in range(per_class):
                name = f"{split}-{label}-{index}"
                rows.append(
                    {
                        "id": name,
                        "split": split,
                        "label": -1 if split == "unlabeled" else label,
                        "class_name": "" if split == "unlabeled" else f"class {label}",
                        "source": name,
                        "sha256": hashlib.sha256(f"{content}{name}".encode()).hexdigest(),
                        "width": picture[0],
                        "height": picture[1],
                        **about(split, label, index),
                        **({"crops": [draw_crop(content + name, view) for view in crops]} if crops else {}),
                    }
                )
    samples, feature_rows = make_samples(rows, feature_splits)
    manifest = plan_manifest(
        dataset=DatasetInfo(
            name="tiny",
            protocol="open-set",
            fingerprint=fingerprint_samples(samples),
            superclass="thing",
            counts={split: per_class * len(labels) for split, labels in classes.items()},
            feature_splits=list(feature_splits),
            feature_rows=feature_rows,
        ),
        teacher=TeacherInfo(
            family="flux", source="synthetic", pipeline_class="None", digests={}, dtype="float32",
            resolution=SIZE, text="none",
        ),
        curriculum=Curriculum(num_steps=28, timesteps=list(TIMESTEPS), sigmas=[0.7, 0.2], seed=0),
        taps=[TapInfo(name="hidden", tokens=tokens, channels=CHANNELS, grid=(1, tokens))],
        encoding=Encoding(kind="float32"),
        views=list(views),
        crops=CropsInfo(scale=(0.2, 1.0), ratio=(0.5, 2.0)) if crops else None,
        images=ImagesInfo(size=shape[1], format="png", shape=shape[0]),
        image_rows=len(rows),
        samples_per_shard=8,
    )  # fmt: skip
    writer = create_cache(path, manifest, samples)
    sources = [(int(source.split("-")[1]), int(source.split("-")[2])) for source in samples["source"].to_pylist()]
    for shard in writer.missing_shards()[:shards]:
        drawn = [draw_features(row, sources[row][0], tokens, len(views)) for row in writer.shard_rows(shard)]
        writer.write_shard(shard, {"hidden": np.stack(drawn)})
    for shard in writer.missing_image_shards():
        assert manifest.images is not None
        drawn_images = [draw_image(*sources[row]).resize(manifest.images.stored_size(*picture))
                        for row in writer.image_rows(shard)]  # fmt: skip
        writer.write_images(shard, [encode(image) for image in drawn_images])
    if seal:
        writer.seal()
    return open_cache(path, allow_partial=not seal)


@pytest.fixture(scope="session")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "tiny"
    build_cache(path)
    return path


@pytest.fixture(scope="session")
def build_tiny() -> Callable[..., Cache]:
    """`build_tiny(path, views=("canonical",))`: such a cache at a place of one's own."""
    return build_cache


@pytest.fixture
def cache(cache_path: Path) -> Cache:
    return open_cache(cache_path)


@pytest.fixture(scope="session")
def wide_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same with enough training classes to hold some out: two of five."""
    return build_cache(tmp_path_factory.mktemp("caches") / "wide", classes={**CLASSES, "train": (0, 1, 2, 3, 4)})


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., Cache]:
    def make(name: str = "cache", **options: Any) -> Cache:
        return build_cache(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def break_features() -> Callable[..., Cache]:
    """`break_features(cache, "train-1-3")`: its features there are not finite, and the cache is read unverified."""

    def change(cache: Cache, sample: str, value: float = float("nan")) -> Cache:
        row = cache.samples["id"].to_pylist().index(sample)
        zarr.open_array(cache.root / "features/hidden", mode="r+")[row] = value
        return open_cache(cache.root, verify=False)

    return change


@pytest.fixture
def tiny_config(cache_path: Path) -> Callable[..., TrainConfig]:
    """`tiny_config("loss.alpha=2", mode="baseline")`: a run of a second, with anything changed."""

    def make(*settings: str, **flags: Any) -> TrainConfig:
        own = TINY_GIM if flags.get("mode", "distill") == "distill" and "method" not in flags else ()
        return make_config("paper", [*TINY, *own, *settings], cache=str(cache_path), **flags)

    return make


@pytest.fixture(scope="session")
def tiny_settings() -> list[str]:
    """The same as command-line arguments."""
    return [argument for setting in (*TINY, *TINY_GIM) for argument in ("--set", setting)]


@pytest.fixture(scope="session")
def tiny_baseline_settings() -> list[str]:
    """The same for the baseline, which has no GIM."""
    return [argument for setting in TINY for argument in ("--set", setting)]


@pytest.fixture(scope="session")
def students(tmp_path_factory, cache_path, tiny_baseline_settings) -> dict[str, Path]:
    """Runs of two seeds, and the export of the first, by name: first, second, exported."""
    folder = tmp_path_factory.mktemp("students")
    settings = [text for text in tiny_baseline_settings if text != "--set"]
    cache = open_cache(cache_path)
    for seed, name in enumerate(("first", "second")):
        config = make_config("paper", [*settings, "updates=1", f"seed={seed}"], cache=str(cache_path), mode="baseline")
        train(config, cache, folder / name)
    export_run(folder / "first", folder / "exported", cache, onnx=False)
    return {name: folder / name for name in ("first", "second", "exported")}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory, cache_path) -> Path:
    """The test images of the tiny cache, as they are stored, in folders of their classes; a hidden file beside them."""
    root = tmp_path_factory.mktemp("pictures") / "images"
    cache = open_cache(cache_path)
    for row, sample in enumerate(cache.samples.to_pylist()):
        if sample["split"] == "test":
            file = root / sample["class_name"] / f"{sample['id']}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(cache.images([row])[0])
    (root / ".hidden.png").write_bytes(b"not shown")
    return root


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def here(capsys, monkeypatch):
    """The command line in this process, for what needs no process of its own: (exit code, output, errors)."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the runner replaces

    def run_here(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            commands.run(app, [str(argument) for argument in arguments])
        return int(caught.value.code or 0), *capsys.readouterr()

    return run_here


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trains into a folder until a signal comes in the middle of an update (counted from 0), which ends the run."""

    def run(config: TrainConfig, cache: Cache, folder: Path, update: int, number: int = signal.SIGTERM) -> None:
        step = loop.train_step

        def step_and_signal(method, optimizer, batch, rate, config, moment):  # type: ignore[no-untyped-def]
            if moment.update == update:
                os.kill(os.getpid(), number)
            return step(method, optimizer, batch, rate, config, moment)

        with monkeypatch.context() as changed:
            changed.setattr(loop, "train_step", step_and_signal)
            with pytest.raises(KeyboardInterrupt):
                train(config, cache, folder)

    return run
