"""What is done where nothing else is said, per data set and per teacher. No model library is imported here.

A configuration (`pipeline.config.RunConfig`) starts from the defaults written beside each of its fields, which are the
paper's; these tables say only what differs from them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Values = dict[str, Any]

_BASE: Values = {"teacher": {"name": "flux-kontext"}, "build": {"batch": 4}}

# Minutes on two CPU cores. Test features are cached too, so that the teacher's own recall can be measured (rows 2 and
# 3 of the paper's ablation). The clearest timesteps are those at which the demo teacher retrieves best.
_SMALL: Values = {
    # There is no detector and no vision-language model of this size, so no other boxes to be as wide as.
    "annotate": {"boxes": "dataset", "captions": "dataset", "padding": 0.0},
    # A LoRA of so small a network, and so few steps, take a larger rate than the paper's. All of them go into images as
    # they are.
    "refine": {"steps": 200, "batch": 8, "lr": 1e-3, "grad_clip": 1.0, "flip": False, "checkpoint_every": 50},
    "build": {
        "timesteps": [22, 28],
        "feature_splits": ["train", "unlabeled", "test"],
        "image_size": 96,
        "batch": 16,
    },
}

# Rendered images, whose boxes and captions are there, and whose mirrored images are as good as others.
_DEMO: Values = {"teacher": {"name": "demo"}, "build": {"views": ["canonical", "hflip"], "image_format": "png"}}

# Photographs: with their aspect and the usual margin (256 for 224), so that a student can be trained on crops, and
# mirrored too, so that a mirrored student meets features of what it sees; the teacher is refined on both, clipping as
# others do.
_PHOTOGRAPHS: Values = {
    "refine": {"grad_clip": 1.0, "flip": True},
    "build": {"views": ["canonical", "hflip"], "image_size": 256, "image_shape": "aspect"},
}

DATASETS: dict[str, tuple[Values, ...]] = {
    "cars": (_PHOTOGRAPHS,),
    "cub": (_PHOTOGRAPHS,),
    "demo": (_SMALL, _DEMO),
    "dogs": (_PHOTOGRAPHS,),
    "folder": (_PHOTOGRAPHS,),
    # 24 000 training images: 600 GB in int8, a quarter of it with the mean over 2 × 2 tokens.
    "nabirds": (_PHOTOGRAPHS, {"build": {"pool": 2}}),
}

# Raw features behind a late block are a known-bad choice for FLUX (DiTF, arXiv 2505.18584, SPair-71k: raw 29.9,
# modulated 65.3, at block 28 of 57), and the DiT is left in its middle: half the cost.
_FLUX1: Values = {"build": {"taps": ["single.9.modulated"]}}
_FLUX2_KLEIN: Values = {"build": {"taps": ["single.7.modulated"]}}

# The paper's settings are those of full-size teachers: boxes from a detector, captions from a vision-language model.
TEACHERS: dict[str, tuple[Values, ...]] = {
    "demo": (_SMALL, {"build": {"pool": 1, "image_shape": "square"}}),
    "flux-dev": (_FLUX1,),
    "flux-kontext": (_FLUX1,),
    "flux2-klein": (_FLUX2_KLEIN,),
    "flux2-klein-base": (_FLUX2_KLEIN,),
    "sd35-medium": (),
    "sd35-large": (),
}

# A teacher that is an image encoder of timm: `timm:NAME` or `timm:NAME:weights.safetensors`.
TIMM_PREFIX = "timm:"
# A control: the VAE alone of any other teacher, `vae:NAME`.
VAE_PREFIX = "vae:"
# An image encoder sees no noise and reads no text, so there is one timestep and no Stage I. It costs so little that
# mirrored images are cached as well.
_ENCODER: Values = {
    "steps": ["build", "verify"],
    "annotate": {"boxes": "dataset", "captions": "dataset"},
    "probe": {"timesteps": [1], "num_steps": 1, "batch": 32},
    "build": {
        "taps": ["tokens"],
        "timesteps": [1],
        "num_steps": 1,
        "text": "none",
        "views": ["canonical", "hflip"],
        "batch": 32,
    },
}


def preset_values(dataset: str, teacher: str | None = None) -> Values:
    """What the presets of a data set and of a teacher set, as nested plain values; the teacher's have the last word.

    teacher: default that of the data set. Data sets of one's own are taken for photographs.
    """
    values: Values = {}
    for layer in (_BASE, *DATASETS.get(dataset, (_PHOTOGRAPHS,))):
        _merge(values, layer)
    name = teacher or values["teacher"]["name"]
    for layer in (*_teacher_layers(name), {"data": {"name": dataset}, "teacher": {"name": name}}):
        _merge(values, layer)
    return values


def _teacher_layers(name: str) -> tuple[Values, ...]:
    if name.startswith(VAE_PREFIX):
        return (_ENCODER, {"build": {"taps": ["latents"]}})
    return (_ENCODER,) if name.startswith(TIMM_PREFIX) else TEACHERS.get(name, ())


def _merge(values: Values, layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        if isinstance(value, Mapping):
            _merge(values.setdefault(name, {}), value)
        else:
            values[name] = value


def run_folder(dataset: str) -> Path:
    """Where everything made from a data set goes unless told otherwise."""
    return Path("runs") / dataset
