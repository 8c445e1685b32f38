"""Exporting a finished run: everything is made beside the folder and moved there once it is whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import TrainError
from trainer.export.card import describe, render_card
from trainer.export.onnx_file import require_onnx, write_onnx
from trainer.export.reduced import BITS, Bits, file_of, write_reduced
from trainer.export.timm_folder import write_timm_folder
from trainer.models.opening import ABOUT, CONFIG, WEIGHTS
from trainer.models.student import Student, load_student
from trainer.runs import CONFIG as RUN_CONFIG
from trainer.runs import SplitName, load_result, read_config, read_json, refuse_without_teacher, scores_file

if TYPE_CHECKING:
    from cache_schema import Cache

ONNX, CARD = "model.onnx", "README.md"
FORMS = (ONNX, *(file_of(bits) for bits in BITS))


def export_run(
    run: Path, folder: Path, cache: Cache | None, onnx: bool = True, overwrite: bool = False, bits: Sequence[Bits] = ()
) -> list[str]:
    """Write the student of a finished run to `folder` as timm loads it, with a card and, if wanted, as ONNX.

    `cache` is the run's, for what the card tells of data and teacher. `bits`: forms of the ONNX file in fewer bits,
    which are scored on the cache. Returns the names of the files. Raises TrainError where the run is not finished, the
    folder is taken, or the network cannot be written.
    """
    result = load_result(run)
    refuse_without_teacher(run, "an export")
    if cache is not None and cache.manifest.cache_id != result["cache_id"]:
        raise TrainError(
            f"{run} was trained on cache {result['cache_id'][:8]}, not on {cache.manifest.label}; its card would tell "
            "of another teacher"
        )
    _check_folder(folder, overwrite)
    if onnx:
        require_onnx()
    if bits and not onnx:
        raise TrainError(f"--{bits[0]} is a form of the ONNX file; leave out --no-onnx")
    if bits and cache is None:
        raise TrainError(f"--{bits[0]} is kept with its scores, and the run's cache is not at hand; give --cache")
    student = load_student(run).eval()
    config = read_config(run / RUN_CONFIG)
    squashed = stored_squashed(run, config, student, cache)
    about = describe(config, result, _scores(run), cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as made:
            aside = Path(made)
            difference = write_onnx(student, aside / ONNX) if onnx else None
            if bits and cache is not None:
                about["onnx"] = [asdict(each) for each in write_reduced(student, cache, aside / ONNX, aside, bits)]
            write_timm_folder(student, aside, about, squashed)
            (aside / CARD).write_text(render_card(student, about, difference, squashed), encoding="utf-8")
            for name in (CONFIG, *FORMS):  # of an export before this one; without its config it is not loaded
                (folder / name).unlink(missing_ok=True)
            names = [name for name in (WEIGHTS, *FORMS, CARD, CONFIG) if (aside / name).is_file()]
            for name in names:
                shutil.move(aside / name, folder / name)
    except OSError as error:
        raise TrainError(f"cannot write {folder}: {error.strerror or error}") from error
    return names


def _scores(run: Path) -> dict[str, Any] | None:
    """What the run was scored at: on the test split, or failing that on the classes that it held out."""
    splits: tuple[SplitName, ...] = ("test", "validation")
    files = (run / scores_file(split) for split in splits)
    return next((read_json(file) for file in files if file.is_file()), None)


def stored_squashed(run: Path, config: dict[str, Any], student: Student, cache: Cache | None) -> bool:
    """Whether the student saw crops of images that the cache had squashed; raises TrainError where none can tell."""
    if student.fit != "crop":
        return False
    if cache is not None:
        return cache.manifest.images is not None and cache.manifest.images.shape == "square"
    if config.get("fit") == "crop":  # asked for; `auto` crops only what has its aspect
        raise TrainError(f"{run} crops the images of its cache, which must say how they are kept; give --cache")
    return False


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raise TrainError where an export would replace or mix with what is there."""
    if folder.exists() and not folder.is_dir():
        raise TrainError(f"{folder} is a file; give another --output")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if (folder / RUN_CONFIG).is_file() and ABOUT not in read_json(folder / RUN_CONFIG):
        raise TrainError(f"{folder} holds a {RUN_CONFIG} that is not of an export; give another --output")
    if not overwrite:
        raise TrainError(f"{folder} is not empty; give another --output, or --overwrite to replace an export there")
