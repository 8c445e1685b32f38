"""A student's ONNX file in fewer bits, kept with the scores that it has so: what is lost is measured, not hoped."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from trainer.data.images import ImageStore
from trainer.data.splits import select_split
from trainer.errors import TrainError
from trainer.evaluation.embed import BATCH, TestSplit, open_test_split
from trainer.evaluation.metrics import retrieval_scores
from trainer.export.onnx_file import quietly
from trainer.models.student import Student

if TYPE_CHECKING:
    from cache_schema import Cache

Bits = Literal["fp16", "int8"]
BITS: tuple[Bits, ...] = get_args(Bits)
CALIBRATED_ON = 256  # training images, from which the ranges of int8 are taken
_MULTIPLYING = ["Conv", "MatMul", "Gemm"]  # what int8 is for; the normalisation of pixels and embedding stays as it is


@dataclass(frozen=True)
class Reduced:
    """An ONNX file with what it scores on the test split, and its size."""

    name: str
    megabytes: float
    scores: dict[str, float]


def file_of(bits: Bits) -> str:
    """What the file is called."""
    return f"model.{bits}.onnx"


def write_reduced(
    student: Student, cache: Cache, onnx_file: Path, folder: Path, wanted: Sequence[Bits]
) -> list[Reduced]:
    """Write `onnx_file` in fewer bits into `folder`; returns what it and they score on the cache's test split.

    int8 has its ranges from images of the train split. Raises TrainError where the cache lacks a split, or what a file
    gives is not finite.
    """
    test = open_test_split(cache, student.input_size, fit=student.fit)
    files = [onnx_file]
    for bits in wanted:
        target = folder / file_of(bits)
        if bits == "fp16":
            _write_fp16(onnx_file, target)
        else:
            _write_int8(onnx_file, target, _training_images(student, cache))
        files.append(target)
    return [Reduced(file.name, file.stat().st_size / 1e6, score_onnx(file, test)) for file in files]


def score_onnx(file: Path, test: TestSplit) -> dict[str, float]:
    """Recall at each K and MAP@R of what onnxruntime makes of the images of a split."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    rows, found = test.split.rows, []
    for start in range(0, len(rows), BATCH):
        pixels = test.images.load(rows[start : start + BATCH]).numpy()
        found.append(session.run(["embedding"], {"pixels": pixels})[0])
    embeddings = torch.from_numpy(np.concatenate(found))
    if not embeddings.isfinite().all():
        raise TrainError(
            f"{file.name} gives embeddings that are not finite: this network does not fit into so few bits"
        )
    return retrieval_scores(embeddings, test.labels)


def _write_fp16(source: Path, target: Path) -> None:
    """Weights and arithmetic in 16 bits, the embedding in 32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quietly():
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def _write_int8(source: Path, target: Path, images: Iterator[np.ndarray]) -> None:
    """Weights and activations of what multiplies in 8 bits, by channel, with ranges from images (B, 3, S, S) uint8.

    The first and the last product stay as they are: pixels and embedding have the widest ranges, and what is lost there
    nothing makes good (benchmarks/README.md, "Fewer bits").
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            pixels = next(images, None)
            return None if pixels is None else {"pixels": pixels}

    with tempfile.TemporaryDirectory() as folder, quietly():
        prepared = Path(folder) / "prepared.onnx"
        # Its own inference of shapes stumbles over a free batch size; onnx's does not.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        products = [node.name for node in onnx.load(prepared).graph.node if node.op_type in _MULTIPLYING]
        quantize_static(
            str(prepared), str(target), Images(), per_channel=True, activation_type=QuantType.QUInt8,
            op_types_to_quantize=_MULTIPLYING, nodes_to_exclude=[products[0], products[-1]],
        )  # fmt: skip


def _training_images(student: Student, cache: Cache) -> Iterator[np.ndarray]:
    rows = select_split(cache, "train", need_features=False).rows
    if not len(rows):
        raise TrainError(f"cache {cache.manifest.label} has no training images, from which int8 takes its ranges")
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(CALIBRATED_ON, len(rows)), dtype=np.int64))]
    store = ImageStore(cache, student.input_size, chosen, 0, student.fit)
    for start in range(0, len(chosen), BATCH):
        yield store.load(chosen[start : start + BATCH]).numpy()
