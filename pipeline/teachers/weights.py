"""What a teacher's weights are: found on disk or fetched, and named by digest rather than by path."""

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from pipeline.teachers.base import TeacherError
from pipeline.teachers.known_digests import known_digest

# A LoRA as diffusers calls its file (a test compares), and what Stage I writes beside it.
LORA_NAME, LORA_RECORD_NAME = "pytorch_lora_weights.safetensors", "refine.json"
_BLOCK = 1 << 20
_MAX_HEADER = 100_000_000  # the format's own limit
# Written by the saving library, without influence on any number the model computes.
_BOOKKEEPING = {"transformers_version", "torch_dtype", "dtype"}


def lora_file(path: Path) -> Path:
    """The weights file of a LoRA given as a file or as a folder. Raises TeacherError if there is none."""
    file = path / LORA_NAME if path.is_dir() else path
    if not file.is_file():
        raise TeacherError(f"LoRA {path}: no {LORA_NAME} there; make one with dit-cache refine")
    return file


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks; of a safetensors file with its header in canonical order.

    Saving equal weights twice can give different safetensors files: the order of the header's metadata is random.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        if path.suffix == ".safetensors":
            digest.update(_canonical_header(stream))
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _canonical_header(stream: BinaryIO) -> bytes:
    """Read the header of a safetensors file (u64 size, then JSON) and return it with sorted keys.

    Bytes that are no such header are returned as they are: whether the file can be loaded is not decided here.
    """
    prefix = stream.read(8)
    data = stream.read(min(int.from_bytes(prefix, "little"), _MAX_HEADER))
    try:
        return json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return prefix + data


def component_digest(folder: Path) -> str:
    """SHA-256 over the weights and configuration of one component of a diffusers folder.

    File names and contents count; directories above, dates and the version of the saving library do not. Of large files
    the digest is remembered for as long as they are not changed.
    """
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if path.suffix == ".json" and not path.name.endswith(".index.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                content = {k: v for k, v in content.items() if not k.startswith("_") and k not in _BOOKKEEPING}
            part = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        elif path.suffix in (".safetensors", ".txt", ".model", ".json", ".jinja", ".bin"):
            part = known_digest(path, file_digest)
        else:
            continue
        total.update(f"{path.relative_to(folder)}\0{part}\n".encode())
    return total.hexdigest()


def check_weights(component: Path) -> None:
    """Raise ValueError, naming the file, unless a model's folder holds all of its weights, none of them cut short.

    Only headers are read. A folder without config.json (a tokenizer, a scheduler) has no weights.
    """
    if not (component / "config.json").is_file():
        return
    indices = sorted(component.glob("*.safetensors.index.json"))
    if indices:
        files = {component / name for i in indices for name in json.loads(i.read_text())["weight_map"].values()}
    else:
        files = {*component.glob("*.safetensors"), *component.glob("*.bin")}
        if not files:
            raise ValueError(f"no weights in {component.name}/")
    for file in sorted(files):
        if not file.is_file():
            raise ValueError(f"no {component.name}/{file.name}")
        if file.suffix == ".safetensors":
            check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Raise ValueError, naming the file, unless its header and its size fit each other."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {str(error).splitlines()[0]}") from None


def locate(spec: str, revision: str | None) -> Path:
    """The local diffusers folder of a path or hub repository, downloading the latter if it is not there yet.

    Raises TeacherError in one line if there is no such folder and nothing can be downloaded.
    """
    folder = Path(spec)
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise TeacherError(f"teacher {spec}: no model_index.json there; it must be a folder saved by diffusers")
        return folder
    if spec.count("/") != 1 or spec.startswith((".", "/")):
        raise TeacherError(f"teacher {spec}: no such folder, and not the name of a hub repository (owner/name)")
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(DiffusionPipeline.download(spec, revision=revision))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TeacherError(
            f"teacher {spec}: not in the local hub cache and could not be downloaded ({reason}); "
            "give --teacher the path of a diffusers folder, or log in to the hub and accept the model's licence"
        ) from None
