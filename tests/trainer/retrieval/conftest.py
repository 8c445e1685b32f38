"""An index of the tiny cache's test images by each of two students."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.retrieval.config import IndexConfig
from trainer.retrieval.embed import embed_images
from trainer.retrieval.images import FolderImages
from trainer.retrieval.index import make_index
from trainer.retrieval.model import open_model


@pytest.fixture(scope="session")
def indexes(tmp_path_factory, students, pictures) -> dict[str, Path]:
    """An exact index of the pictures by each of the two students."""
    folder = tmp_path_factory.mktemp("indexes")
    for name in ("first", "second"):
        file = folder / f"{name}.parquet"
        embed_images(FolderImages(pictures, 80.0), open_model(students[name]), file)
        make_index(file, folder / name, IndexConfig())
    return {name: folder / name for name in ("first", "second")}
