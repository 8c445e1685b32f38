"""What a finished run says of itself, as data and in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import processes
from trainer.device import decide_precision, peak_memory
from trainer.evaluation.tables import auxiliary_about
from trainer.evaluation.worth import not_followed
from trainer.methods.registry import mode_name
from trainer.runs import LOG, read_metrics
from trainer.training.assembly import Parts
from trainer.training.logs import mean_losses
from trainer.training.pace import Timing


def describe(
    parts: Parts, run: Path, done: int, seconds: float, timing: Timing, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """What `result.json` holds after `done` updates of a run, for so many seconds, `timing` of them in its updates.

    `scores`: "validation", what its weights score there, and "best", where classes were held out.
    """
    batches = parts.batches
    return {
        **scores,
        "validation_classes": batches.validation.classes,
        "method": parts.config.method,
        "mode": mode_name(parts.asked),
        **({} if parts.worth is None else {"worth": parts.worth.as_json()}),
        "seed": parts.config.seed,
        "scored": parts.method.scored,
        "precision": decide_precision(parts.config.precision, parts.device, parts.method.student),
        "cache_id": parts.cache.manifest.cache_id,
        "other_caches": parts.other_caches,
        "seconds": round(seconds, 3),
        **timing.rates(batches.batch_rows),
        "feature_bytes": done * batches.feature_bytes,
        "peak_memory_gb": round(peak_memory(parts.device) / 1e9, 3),
        "device": str(parts.device),
        "processes": processes.count(),
        "student_updates": done,
        "epochs": done / batches.per_epoch,
        "images_seen": done * batches.batch_rows,
        "train_images": len(batches.label_of),
        "train_classes": batches.classes,
        "final_losses": mean_losses(read_metrics(run / LOG), after=done - batches.per_epoch),
    }


def summary(result: Mapping[str, Any], label: str) -> str:
    """A finished run in a few lines; `label` names its cache."""
    best = result.get("best")
    recall = "not measured in training; hold classes out to follow it: --validation-classes 0.2"
    if best:
        when = f"the best, after update {best['update']} of {result['student_updates']}"
        recall = f"{100 * best['recall_at_1']:.1f} % on {result['validation_classes']} validation classes ({when})"
    why = not_followed(result)
    whose = "of the GPU" if str(result["device"]).startswith("cuda") else "of the process"
    lines = {
        "recall@1": recall,
        **_beside(result),
        **({"teacher": why} if why else {}),
        "time": f"{result['seconds']:.0f} s; {result['images_per_second']:.0f} images/s in training, "
        f"{100 * result['data_wait']:.1f} % of that time waiting for data",
        "memory": f"{result['peak_memory_gb']:.2f} GB {whose} at most",
        "cache": f"{label} ({result['cache_id']})",
    }
    return "\n".join(f"  {name:10}{said}" for name, said in lines.items())


def _beside(result: Mapping[str, Any]) -> dict[str, str]:
    """What the teacher's side has on the same classes at the end, where there is any: what E_R is to come up to."""
    scores = result.get("validation") or {}
    found = {name: by["mean"]["recall_at_1"] for name, by in (scores.get("auxiliary") or {}).items()}
    said = [f"{100 * scores['student']['recall_at_1']:.1f} % by E_R"] if found else []
    said += [f"{100 * recall:.1f} % by {auxiliary_about(scores, name)}" for name, recall in found.items()]
    return {"last": "; ".join(said)} if said else {}
