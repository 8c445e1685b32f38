"""How many bytes tensors take: those of a module at rest, and the most that are alive while something is computed."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter


def storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages behind tensors, each once; of a quantised tensor, those of its values and of its scales."""
    found = {}
    for tensor in tensors:
        for plain in _plain_tensors(tensor):
            storage = plain.untyped_storage()
            found[storage._cdata] = storage
    return found


def module_bytes(module: Module) -> int:
    """Bytes of a module's parameters and buffers; what two of them share counts once."""
    return sum(storage.nbytes() for storage in storages(_state(module)).values())


class MemoryMeter(TorchDispatchMode):
    """Within its `with`, follows the bytes of every tensor that operators read or make. peak: the most alive at once.

    resident: modules and tensors that do not count. Real and meta tensors are measured alike: a storage counts from the
    first operator that touches it until it is freed. What kernels allocate for themselves is not seen.
    """

    def __init__(self, resident: Iterable[Module | Tensor] = ()):
        super().__init__()
        self.peak = 0
        self._live = 0
        self._resident = [t for r in resident for t in (_state(r) if isinstance(r, Module) else [r])]
        self._known = set(storages(self._resident))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if any(is_traceable_wrapper_subclass(t) for t in tensors):
            return NotImplemented  # the subclass answers with operators on plain tensors, which come here
        self._follow(tensors)
        result = func(*args, **(kwargs or {}))
        self._follow(t for t in tree_iter(result) if isinstance(t, Tensor))
        return result

    def _follow(self, tensors: Iterable[Tensor]) -> None:
        for key, storage in storages(tensors).items():
            if key in self._known:
                continue
            size = storage.nbytes()
            self._known.add(key)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


class FusedAttention(TorchFunctionMode):
    """Within its `with`, attention on meta tensors is one operator, as it is on every device that computes.

    PyTorch takes the meta device for one without a fused kernel, and would make a table of all pairs of tokens.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    # Of the fused kernels, the one that exists wherever PyTorch does; it keeps what the others keep.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _state(module: Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, name))
