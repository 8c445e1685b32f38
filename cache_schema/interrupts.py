"""Ctrl-C, SIGTERM and SIGHUP that wait for the current update, so that a state the run went through is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# Set once this process was told to end, or ends: what fails then is not tried again.
leaving = threading.Event()


class DeferredInterrupt:
    """Inside `with DeferredInterrupt() as interrupt`, the first signal only sets `interrupt.requested`.

    A second one acts at once, as usual. Outside the main thread, where Python allows no handler, it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> DeferredInterrupt:
        if threading.current_thread() is threading.main_thread():
            # What a parent had ignored, as nohup does with SIGHUP, stays so.
            heeded = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._request) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
