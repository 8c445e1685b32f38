"""Evaluation on the classes never trained on: the student alone, and the GIM's E_D as an auxiliary at test time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from trainer.config import TrainConfig, load_config
from trainer.data.batches import Split, choose_timesteps, select_split, token_shape
from trainer.data.images import ImageStore
from trainer.device import Precision, autocast
from trainer.errors import TrainError
from trainer.evaluation.metrics import COLUMNS, retrieval_scores
from trainer.methods.gim import GenerativeInjectionModule
from trainer.models.student import Student, load_student
from trainer.training.run_folder import load_result

if TYPE_CHECKING:
    from cache_schema import Cache

BATCH = 64  # images


@dataclass(frozen=True)
class TestSplit:
    """What an evaluation needs, kept between the evaluations of one run: rows, labels, decoded images."""

    cache: Cache
    split: Split
    images: ImageStore
    has_features: bool

    __test__ = False  # not a pytest class

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.split.labels)


def open_test_split(cache: Cache, image_size: int, memory_gb: float = 1.0, split: str = "test") -> TestSplit:
    """Choose the rows to evaluate; raises TrainError when the cache has none."""
    rows = select_split(cache, split, need_features=False)
    if not len(rows.rows):
        raise TrainError(f"cache {cache.manifest.label} has no rows of split {split!r} to evaluate on")
    # The stored images are the canonical view; features of another view would be of other pixels.
    features = "canonical" in cache.manifest.views and all(cache.has_features(int(row)) for row in rows.rows)
    return TestSplit(cache, rows, ImageStore(cache, image_size, rows.rows, memory_gb), features)


def _precision(device: torch.device) -> Precision:
    """float32 on a CPU, so that the scores of a student do not depend on the machine that computes them."""
    return "float32" if device.type == "cpu" else "bfloat16"


@torch.inference_mode()
def embed_students(student: Student, test: TestSplit, device: torch.device) -> Tensor:
    """E_R of every test image: (N, C) float32 on the CPU."""
    student.eval()
    found = []
    for rows in _chunks(test.split.rows):
        with autocast(device, _precision(device)):
            found.append(student(test.images.load(rows).to(device)).float().cpu())
    return torch.cat(found)


@torch.inference_mode()
def embed_auxiliary(
    gim: GenerativeInjectionModule,
    student: Tensor,
    test: TestSplit,
    tap: str,
    timesteps: tuple[int, ...],
    device: torch.device,
) -> dict[str, Tensor]:
    """E_D of every test image from E_R (N, C) and its cached features: {"unmasked", "masked"} -> (N, P, C)."""
    gim.eval()
    found: dict[str, list[Tensor]] = {"unmasked": [], "masked": []}
    for at, rows in zip(_chunks(np.arange(len(student))), _chunks(test.split.rows), strict=True):
        features = test.cache.read(rows.tolist(), tap=tap, timesteps=list(timesteps), view="canonical")
        with autocast(device, _precision(device)):
            bridged = gim.bridge(features.decode(device=device, dtype=torch.float32))
            for name in found:
                injected = gim.infuse(student[at].to(device), bridged, masked=name == "masked")
                found[name].append(injected.float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def average_timesteps(injected: Tensor) -> Tensor:
    """One E_D per image: the mean over timesteps of the normalised embeddings, (N, P, C) -> (N, C)."""
    return F.normalize(injected, dim=-1).mean(1)


def evaluate_modules(
    student: Student,
    gim: GenerativeInjectionModule | None,
    test: TestSplit,
    tap: str,
    timesteps: tuple[int, ...],
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scores and embeddings of a student and, where the test rows have features, of E_D.

    Scores: {"student": …, "auxiliary": {"unmasked"|"masked": {"mean"|"<timestep>": …}} or None}; embeddings by
    the names "student", "unmasked", "masked".
    """
    embeddings = {"student": embed_students(student, test, device)}
    scores: dict[str, Any] = {
        "student": retrieval_scores(embeddings["student"], test.labels),
        "auxiliary": None,
    }
    if gim is not None and test.has_features:
        embeddings |= embed_auxiliary(gim, embeddings["student"], test, tap, timesteps, device)
        scores["auxiliary"] = {
            name: {
                "mean": retrieval_scores(average_timesteps(embeddings[name]), test.labels),
                **{
                    str(timestep): retrieval_scores(embeddings[name][:, p], test.labels)
                    for p, timestep in enumerate(timesteps)
                },
            }
            for name in ("unmasked", "masked")
        }
    return scores, embeddings


def evaluate_run(path: Path, cache: Cache, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor], TestSplit]:
    """Evaluate a run directory or a lone `student.safetensors` on the cache's test split.

    Returns what `eval.json` holds, the embeddings by name, and the test split. Raises TrainError when the run
    does not fit the cache.
    """
    if path.is_dir():
        load_result(path)  # says so if the run is not finished
    student = load_student(path).to(device)
    gim, tap = None, ""
    timesteps: tuple[int, ...] = ()
    if path.is_dir() and (path / "gim.safetensors").is_file():
        config = load_config(path / "config.json")
        tap, timesteps = config.tap, choose_timesteps(cache, config.timesteps)
        gim = load_gim(path, cache, config, student.dim).to(device)
    test = open_test_split(cache, student.input_size)
    scores, embeddings = evaluate_modules(student, gim, test, tap, timesteps, device)
    about = {
        "cache_id": cache.manifest.cache_id,
        "split": "test",
        "queries": len(test.split.rows),
        "classes": test.split.classes,
    }
    return {**about, **scores}, embeddings, test


def cache_of_run(run: Path) -> str:
    """Where the cache is that a run was trained from; raises TrainError for a lone student file."""
    if not run.is_dir():
        raise TrainError(f"{run} does not say which cache to evaluate on; give --cache")
    return load_config(run / "config.json").cache


def load_gim(run: Path, cache: Cache, config: TrainConfig, dim: int) -> GenerativeInjectionModule:
    """Load a run's GIM for the features of `cache`; raises TrainError when they have another shape."""
    P, L, C_t = token_shape(cache, config.tap, choose_timesteps(cache, config.timesteps))
    gim = GenerativeInjectionModule(L, C_t, dim, P, config.gim)
    try:
        gim.load_state_dict(load_file(run / "gim.safetensors"))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise TrainError(f"the GIM of {run} does not fit tap {config.tap} of this cache: {reason}") from error
    return gim


def save_embeddings(file: Path, embeddings: dict[str, Tensor], test: TestSplit) -> None:
    """Write embeddings, cache rows, sample ids and labels of the test split as .npz arrays (no pickle)."""
    rows = test.split.rows
    ids = np.array(test.cache.samples["id"].take(rows).to_pylist())
    arrays = {name: value.numpy() for name, value in embeddings.items()}
    np.savez(file, allow_pickle=False, rows=rows, ids=ids, labels=test.split.labels, **arrays)


def format_scores(scores: dict[str, Any]) -> str:
    """The table a person reads: one line per kind of embedding, percent."""
    lines = {"student (E_R)": scores["student"]}
    for mask, by_timestep in (scores.get("auxiliary") or {}).items():
        for timestep, values in by_timestep.items():
            where = "mean over timesteps" if timestep == "mean" else f"timestep {timestep}"
            lines[f"auxiliary (E_D, E_R {mask}), {where}"] = values
    return format_table(lines)


def format_table(lines: dict[str, dict[str, float]]) -> str:
    """Lay out scores by name as text: a header, then a line each, percent."""
    width = max(len(name) for name in lines)
    rows = [f"{'':{width}}" + "".join(f"{title:>8}" for title in COLUMNS.values())]
    for name, scores in lines.items():
        rows.append(f"{name:{width}}" + "".join(f"{100 * scores[column]:8.1f}" for column in COLUMNS))
    return "\n".join(rows)


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(values), BATCH):
        yield values[start : start + BATCH]
