"""Reading taps off a running transformer, and leaving it as soon as the deepest one was read."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch.nn import Module


class _TapsCaptured(Exception):  # noqa: N818 - control flow, not an error
    """Leaves the transformer's forward: every tap was read, and nothing behind them is wanted."""


@contextmanager
def capture(blocks: Sequence[Module], taps: Mapping[str, int], leave_early: bool) -> Iterator[dict[str, Any]]:
    """Keep what blocks return while the transformer runs, through forward hooks: {tap: output of its block}.

    blocks: in the order in which they run. taps: name → index of the block. With leave_early, the body of the `with`
    ends where the deepest of them has run, so that later blocks cost nothing.
    """
    found: dict[str, Any] = {}
    deepest = max(taps.values(), default=-1)

    def reader(depth: int):
        names = [tap for tap, wanted in taps.items() if wanted == depth]

        def hook(_module: Module, _inputs: Any, output: Any) -> None:
            found.update(dict.fromkeys(names, output))
            if leave_early and depth == deepest:
                raise _TapsCaptured

        return hook

    handles = [blocks[depth].register_forward_hook(reader(depth)) for depth in sorted(set(taps.values()))]
    try:
        with suppress(_TapsCaptured):
            yield found
    finally:
        for handle in handles:
            handle.remove()
