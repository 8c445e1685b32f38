"""A student in ONNX: uint8 pixels in, unit embeddings out, compared with PyTorch before it is kept."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import TrainError
from trainer.models.student import Student

TOLERANCE = 1e-4  # largest difference of a component of a unit embedding
_TALKATIVE = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir", "onnxruntime")  # loggers
_MISSING = "--onnx needs packages that are not installed ({}): pip install 'dit-distill[export]', or give --no-onnx"


class UnitEmbedding(nn.Module):
    """Images (B, 3, S, S) uint8 to unit embeddings (B, C) float32; the normalisation of the pixels is inside."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.student(pixels), dim=-1)


def require_onnx() -> None:
    """Raises TrainError where the packages of the extra are missing, before anything is written."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TrainError(_MISSING.format(error.name)) from None


def write_onnx(student: Student, file: Path) -> float:
    """Write a student as ONNX with a free batch size; returns the largest difference to PyTorch.

    Raises TrainError where the network cannot be exported, or computes something else in onnxruntime.
    """
    module = UnitEmbedding(student).eval()
    example = _pixels(2, student.input_size)
    # A batch of two, for torch.export takes a dimension of one for a constant.
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1)}}
    try:
        with quietly(), torch.inference_mode(False):
            program = torch.onnx.export(
                module, (example,), dynamo=True, dynamic_shapes=shapes, input_names=["pixels"],
                output_names=["embedding"], verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(str(file), external_data=False)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TrainError(f"{student.name} cannot be exported to ONNX ({reason}); give --no-onnx") from error
    difference = compare(module, file, student.input_size)
    if not difference <= TOLERANCE:
        file.unlink()
        raise TrainError(
            f"{student.name} in onnxruntime differs from PyTorch by {difference:.1e}, more than {TOLERANCE:g}: "
            "not kept; give --no-onnx"
        )
    return difference


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what the exporter logs and warns of its own passes, thousands of lines, from whoever exports or tests."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def compare(module: nn.Module, file: Path, size: int) -> float:
    """The largest difference of a component between onnxruntime and PyTorch, over batches of one and of three."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    differences = []
    for count in (1, 3):
        pixels = _pixels(count, size)
        (found,) = session.run(["embedding"], {"pixels": pixels.numpy()})
        with torch.inference_mode():
            expected = module(pixels).numpy()
        differences.append(float(np.abs(found - expected).max()))
    # NumPy's, for Python's max() may pass over a NaN.
    return float(np.max(differences))


def _pixels(count: int, size: int) -> Tensor:
    """Random images (count, 3, size, size) uint8, the same ones each time."""
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (count, 3, size, size), dtype=np.uint8))
