"""What a manifest says of one build that another build of the same cache would not repeat."""

import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from cache_schema.format.manifest import Provenance
from pipeline.versions import versions_of

_VERSIONED = ("dit-distill", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")


def provenance_of(device: torch.device | None = None, seconds: float | None = None) -> Provenance:
    """When, with what and by which command; device: the teacher's and seconds: of this process, where it built."""
    name = None
    if device is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions_of(_VERSIONED),
        device=name,
        seconds=None if seconds is None else round(seconds, 1),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
