"""Runs of an ablation, side by side in processes of their own; what is finished is not made again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from cache_schema import open_cache
from cache_schema.format.manifest_file import load_manifest
from cache_schema.storage.files import write_file
from cache_schema.storage.places import folder_at
from trainer.device import choose_device, share_machine
from trainer.errors import TrainError
from trainer.evaluation.evaluate import evaluate_queries
from trainer.methods.registry import find_method
from trainer.methods.settings import load_config, settings_of
from trainer.methods.trained import load_trained
from trainer.reports.ablation_plan import Cell
from trainer.runs import SplitName, is_finished, load_result, read_json
from trainer.training.loop import train
from trainer.training.run_folder import write_json


@dataclass(frozen=True)
class Scored:
    """A finished cell: what its run says of itself, its scores, and for each query whether it was answered."""

    cell: Cell
    result: dict[str, Any]
    scores: dict[str, Any]
    hits: dict[str, float]  # sample id → 0 or 1, of what the run is scored by
    labels: dict[str, int]


def run_cells(
    cells: Sequence[Cell], work: Path, split: SplitName, jobs: int, allow_partial: bool = False
) -> Iterator[Scored]:
    """Train and score what is not there yet, `jobs` at a time, and yield each cell as soon as it is there.

    `allow_partial`: of caches that are not sealed, too. Interrupted, an ablation goes on where it stopped: runs resume
    from their checkpoints. Raises TrainError where runs of another cache are in the same folder, which would be taken
    for these.
    """
    _refuse_other_caches(cells, work)
    finished = [cell for cell in cells if _queries_file(work / cell.name, split).is_file()]
    yield from (read_cell(cell, work, split) for cell in finished)
    waiting = [cell for cell in cells if cell not in finished]
    for cell in _made(waiting, work, split, jobs, allow_partial):
        yield read_cell(cell, work, split)


def _refuse_other_caches(cells: Sequence[Cell], work: Path) -> None:
    """A cell's name says nothing of what is in its caches, only where some of them lie: it must be what it was."""
    ids: dict[str, str] = {}
    for cell in cells:
        run = work / cell.name
        if not is_finished(run):
            continue
        for place, trained_on in _read_by(cell, load_result(run)):
            if place not in ids:
                ids[place] = load_manifest(folder_at(place)).cache_id
            if trained_on != ids[place]:
                raise TrainError(
                    f"{run} is of cache {trained_on[:8]}, and {place} is {ids[place][:8]}: give another --output, or "
                    "the cache of the runs that are there"
                )


def _read_by(cell: Cell, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The caches that a finished cell was made of: where each was, and its id as far as the result says it."""
    needs = find_method(cell.config.method).needs(cell.config).features
    others = result.get("other_caches", {})  # of an older version, of its own cache alone
    return [
        (cell.config.cache, result["cache_id"]),
        *((str(n.cache), others[name]) for name, n in needs.items() if name in others),
    ]


def _made(cells: Sequence[Cell], work: Path, split: SplitName, jobs: int, allow_partial: bool) -> Iterator[Cell]:
    texts = [settings_of(cell.config.method).render(cell.config) for cell in cells]
    if jobs == 1:
        for cell, text in zip(cells, texts, strict=True):
            run_cell(text, work / cell.name, split, allow_partial)
            yield cell
        return
    # Spawned: a process that has computed in several threads cannot be forked.
    context, jobs = get_context("spawn"), min(jobs, max(1, len(cells)))
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_beside, initargs=(jobs,)) as pool:
        given = {
            pool.submit(run_cell, text, work / cell.name, split, allow_partial): cell
            for cell, text in zip(cells, texts, strict=True)
        }
        try:
            for done in as_completed(given):
                done.result()
                yield given[done]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _begin_beside(jobs: int) -> None:
    share_machine(jobs)
    _end_with_parent()


def _end_with_parent() -> None:
    """Have this process end as soon as its parent is gone, killed say: the next ablation goes on with the same runs."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def run_cell(config_text: str, folder: Path, split: SplitName, allow_partial: bool = False) -> None:
    """Train one run into a folder, or go on with it, and score it; a config travels to another process as text."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / "wanted.json"
    write_file(wanted, config_text.encode())
    config = load_config(wanted)
    wanted.unlink()
    cache = open_cache(
        config.cache, allow_partial=allow_partial, verify=config.verify_reads, local_cache=config.local_cache
    )
    if not is_finished(folder):
        train(config, cache, folder, resume=True)
    device = choose_device(config.device)
    scores, _, _, found = evaluate_queries(folder, cache, device, load_trained, split)
    write_json(folder / f"eval-{split}-ablation.json", scores)
    queries = {"ids": found.ids, "hits": found.values["recall_at_1"].tolist(), "labels": found.classes.tolist()}
    write_file(_queries_file(folder, split), json.dumps(queries).encode())  # last: the sign that a cell is finished


def read_cell(cell: Cell, work: Path, split: SplitName) -> Scored:
    """A finished cell from its folder."""
    folder = work / cell.name
    queries = read_json(_queries_file(folder, split))
    hits = dict(zip(queries["ids"], queries["hits"], strict=True))
    labels = dict(zip(queries["ids"], queries["labels"], strict=True))
    return Scored(cell, load_result(folder), read_json(folder / f"eval-{split}-ablation.json"), hits, labels)


def paired(runs: Sequence[Scored], ids: Sequence[str]) -> np.ndarray:
    """Answers to the queries `ids`, averaged over runs of several seeds: (N,)."""
    return np.mean([[run.hits[name] for name in ids] for run in runs], axis=0)


def _queries_file(folder: Path, split: SplitName) -> Path:
    return folder / f"queries-{split}.json"
