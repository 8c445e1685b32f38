"""Run as a program: print what MATLAB files hold as JSON, a line per file. Used by `matlab.py`, which says why.

Arguments: the files, `--`, the variables. Imports nothing of this project, so that it runs wherever its file lies.
"""

import json
import sys
import warnings

import numpy as np
from scipy.io import loadmat


def plain(value: object) -> object:
    """A value that scipy read as JSON can hold it: structures are objects, arrays flat lists."""
    if hasattr(value, "_fieldnames"):
        return {name: plain(getattr(value, name)) for name in value._fieldnames}
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.reshape(-1)]
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str | int | float) else str(value)


def content(path: str, variables: list[str]) -> dict[str, object]:
    """{variable: flat list} for those variables that the file has, or {"error": why it cannot be read}."""
    try:
        found = loadmat(path, squeeze_me=True, struct_as_record=False, variable_names=variables)
        return {name: plain(np.atleast_1d(found[name])) for name in variables if name in found}
    except Exception as error:  # noqa: BLE001 -- scipy raises anything for a damaged file, and the caller reports it
        return {"error": " ".join(str(error).split()) or type(error).__name__}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    border = sys.argv.index("--")
    for file in sys.argv[1:border]:
        print(json.dumps(content(file, sys.argv[border + 1 :])), flush=True)
