"""Searching embeddings: what a graph (usearch) finds of the true neighbours, and how much faster than comparing all.

`python -m benchmarks.searching`. Vectors are made as a student's lie: images around classes around super-classes, in
fewer dimensions than there are channels. Queries are other images of the same classes. Times are of one thread, and of
exact search and graph in turns in one process: take the ratio.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import in_turns, save, table
from trainer.retrieval.config import IndexConfig
from trainer.retrieval.embeddings import ROWS, Block, writing_embeddings
from trainer.retrieval.images import Entry
from trainer.retrieval.index import Index, make_index

CHANNELS, INNER, PER_CLASS, TOP, QUERIES, ROUNDS = 192, 48, 50, 10, 200, 5
EXPANSIONS = (32, 64, 128, 256, 512)  # candidates looked at in a search


def make_vectors(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (count, C) float32 and queries (QUERIES, C)."""
    random = np.random.default_rng(seed)
    supers = random.standard_normal((max(1, count // (20 * PER_CLASS)), INNER), dtype=np.float32)
    classes = np.repeat(supers, 20, 0) + 0.7 * random.standard_normal((20 * len(supers), INNER), dtype=np.float32)
    lift = random.standard_normal((INNER, CHANNELS), dtype=np.float32) / INNER**0.5

    def images(of: np.ndarray) -> np.ndarray:
        inner = classes[of] + 0.6 * random.standard_normal((len(of), INNER), dtype=np.float32)
        return inner @ lift + 0.1 * random.standard_normal((len(of), CHANNELS), dtype=np.float32)

    return images(np.arange(count) % len(classes)), images(random.integers(len(classes), size=QUERIES))


def make_indexes(vectors: np.ndarray, folder: Path) -> tuple[Index, Index, float]:
    """An exact index of vectors, one with a graph, and the seconds that the graph took."""
    about = {"model": {"id": "", "label": "made up", "place": "."}, "images": {"kind": "folder", "place": "."}}
    with writing_embeddings(folder / "vectors.parquet", about, vectors.shape[1]) as writer:
        for start in range(0, len(vectors), ROWS):
            part = vectors[start : start + ROWS]
            writer.write(Block([Entry(f"{start + row}", "", 0, 0) for row in range(len(part))], part))
    exact = make_index(folder / "vectors.parquet", folder / "exact", IndexConfig(kind="exact"))
    began = time.perf_counter()
    graph = make_index(folder / "vectors.parquet", folder / "hnsw", IndexConfig(kind="hnsw"))
    return exact, graph, time.perf_counter() - began


def rows_of(index: Index, queries: np.ndarray) -> list[set[int]]:
    """What an index finds for each query."""
    return [{hit.row for hit in index.search(query, TOP)} for query in queries]


def measure(count: int, folder: Path) -> dict[str, object]:
    """Recall and speed of a graph over `count` vectors at each width of its search."""
    vectors, queries = make_vectors(count)
    exact, graph, seconds = make_indexes(vectors, folder)
    true = rows_of(exact, queries)
    lines = []
    for expansion in EXPANSIONS:
        graph.about["graph"]["expansion_search"] = expansion
        graph._graph.expansion_search = expansion
        found = rows_of(graph, queries)
        recall = statistics.fmean(len(one & other) / TOP for one, other in zip(true, found, strict=True))
        some = queries[:20]
        times = in_turns({"exact": partial(rows_of, exact, some), "hnsw": partial(rows_of, graph, some)}, ROUNDS)
        of = {name: statistics.median(each) / len(some) for name, each in times.items()}
        lines.append({"expansion_search": expansion, "recall_at_10": recall, "seconds": of})
    return {"vectors": count, "build_seconds": seconds, "searches": lines}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.searching", description=__doc__)
    parser.add_argument("--counts", default="100000,1000000", help="vectors, comma-separated")
    parser.add_argument("--small", action="store_true", help="Only show that it runs: few vectors, nothing saved.")
    args = parser.parse_args(argv)
    results = []
    for count in [1000] if args.small else map(int, args.counts.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(count, Path(folder)))
    print(table(
        ["vectors", "candidates", "recall@10", "exact, ms", "hnsw, ms", "exact / hnsw"],
        [[f"{each['vectors']:,}", str(line["expansion_search"]), f"{line['recall_at_10']:.3f}",
          f"{1000 * line['seconds']['exact']:.1f}", f"{1000 * line['seconds']['hnsw']:.2f}",
          f"{line['seconds']['exact'] / line['seconds']['hnsw']:.0f}"]
         for each in results for line in each["searches"]],
    ))  # fmt: skip
    if not args.small:
        print(f"wrote {save('searching', {'results': results})}")


if __name__ == "__main__":
    main()
