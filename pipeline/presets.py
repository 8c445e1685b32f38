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
    # There is no detector and no vision-language model of this size.
    "annotate": {"boxes": "dataset", "captions": "dataset"},
    "refine": {"steps": 200, "batch": 8, "checkpoint_every": 50},
    "build": {
        "timesteps": [22, 28],
        "feature_splits": ["train", "unlabeled", "test"],
        "image_size": 96,
        "batch": 16,
    },
}

# Rendered images, whose boxes and captions are exact, and whose mirrored images are as good as others.
_DEMO: Values = {"teacher": {"name": "demo"}, "build": {"views": ["canonical", "hflip"], "image_format": "png"}}

DATASETS: dict[str, tuple[Values, ...]] = {
    "cars": (),
    "cub": (),
    "demo": (_SMALL, _DEMO),
    "dogs": (),
    "folder": (),
    # 24 000 training images: 300 GB in int8, a quarter of it with the mean over 2 × 2 tokens.
    "nabirds": ({"build": {"pool": 2}},),
}

# The paper's settings are those of full-size teachers: boxes from a detector, captions from a vision-language model.
TEACHERS: dict[str, tuple[Values, ...]] = {
    "demo": (_SMALL, {"build": {"pool": 1}}),
    "flux-dev": (),
    "flux-kontext": (),
    "flux2-klein": (),
    "flux2-klein-base": (),
    "sd35-medium": (),
    "sd35-large": (),
}


def preset_values(dataset: str, teacher: str | None = None) -> Values:
    """What the presets of a data set and of a teacher set, as nested plain values; the teacher's have the last word.

    teacher: default that of the data set. Data sets and teachers of one's own have the paper's settings.
    """
    values: Values = {}
    for layer in (_BASE, *DATASETS.get(dataset, ())):
        _merge(values, layer)
    name = teacher or values["teacher"]["name"]
    for layer in (*TEACHERS.get(name, ()), {"data": {"name": dataset}, "teacher": {"name": name}}):
        _merge(values, layer)
    return values


def _merge(values: Values, layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        if isinstance(value, Mapping):
            _merge(values.setdefault(name, {}), value)
        else:
            values[name] = value


def run_folder(dataset: str) -> Path:
    """Where everything made from a data set goes unless told otherwise."""
    return Path("runs") / dataset
