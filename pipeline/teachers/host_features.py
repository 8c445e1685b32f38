"""Where the features of a batch wait in main memory, whichever device computed them and in however many passes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cache_schema.storage.buffers import empty


class HostFeatures:
    """{tap: (B, V, T, L, C)} of a batch, filled pass by pass; page-locked where the passes run on CUDA.

    In main memory however little was cut: a device that could not hold a whole batch has no room for its features, and
    features of two views that lie in two places cannot be put together.
    """

    def __init__(self, images: int, timesteps: int, views: int = 1) -> None:
        self.images, self._timesteps, self._views = images, timesteps, views
        self._tensors: dict[str, Tensor] = {}  # (V, B, T, L, C): what one pass gives lies in one piece
        self._copying: dict[torch.device, torch.Event] = {}

    def put(self, view: int, images: slice, timesteps: slice, found: Mapping[str, Tensor]) -> None:
        """Copy what a pass gave, {tap: (images · timesteps, L, C)}, to its place; on CUDA that is queued."""
        count, steps = images.stop - images.start, timesteps.stop - timesteps.start
        for tap, tokens in found.items():
            if tap not in self._tensors:
                shape = (self._views, self.images, self._timesteps, *tokens.shape[1:])
                self._tensors[tap] = host_tensor(shape, tokens.dtype, tokens.device)
            room = self._tensors[tap]
            queued = room.is_pinned() and tokens.device.type == "cuda"
            room[view, images, timesteps].copy_(tokens.unflatten(0, (count, steps)), non_blocking=queued)
            if queued:
                self._copying[tokens.device] = torch.cuda.current_stream(tokens.device).record_event()

    def ready(self) -> dict[str, Tensor]:
        """{tap: (B, V, T, L, C)}, once all copies are done."""
        for copied in self._copying.values():
            copied.synchronize()
        self._copying.clear()
        return {tap: tokens.transpose(0, 1) for tap, tokens in self._tensors.items()}


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, source: torch.device) -> Tensor:
    """An uninitialised CPU tensor to copy to from `source`: page-locked for CUDA, unless the system has no such memory.

    PyTorch keeps page-locked memory for the next batch, so that only the first one waits for it.
    """
    if source.type == "cuda":
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError:
            pass  # as `ulimit -l` or a container has it: slower, and as right
    return empty(shape, dtype)
