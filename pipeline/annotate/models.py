"""The models of an annotation: found on disk or fetched, named by digest, loaded whole or not at all."""

import gc
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.annotate.config import AnnotateError
from pipeline.teachers.passes import memory_errors
from pipeline.teachers.weights import component_digest, file_digest

# Weights in other formats are copies of these, and some of them are pickles.
_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine. source: as the user named it; revision: the hub's commit; digest: of all its files."""

    source: str
    revision: str | None
    digest: str
    folder: Path


def locate_model(source: str, revision: str | None, option: str) -> ModelFiles:
    """The files of a transformers model, from a folder or a hub repository, which is downloaded if need be.

    option: the option that named it, for messages. Raises AnnotateError in one line if it cannot be had.
    """
    folder = Path(source)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise AnnotateError(f"{option} {source}: no config.json there; it must be a folder saved by transformers")
        return ModelFiles(source, None, _digest(folder), folder)
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise AnnotateError(f"{option} {source}: no such folder, and not the name of a hub repository (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise AnnotateError(
            f"{option} {source}: not in the local hub cache and could not be downloaded ({_first_line(error)}); "
            f"give {option} the path of a folder that transformers saved, or choose another source with "
            f"{'--boxes dataset' if option == '--detector' else '--captions dataset'}"
        ) from None
    return ModelFiles(source, folder.name, _digest(folder), folder)


def load_model(auto_class: Any, files: ModelFiles, option: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """The processor and the model of a folder, ready to predict. auto_class: one of transformers' AutoModelFor….

    Raises AnnotateError in one line if the folder holds no such model, or not all of its weights, and OutOfMemory if
    these do not fit on the device.
    """
    from transformers import AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        processor = AutoProcessor.from_pretrained(files.folder)
        model, loading = auto_class.from_pretrained(
            files.folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise AnnotateError(f"{option} {files.source}: cannot be loaded: {_first_line(error)}") from None
    if missing := sorted(loading["missing_keys"]):
        raise AnnotateError(
            f"{option} {files.source}: its files lack {len(missing)} weights of {type(model).__name__} "
            f"({missing[0]}, …); download it again"
        )
    # The device alone is asked here: fewer images at once would not make room for the weights.
    advice = f"its weights do not fit: choose a smaller {option}, --dtype bfloat16 or another --device"
    with memory_errors(f"while loading {option} {files.source}", advice):
        return processor, model.to(device).eval()


def release_memory() -> None:
    """Give back the memory of a model that nothing refers to any more, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _digest(folder: Path) -> str:
    """SHA-256 over weights, configuration and chat templates."""
    total = hashlib.sha256(component_digest(folder).encode())
    for path in sorted(folder.glob("*.jinja")):
        total.update(f"{path.name}\0{file_digest(path)}\n".encode())
    return total.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__
