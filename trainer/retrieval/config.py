"""The settings of embedding, indexing, searching and serving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cache_schema.fields import Setting, check_limits
from cache_schema.settings import Settings
from trainer.errors import TrainError


@dataclass(frozen=True)
class EmbedConfig:
    """How images become embeddings."""

    split: Annotated[str, Setting("Of a cache: train, test, unlabeled, or all.")] = "all"
    device: Annotated[str, Setting("auto, cpu, cuda, …")] = "auto"
    threads: Annotated[int | None, Setting("That decode images; as many as there are cores.", least=1)] = None
    max_megapixels: Annotated[
        float, Setting("Larger images are left out, and not decoded to find that out.", above=0)
    ] = 80.0
    thumbnails: Annotated[
        int | None,
        Setting("Also keep every image as the student sees it, a JPEG of at most so many pixels a side.", least=8),
    ] = None

    def __post_init__(self) -> None:
        check_limits(self, TrainError)


@dataclass(frozen=True)
class IndexConfig:
    """How an index finds neighbours. The graph's parameters are usearch's."""

    kind: Annotated[
        Literal["auto", "exact", "hnsw"],
        Setting("exact compares with every vector; hnsw walks a graph; auto: exact up to a million vectors."),
    ] = "auto"
    connectivity: Annotated[int, Setting("Neighbours of a node of the graph.", least=2)] = 16
    expansion_add: Annotated[int, Setting("Candidates looked at where a node is added.", least=1)] = 128
    expansion_search: Annotated[int, Setting("Candidates looked at in a search.", least=1)] = 128

    def __post_init__(self) -> None:
        check_limits(self, TrainError)


@dataclass(frozen=True)
class SearchConfig:
    """What a search returns."""

    top: Annotated[int, Setting("Hits to show.", least=1)] = 10
    min_similarity: Annotated[float | None, Setting("Leave out hits of a lower cosine.", least=-1, most=1)] = None
    device: Annotated[str, Setting("auto, cpu, cuda, …")] = "auto"

    def __post_init__(self) -> None:
        check_limits(self, TrainError)


@dataclass(frozen=True)
class ServeConfig:
    """Where the page is served, and what it takes from strangers."""

    host: Annotated[str, Setting("Address to listen on; any but the loopback lets others in.")] = "127.0.0.1"
    port: Annotated[int, Setting("Port; 0 takes a free one.", least=0, most=65535)] = 8000
    top: Annotated[int, Setting("Hits to show.", least=1, most=100)] = 12
    max_upload_mb: Annotated[float, Setting("Larger files are refused while they come in.", above=0)] = 20.0
    max_megapixels: Annotated[float, Setting("Larger images are refused before they are decoded.", above=0)] = 50.0
    upload_seconds: Annotated[float, Setting("An upload may take so long.", above=0)] = 30.0
    device: Annotated[str, Setting("auto, cpu, cuda, …")] = "auto"

    def __post_init__(self) -> None:
        check_limits(self, TrainError)


EMBED = Settings(EmbedConfig, command="dit-train embed", example="threads=4", error=TrainError)
INDEX = Settings(IndexConfig, command="dit-train index", example="kind=hnsw", error=TrainError)
SEARCH = Settings(SearchConfig, command="dit-train search", example="top=5", error=TrainError)
SERVE = Settings(ServeConfig, command="dit-train serve", example="port=8080", error=TrainError)
