"""Reading taps off a running transformer, and leaving it as soon as the deepest one was read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import Module

from pipeline.teachers.architecture import Place
from pipeline.teachers.offloading import order_is_known, put_back


class _TapsCaptured(Exception):  # noqa: N818 - control flow, not an error
    """Leaves the transformer's forward: every tap was read, and nothing behind them is wanted."""


@contextmanager
def capture(
    blocks: Sequence[Module], taps: Mapping[str, Place], leave_early: bool, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """Keep what blocks return, or what their attention is given, while the transformer runs, through forward hooks.

    blocks: in the order in which they run. Found of a tap is the output of its block; of a modulated one, image tokens
    as a pair (None, tokens), or tokens alone where the block has text and image in one sequence. With leave_early the
    body of the `with` ends where the deepest tap was read, so that later blocks, and the rest of a block of which only
    the modulated tokens are wanted, cost nothing. compiled: whether the blocks were compiled. Of blocks that are
    fetched ahead, the first pass runs to its end, and none is on the device afterwards.
    """
    leave_early = leave_early and order_is_known(blocks)
    found: dict[str, Any] = {}
    # What a block reads comes before what it returns.
    last = max(taps.values(), key=lambda place: (place.depth, not place.modulated), default=None)

    def keep(place: Place, value: Any) -> None:
        found.update(dict.fromkeys((tap for tap, wanted in taps.items() if wanted == place), value))
        if leave_early and place == last:
            raise _TapsCaptured

    with ExitStack() as hooks:
        hooks.callback(put_back, blocks)
        for place in set(taps.values()):
            block: Any = blocks[place.depth]
            if not place.modulated:
                hooks.enter_context(_hooked(block.register_forward_hook, lambda m, i, o, at=place: keep(at, o)))
                continue
            if compiled:
                hooks.enter_context(_run_as_written(block))
            hooks.enter_context(
                _hooked(
                    block.attn.register_forward_pre_hook,
                    lambda m, i, given, at=place: keep(at, _image_tokens(given)),
                    with_kwargs=True,
                )
            )
        try:
            yield found
        except _TapsCaptured as left:
            # What it passed on its way keeps gigabytes: not until the collector comes by.
            left.__traceback__ = None


def _image_tokens(given: Mapping[str, Any]) -> Any:
    """What attention is given of the image; where it is given the text apart, the image's tokens are alone."""
    tokens = given["hidden_states"]
    return (None, tokens) if given.get("encoder_hidden_states") is not None else tokens


@contextmanager
def _hooked(register: Callable[..., Any], hook: Callable[..., None], **options: Any) -> Iterator[None]:
    handle = register(hook, **options)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _run_as_written(block: Module) -> Iterator[None]:
    """Keep the compiler out while a block runs: inside of what it made, no hook is called."""
    with ExitStack() as eager:

        def begin(_module: Module, _inputs: Any) -> None:
            eager.enter_context(torch.compiler.set_stance("force_eager"))

        def end(_module: Module, _inputs: Any, _output: Any) -> None:
            eager.close()

        with _hooked(block.register_forward_pre_hook, begin), _hooked(block.register_forward_hook, end):
            yield
