"""A student as a search uses it: images prepared as in its evaluation, and an id that tells it from all others."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer.data.images import CENTRE, fit_picture
from trainer.device import choose_device, full_precision, use_device
from trainer.errors import TrainError
from trainer.export.export import stored_squashed
from trainer.models.opening import is_export, open_student, shows_squashed
from trainer.models.student import Student
from trainer.runs import CONFIG, cache_of_run, read_config, refuse_without_teacher


@dataclass(frozen=True)
class Model:
    """A trained student on a device; `id` is a digest of its weights and of how it wants its images."""

    path: Path
    student: Student
    squashed: bool  # it saw the middle of squashed images
    device: torch.device
    id: str

    @property
    def label(self) -> str:
        """What a person calls it: the name of its folder."""
        place = self.path.resolve()
        return place.name if place.is_dir() else place.parent.name

    def prepare(self, image: Image.Image) -> np.ndarray:
        """An RGB image as the student saw those of its evaluation: (S, S, 3) uint8."""
        size = self.student.input_size
        if self.squashed:
            side = math.floor(size / CENTRE)
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        return fit_picture(image, size, self.student.fit)

    @torch.inference_mode()
    def embed(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """E_R of prepared pictures (S, S, 3): (B, C) float32, not normalised, as the evaluation computes it.

        Raises TrainError where one is not finite.
        """
        size = self.student.input_size
        pixels = np.empty((len(pictures), 3, size, size), dtype=np.uint8)
        for place, picture in zip(pixels, pictures, strict=True):
            place[:] = picture.transpose(2, 0, 1)
        with full_precision(self.device):
            found = self.student(torch.from_numpy(pixels).to(self.device)).float().cpu().numpy()
        if not np.isfinite(found).all():
            raise TrainError(f"{self.path} gives embeddings that are not finite; the network is broken, train it again")
        return found

    def describe(self) -> dict[str, Any]:
        """What is kept with embeddings to know the student again; the path is added where it is written."""
        return {"id": self.id, "label": self.label, "student": self.student.name, "size": self.student.input_size}


def open_model(path: Path, device: str = "auto") -> Model:
    """The student of a run, of an export, or a lone `student.safetensors`; raises TrainError where that cannot be."""
    where = choose_device(device)
    use_device(where)
    refuse_without_teacher(path, "embedding images of a folder")
    student = open_student(path).eval()
    squashed = _saw_squashed(path, student)
    return Model(path, student.to(where), squashed, where, _digest(student, squashed))


def _saw_squashed(path: Path, student: Student) -> bool:
    if student.fit != "crop":
        return False
    if is_export(path):
        return shows_squashed(path)
    if not path.is_dir():
        raise TrainError(f"{path} does not say how the images were kept that it crops; name its run, or an export")
    from cache_schema import CacheError, open_cache

    config = read_config(path / CONFIG)
    if config.get("fit") != "crop":
        return False  # `auto` crops only images that have their aspect
    try:
        cache = open_cache(cache_of_run(path), allow_partial=True, verify=False)
    except (CacheError, OSError) as error:
        raise TrainError(
            f"{path} crops the images of its cache, which is not at hand ({error}); export the run with --cache, and "
            "use the export"
        ) from None
    return stored_squashed(path, config, student, cache)


def _digest(student: Student, squashed: bool) -> str:
    """The same for a run and for its export: of names, shapes and bytes of the weights, and of the preparation."""
    about = {
        "size": student.input_size,
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
        "fit": student.fit,
        "squashed": squashed,
    }
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, value in sorted(student.network.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
