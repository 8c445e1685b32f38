"""How much goes through the DiT at once, and what happens when that is more than the memory holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from cache_schema.errors import DitDistillError
from pipeline.teachers.host_features import HostFeatures

# How CUDA and its libraries say it where PyTorch does not ask for the memory itself, and accelerate does not know of.
_OTHER_WORDS = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

Forward = Callable[[slice, slice], dict[str, Tensor]]

# Where one image at one timestep is too much: of a diffusion transformer, and of an image encoder.
SMALLER_TRANSFORMER = "use --quantize int8, --offload, a smaller --resolution or a larger device"
SMALLER_ENCODER = "use --dtype bfloat16, a smaller --resolution or a larger device"


class OutOfMemory(DitDistillError):  # noqa: N818 - as the errors of cache_schema
    """The device or the machine has no memory left for what was asked; the message says what to ask instead."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU, in whatever words."""
    if not isinstance(error, RuntimeError):
        return False
    said = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return said or any(words in str(error) for words in _OTHER_WORDS)


@contextmanager
def memory_errors(what: str, advice: str) -> Iterator[None]:
    """Turn running out of memory into an OutOfMemory error of one line."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {what}; {advice}") from error


class Passes:
    """Cuts batches of images × timesteps into forward passes: all timesteps of an image together where memory allows.

    batch: images per pass. adaptive: halve the pass when memory runs out, down to one image at one timestep, and stay
    with what fitted; otherwise running out of memory is an error. Nothing is left out either way. advice: for where
    even that is too much.
    """

    def __init__(
        self,
        batch: int,
        timesteps: int,
        *,
        adaptive: bool = False,
        advice: str = SMALLER_TRANSFORMER,
        log: Callable[[str], None] = print,
    ):
        self._timesteps, self._adaptive, self._advice, self._log = timesteps, adaptive, advice, log
        self._rows = batch * timesteps

    def run(self, images: int, forward: Forward) -> dict[str, Tensor]:
        """{tap: (B, T, L, C)} of a batch, in main memory.

        forward: (images, timesteps) → {tap: (images · timesteps, L, C)}.
        Raises OutOfMemory where no smaller pass is allowed or possible.
        """
        features = HostFeatures(images, self._timesteps)
        self.fill(features, 0, forward)
        return {tap: tokens[:, 0] for tap, tokens in features.ready().items()}

    def fill(self, features: HostFeatures, view: int, forward: Forward) -> None:
        """Compute one view of `features`, in as many passes as it takes; `forward` and errors as of `run`."""
        image = timestep = 0
        while image < features.images:
            count, steps = self._next(features.images - image, self._timesteps - timestep)
            if not self._try(forward, features, view, slice(image, image + count), slice(timestep, timestep + steps)):
                continue
            timestep = (timestep + steps) % self._timesteps
            image += count if timestep == 0 else 0

    def _next(self, images: int, timesteps: int) -> tuple[int, int]:
        """Images and timesteps of the next pass, of those that are left."""
        whole = self._rows // self._timesteps
        return (min(whole, images), self._timesteps) if whole else (1, min(self._rows, timesteps))

    def _try(self, forward: Forward, features: HostFeatures, view: int, images: slice, timesteps: slice) -> bool:
        """Run one pass and keep what it gives; False if memory ran out and a smaller one is to be tried."""
        try:
            features.put(view, images, timesteps, forward(images, timesteps))
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(images.stop - images.start, timesteps.stop - timesteps.start, error)
        # Only here is the error gone, and with it the frames that held on to the memory.
        clear_device_cache(garbage_collection=True)
        return False

    def _shrink(self, images: int, timesteps: int, error: Exception) -> None:
        tried = f"{_count(images, 'image')} at {_count(timesteps, 'timestep')}"
        if images * timesteps == 1:
            raise OutOfMemory(f"out of memory in a forward pass of {tried}; {self._advice}") from error
        if not self._adaptive:
            raise OutOfMemory(
                f"out of memory in a forward pass of {tried}; use --batch auto, which halves it until it fits, "
                "or a smaller --batch"
            ) from error
        rows = images * timesteps // 2
        self._rows = rows - rows % self._timesteps if rows >= self._timesteps else rows
        count, steps = self._next(images, timesteps)
        now = f"{_count(count, 'image')} at {_count(steps, 'timestep')}"
        self._log(f"out of memory in a forward pass of {tried}: going on with {now}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
