"""An index: a folder of embeddings that are ready to be searched, which knows the student that made it.

`vectors.npy` (N, C) float32 as the network gave them, read from the disk as they are needed; `items.parquet`, name and
class of each; `graph.usearch` in an approximate index; `index.json`, written last, with the student's id, where student
and images are, and size and CRC-32C of the other files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache_schema.errors import CacheError
from cache_schema.storage.files import digest_file, make_directory, storage_errors
from trainer.errors import TrainError
from trainer.retrieval.config import IndexConfig
from trainer.retrieval.embeddings import Embeddings, read_embeddings
from trainer.retrieval.images import Images, images_of, relative_place
from trainer.retrieval.model import Model, open_model
from trainer.retrieval.neighbours import nearest, norms_of, rank
from trainer.runs import read_json

FORMAT, VERSION = "dit-distill/index", 1
ABOUT, VECTORS, ITEMS, GRAPH = "index.json", "vectors.npy", "items.parquet", "graph.usearch"
EXACT_UP_TO = 1_000_000  # vectors
_SAMPLED, _DEPTH = 100, 10  # queries and neighbours by which a graph is measured
_MISSING = "an approximate index needs usearch: pip install 'dit-distill[search]', or give --kind exact"


@dataclass(frozen=True)
class Hit:
    """A found image: its row in the index, and the cosine similarity of its embedding with the query's."""

    row: int
    name: str
    class_name: str
    similarity: float


class Index:
    """An index that was opened and found whole; `about` is its index.json."""

    def __init__(self, folder: Path, about: dict[str, Any], vectors: np.ndarray, names: list[str], classes: list[str]):
        self.folder, self.about, self.vectors, self.names, self.classes = folder, about, vectors, names, classes

    def __len__(self) -> int:
        return len(self.names)

    @property
    def label(self) -> str:
        """What a person calls the student that made it."""
        return str(self.about["model"]["label"])

    def row_of(self, name: str) -> int:
        """The row of an image by its name; raises TrainError where there is none."""
        try:
            return self.names.index(name)
        except ValueError:
            raise TrainError(f"{self.folder} has no image {name!r}; they are called like {self.names[0]!r}") from None

    def search(self, query: np.ndarray, top: int, skip: int | None = None) -> list[Hit]:
        """The `top` images nearest to an embedding (C,), best first; `skip` is a row to leave out."""
        if query.shape != self.vectors.shape[1:]:
            raise TrainError(f"{self.folder} holds vectors of {self.vectors.shape[1]} numbers, not {query.shape}")
        if self.about["kind"] == "exact":
            rows, similarities = nearest(self.vectors, self._norms, query, top, skip)
        else:
            wanted = min(top + (skip is not None), len(self))
            keys = self._graph.search(query.astype(np.float32), wanted).keys.astype(np.int64)
            rows, similarities = rank(self.vectors, self._norms, query, keys[keys != skip], top)
        return [
            Hit(int(row), self.names[row], self.classes[row], float(similarity))
            for row, similarity in zip(rows, similarities, strict=True)
        ]

    def model(self, moved_to: Path | None = None, device: str = "auto") -> Model:
        """The student that made it; raises TrainError where it is not there, or is another one."""
        about = self.about["model"]
        path = moved_to or Path(os.path.normpath(self.folder / about["place"]))
        if moved_to is None and not path.exists():
            raise TrainError(
                f"the student of {self.folder}, {about['label']}, is not in {path} any more; name it with --model"
            )
        model = open_model(path, device)
        if model.id != about["id"]:
            raise TrainError(
                f"{self.folder} was made by another student ({about['label']}, {about['id'][:8]}) than {path} "
                f"({model.id[:8]}); name the one that made it with --model, or embed and index the images again"
            )
        return model

    def images(self, moved_to: str | None = None, max_megapixels: float = 80.0) -> Images:
        """The images that were indexed, to be shown; raises TrainError where they are not there."""
        return images_of(self.about["images"], self.folder, moved_to, max_megapixels)

    @cached_property
    def _norms(self) -> np.ndarray:
        return norms_of(self.vectors)

    @cached_property
    def _graph(self) -> Any:
        kind, options = _usearch(), self.about["graph"]
        graph = kind(
            ndim=self.vectors.shape[1], metric="cos", dtype="f32", expansion_search=options["expansion_search"]
        )
        graph.load(str(self.folder / GRAPH))
        graph.expansion_search = options["expansion_search"]
        return graph


def make_index(file: Path, folder: Path, config: IndexConfig, overwrite: bool = False) -> Index:
    """Index a file of embeddings in a new folder; raises TrainError where the folder holds something else."""
    held = read_embeddings(file)
    if not len(held.entries):
        raise TrainError(f"{file} holds no embeddings")
    _check_folder(folder, overwrite)
    exact = config.kind == "exact" or (config.kind == "auto" and len(held.entries) <= EXACT_UP_TO)
    if not exact:
        _usearch()
    with storage_errors(folder):
        make_directory(folder)
        with tempfile.TemporaryDirectory(prefix=".index-", dir=folder) as made:
            _write(Path(made), held, file, folder, None if exact else config)
            (folder / ABOUT).unlink(missing_ok=True)  # without it what is there is no index
            (folder / GRAPH).unlink(missing_ok=True)
            for name in (VECTORS, ITEMS, GRAPH, ABOUT):
                if (Path(made) / name).is_file():
                    shutil.move(Path(made) / name, folder / name)
    return open_index(folder)


def open_index(folder: Path) -> Index:
    """Open an index; raises TrainError where it is missing, damaged, or of another version."""
    if not (folder / ABOUT).is_file():
        raise TrainError(f"there is no index in {folder}; dit-train index makes one")
    about = read_json(folder / ABOUT)
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise TrainError(f"{folder / ABOUT} does not describe an index of this version")
    try:
        for name, promised in about["files"].items():
            if Path(name).name != name:
                raise TrainError(f"{folder / ABOUT} is damaged: {name!r} is not in its folder")
            if asdict(digest_file(folder / name)) != promised:
                raise TrainError(f"{folder / name} is truncated or damaged; make the index again with --overwrite")
        vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
        items = pq.read_table(folder / ITEMS)
        names, classes = (items[name].to_pylist() for name in ("name", "class_name"))
        for part, keys in {"model": ("id", "label", "place"), "images": ("kind", "place")}.items():
            for key in keys:
                about[part][key]
    except (OSError, CacheError) as error:
        raise TrainError(f"the index in {folder} cannot be read ({error}); make it again with --overwrite") from None
    except (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError) as error:
        raise TrainError(f"the index in {folder} is damaged ({error}); make it again with --overwrite") from None
    if vectors.shape != (len(names), about["channels"]) or not len(names):
        raise TrainError(f"the index in {folder} is damaged: {vectors.shape} vectors of {len(names)} images")
    return Index(folder, about, vectors, names, classes)


def _write(made: Path, held: Embeddings, file: Path, folder: Path, config: IndexConfig | None) -> None:
    """Everything of an index; `config` of its graph, None for one without."""
    vectors = np.lib.format.open_memmap(made / VECTORS, "w+", np.float32, (len(held), held.channels))
    start = 0
    for block in held.blocks():
        vectors[start : start + len(block.vectors)] = block.vectors
        start += len(block.vectors)
    vectors.flush()
    names = [entry.name for entry in held.entries]
    classes = [entry.class_name for entry in held.entries]
    table = pa.table({"name": pa.array(names, pa.string()), "class_name": pa.array(classes, pa.string())})
    pq.write_table(table, made / ITEMS)
    about: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "exact" if config is None else "hnsw",
        "images_indexed": len(names),
        "channels": vectors.shape[1],
    }
    if config is not None:
        about["graph"] = _write_graph(made / GRAPH, vectors, config)
    for part in ("model", "images"):
        place = held.about[part]["place"]
        if "://" not in place:
            place = relative_place(file.parent / place, folder)
        about[part] = {**held.about[part], "place": place}
    files = [name for name in (VECTORS, ITEMS, GRAPH) if (made / name).is_file()]
    about["files"] = {name: asdict(digest_file(made / name)) for name in files}
    (made / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _write_graph(file: Path, vectors: np.ndarray, config: IndexConfig) -> dict[str, Any]:
    """Build the graph; returns its settings and the share of the true neighbours that it finds, by a sample."""
    graph = _usearch()(
        ndim=vectors.shape[1], metric="cos", dtype="f32", connectivity=config.connectivity,
        expansion_add=config.expansion_add, expansion_search=config.expansion_search,
    )  # fmt: skip
    graph.add(np.arange(len(vectors)), vectors)
    graph.save(str(file))
    norms, found = norms_of(vectors), []
    for row in np.linspace(0, len(vectors) - 1, min(_SAMPLED, len(vectors)), dtype=np.int64):
        true, _ = nearest(vectors, norms, vectors[row], _DEPTH)
        keys = graph.search(vectors[row], min(_DEPTH, len(vectors))).keys
        found.append(len(np.intersect1d(true, keys.astype(np.int64))) / len(true))
    names = ("connectivity", "expansion_add", "expansion_search")
    return {**{name: getattr(config, name) for name in names}, f"recall_at_{_DEPTH}": float(np.mean(found))}


def _usearch() -> Any:
    try:
        from usearch.index import Index as Graph
    except ImportError:
        raise TrainError(_MISSING) from None
    return Graph


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raise TrainError where an index would replace or mix with what is there."""
    if folder.exists() and not folder.is_dir():
        raise TrainError(f"{folder} is a file; give another --output")
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not held:
        return
    other = next((name for name in sorted(held) if name not in (ABOUT, VECTORS, ITEMS, GRAPH)), None)
    if other is not None and not other.startswith(".index-"):
        raise TrainError(f"{folder} is not empty and not only an index: it holds {other}; give another --output")
    if not overwrite:
        raise TrainError(f"{folder} holds an index already; give another --output, or --overwrite to replace it")
