"""MATLAB files, which Stanford Cars and Stanford Dogs are described by."""

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.datasets.base import DataError

if TYPE_CHECKING:
    import numpy as np

# What scipy's reader raises for bytes that are not what they should be.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, EOFError,
               OverflowError, MemoryError, UnboundLocalError, ZeroDivisionError, struct.error, zlib.error)  # fmt: skip


def load_mat(path: Path, *keys: str, published: str) -> "tuple[np.ndarray, ...]":
    """The variables of a MATLAB file by name, each as a flat array; structures are objects with attributes.

    Raises DataError if the file is missing, damaged or lacks a variable; `published` says where to get it again.
    """
    import numpy as np
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, squeeze_me=True, struct_as_record=False, variable_names=keys)
    except (MatReadError, *_UNREADABLE) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a readable MATLAB file ({reason}); download it again from {published}") from None
    for key in keys:
        if key not in content:
            raise DataError(f"{path}: holds no variable {key!r}; is this the file of that name from {published}?")
    return tuple(np.atleast_1d(content[key]).reshape(-1) for key in keys)


def whole(value: object) -> int:
    """A number of a MATLAB file, which stores whole ones as floats too. Raises ValueError if it is not whole."""
    number = float(value)  # type: ignore[arg-type]
    if not number.is_integer():
        raise ValueError(f"{number} is not a whole number")
    return int(number)
