"""From a data set to its annotations: boxes first, then captions, one model in memory at a time."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cache_schema.format.identity import canonical_json
from pipeline.annotate import captioner, detector
from pipeline.annotate.box_stage import BoxStage
from pipeline.annotate.caption_stage import NO_CAPTION, CaptionStage
from pipeline.annotate.captioner import STRICTER
from pipeline.annotate.config import AnnotateConfig, AnnotateError
from pipeline.annotate.models import ModelFiles, locate_model, release_memory
from pipeline.annotate.table import counts, read_annotations, write_annotations
from pipeline.annotate.work import Rows, WorkFolder, check_settings, remove_work
from pipeline.datasets.base import Dataset
from pipeline.device import choose_device, choose_dtype
from pipeline.teachers.passes import is_out_of_memory
from pipeline.versions import versions_of

_VERSIONED = ("dit-distill", "torch", "torchvision", "transformers", "pillow")


@dataclass(frozen=True)
class Models:
    """The files of the models that a configuration needs."""

    detector: ModelFiles | None
    captioner: ModelFiles | None


def annotate(
    dataset: Dataset, config: AnnotateConfig, output: Path, *, log: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Annotate a data set into one Parquet file, or go on where a run of the same settings stopped; returns its rows.

    An image that cannot be read has a row with the reason. Raises AnnotateError if a model cannot be had, or `output`
    was made with other settings.
    """
    if not dataset.samples:
        raise AnnotateError(f"the data set {dataset.name} has no image")
    models = find_models(config)
    settings = describe_settings(dataset, config, models)
    if output.exists():
        rows, found = read_annotations(output)
        check_settings(found["settings"], settings, output)
        remove_work(output)  # a run that was killed at its very end left it
        log(f"{output}: annotated already, {len(rows)} images")
        return rows
    work = WorkFolder(output, settings)
    boxes = _run_stage(work, "boxes", config, range(len(dataset.samples)), BoxStage(dataset, config, models.detector))
    if models.detector:
        release_memory()
    readable = [i for i in range(len(dataset.samples)) if not boxes[i]["reason"]]
    captions = _run_stage(work, "captions", config, readable, CaptionStage(dataset, config, models.captioner, boxes))
    if models.captioner:
        release_memory()
    rows = [{"id": s.id, **boxes[i], **captions.get(i, NO_CAPTION)} for i, s in enumerate(dataset.samples)]
    write_annotations(output, rows, _describe_run(settings, models, rows))
    remove_work(output)
    rows, _ = read_annotations(output)
    _report(rows, output, log)
    return rows


def find_models(config: AnnotateConfig) -> Models:
    """Locate the models that the configuration needs; raises AnnotateError if one cannot be had."""
    wants_detector, wants_captioner = config.boxes == "detector", config.captions == "vlm"
    return Models(
        locate_model(config.detector, config.detector_revision, detector.OPTION) if wants_detector else None,
        locate_model(config.captioner, config.captioner_revision, captioner.OPTION) if wants_captioner else None,
    )


def describe_settings(dataset: Dataset, config: AnnotateConfig, models: Models) -> dict[str, Any]:
    """Everything that determines the annotations, under names that say which option to look at."""
    known = [
        [s.id, s.source, s.class_name]
        + ([s.box] if config.boxes == "dataset" else [])
        + ([s.caption] if config.captions == "dataset" else [])
        for s in dataset.samples
    ]
    settings: dict[str, Any] = {
        "--dataset": dataset.name,
        "super-class": dataset.superclass,
        "--boxes": config.boxes,
        "--captions": config.captions,
        "the data set's images, classes and annotations": hashlib.sha256(canonical_json(known).encode()).hexdigest(),
    }
    if config.boxes == "dataset" and config.padding:
        settings["--padding"] = config.padding
    if models.detector:
        settings |= {
            "digest of --detector": models.detector.digest,
            "--box-threshold": config.box_threshold,
            "--padding": config.padding,
        }
    if models.captioner:
        settings |= {
            "digest of --captioner": models.captioner.digest,
            "--dtype": str(choose_dtype(config.dtype, choose_device(config.device))).removeprefix("torch."),
            "--instruction": config.instruction,
            "stricter instruction": config.instruction + STRICTER,
            "--max-new-tokens": config.max_new_tokens,
            "--crop-side": config.crop_side,
        }
    return settings


def _describe_run(settings: dict[str, Any], models: Models, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def identity(files: ModelFiles | None, dtype: str) -> dict[str, Any] | None:
        if files is None:
            return None
        return {"source": files.source, "revision": files.revision, "digest": files.digest, "dtype": dtype}

    return {
        "settings": settings,
        "detector": identity(models.detector, "float32"),
        "captioner": identity(models.captioner, settings.get("--dtype", "")),
        "counts": counts(rows),
        "versions": versions_of(_VERSIONED),
    }


def _run_stage(
    work: WorkFolder,
    stage: str,
    config: AnnotateConfig,
    wanted: Sequence[int],
    compute: Callable[[Sequence[int]], Rows],
) -> Rows:
    """The rows of a stage for the wanted samples, computing and saving what is not there yet."""
    rows = work.load(stage)
    missing = [i for i in wanted if i not in rows]
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=stage, unit="image") as bar:
        for piece in _pieces(missing, config.save_every):
            done: Rows = {}
            for batch in _pieces(piece, config.batch):
                try:
                    done |= compute(batch)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise AnnotateError(
                        f"the {stage} of {len(batch)} images at once do not fit into memory; run the same command "
                        f"with --batch {max(1, config.batch // 2)}: it resumes"
                    ) from None
                bar.update(len(batch))
            work.save(stage, done)
            rows |= done
    return rows


def _pieces(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _report(rows: Sequence[dict[str, Any]], output: Path, log: Callable[[str], None]) -> None:
    found = counts(rows)
    log("boxes: " + ", ".join(f"{n} {name}" for name, n in found["box_source"].items()))
    log("captions: " + ", ".join(f"{n} {name}" for name, n in found["caption_source"].items()))
    if found["leak"]:
        log("class names in captions: " + ", ".join(f"{n} {name}" for name, n in found["leak"].items()))
    bad = [row for row in rows if row["reason"]]
    for row in bad[:5]:
        log(f"not annotated: {row['id']}: {row['reason']}")
    if bad:
        log(f"{len(bad)} of {len(rows)} images have no annotation; the column reason says why")
    log(f"wrote {output}")
