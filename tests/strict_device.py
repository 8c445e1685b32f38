"""A device that is not there: tensors that say they are on `cuda:0`, compute on the CPU, and mix with no CPU tensor.

What a GPU would refuse is refused here in PyTorch's words, and what it would compute has the CPU's very numbers.
"""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}


class StrictTensor(torch.Tensor):
    """`raw` on the CPU, that is on `cuda:0` for all who look at it."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "StrictTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StrictTensor({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, None)


class StrictDevice(TorchDispatchMode):
    """`with StrictDevice() as device:` makes `cuda:0` a device; `device.copies` counts what crosses, by direction."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[str] = Counter()
        # PyTorch starts CUDA for whoever names it, unless a mode of this kind runs.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __enter__(self) -> "StrictDevice":
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        torch._C._ensureCUDADeviceGuardSet()
        self._overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwritten)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.copies)


def _run(func: Any, args: Any, kwargs: dict[str, Any], copies: Counter[str] | None) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    here = [isinstance(x, StrictTensor) for x in tensors]
    wanted = kwargs.get("device")
    if func in _MOVES:
        result = func(*_raw(args), **_raw({k: v for k, v in kwargs.items() if k != "device"}))
        to = wanted.type == "cuda" if wanted is not None else here[0]
        if copies is not None and to is not here[-1]:
            copies["to device" if to else "to host"] += 1
        if func is _aten.copy_.default:
            return args[0]
        return StrictTensor(result) if to else result
    if any(here) and any(not x for x, t in zip(here, tensors, strict=True) if t.dim()):
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found at least two devices")
    on_device = any(here) or (wanted is not None and torch.device(wanted).type == "cuda")
    if not on_device:
        return func(*args, **kwargs)
    kwargs = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
    result = func(*_raw(args), **_raw(kwargs))
    if func._schema.name.rpartition("::")[2].endswith("_") and isinstance(args[0], StrictTensor):
        return args[0]
    return tree_map(lambda x: StrictTensor(x) if isinstance(x, torch.Tensor) else x, result)


def _raw(value: Any) -> Any:
    return tree_map(lambda x: x.raw if isinstance(x, StrictTensor) else x, value)
