"""Copies of batches to CUDA devices that are queued and may not be done when the batch is let go of."""

from __future__ import annotations

import os
from typing import Any

import torch


class QueuedCopies:
    """Says when page-locked slots may be filled again; belongs to the process that page-locked them.

    A copy is waited for on the stream that it was queued on. Where none was said to be queued, as when tensors of a
    batch are copied one by one, it is taken to be on the stream that is current where the batch is let go of.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._queued: dict[int, list[Any]] = {}  # events, by the claim of a batch that is held
        self._waiting: dict[int, tuple[int, list[Any]]] = {}  # slot and events, by that of one that was let go of

    @property
    def here(self) -> bool:
        """Whether this is the process that page-locked the memory: CUDA is not to be touched in one forked from it."""
        return os.getpid() == self._process

    def add(self, claim: int, device: torch.device) -> None:
        """Remember that copies of a batch to `device` were just queued on the stream that is current there."""
        if self.here and device.type == "cuda":
            self._queued.setdefault(claim, []).append(torch.cuda.current_stream(device).record_event())

    def let_go(self, slot: int, claim: int) -> None:
        """The batch is gone; its slot waits for its copies."""
        events = self._queued.pop(claim, None) or [torch.cuda.current_stream().record_event()]
        self._waiting[claim] = slot, events

    def done(self) -> list[tuple[int, int]]:
        """(slot, claim) of the batches that were let go of and whose copies are all done by now; each is told once."""
        if not self.here:
            return []
        found = []
        for claim, (slot, events) in list(self._waiting.items()):
            if all(event.query() for event in events):
                told = self._waiting.pop(claim, None)
                if told is not None:  # another thread may have been told
                    found.append((slot, claim))
        return found
