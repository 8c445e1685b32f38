"""The folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` and the Hugging Face hub load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cache_schema.storage.files import write_file
from trainer.data.images import CENTRE
from trainer.models.opening import ABOUT, CONFIG, WEIGHTS
from trainer.models.student import Student, create_network
from trainer.models.weights import save_weights


def write_timm_folder(student: Student, folder: Path, about: dict[str, Any], squashed: bool = False) -> None:
    """Write weights and `config.json`; `about` goes into the latter, where timm passes it over."""
    save_weights(student.network.state_dict(), folder / WEIGHTS)
    write_file(folder / CONFIG, (json.dumps(timm_config(student, about, squashed), indent=2) + "\n").encode())


def timm_config(student: Student, about: dict[str, Any], squashed: bool = False) -> dict[str, Any]:
    """What timm reads: the architecture with its arguments, and the preprocessing that the evaluation used."""
    with torch.device("meta"):
        _, arguments = create_network(student.name, student.kwargs)
    size = student.input_size
    return {
        "architecture": student.name,
        "num_classes": 0,
        "num_features": student.dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, size, size],
            "mean": student.mean.flatten().tolist(),
            "std": student.std.flatten().tolist(),
            "interpolation": "bicubic",
            **crop_settings(student, squashed),
        },
        ABOUT: about,
    }


def crop_settings(student: Student, squashed: bool = False) -> dict[str, Any]:
    """How timm's evaluation transform makes an image square as `fit_picture` did.

    `squashed`: the cache keeps its images as squares already, so that a student's crop of them is one of squashed
    images. timm resizes before it crops and rounds the size down, so that what it shows is within a pixel of ours.
    """
    if student.fit == "squash":
        return {"crop_pct": 1.0, "crop_mode": "squash"}
    return {"crop_pct": CENTRE, "crop_mode": "squash" if squashed else "center"}
