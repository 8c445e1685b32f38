"""Two students of the tiny cache, its test images as a folder of files, and an index of them by each student."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache_schema import open_cache
from trainer.export.export import export_run
from trainer.methods.settings import make_config
from trainer.retrieval.config import IndexConfig
from trainer.retrieval.embed import embed_images
from trainer.retrieval.images import FolderImages
from trainer.retrieval.index import make_index
from trainer.retrieval.model import open_model
from trainer.training.loop import train


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


@pytest.fixture(scope="session")
def indexes(tmp_path_factory, students, pictures) -> dict[str, Path]:
    """An exact index of the pictures by each of the two students."""
    folder = tmp_path_factory.mktemp("indexes")
    for name in ("first", "second"):
        file = folder / f"{name}.parquet"
        embed_images(FolderImages(pictures, 80.0), open_model(students[name]), file)
        make_index(file, folder / name, IndexConfig())
    return {name: folder / name for name in ("first", "second")}
