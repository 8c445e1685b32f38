"""MATLAB files, which Stanford Cars and Stanford Dogs are described by."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.datasets.base import DataError

_LONGEST_READ = 300  # seconds; the official files together take two


def load_mats(paths: Sequence[Path], variables: Sequence[str], published: str) -> list[dict[str, list[Any]]]:
    """Those of the named variables that each MATLAB file has, as flat lists; structures are dictionaries.

    A process of its own reads the files, because one wrong byte can crash scipy's reader, and with it whatever called
    it. No ProcessPoolExecutor: its process would begin by importing the program that called this, which fails for one
    read from standard input and goes round in circles for one without a guard. Raises DataError naming a file that is
    missing or damaged; `published` says where to get it again.
    """
    program = Path(__file__).with_name("matlab_process.py")
    # -P: the modules beside the program must not stand in for libraries.
    command = [sys.executable, "-P", str(program), *(str(path.absolute()) for path in paths), "--", *variables]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_LONGEST_READ)
        lines, end = done.stdout.splitlines(), f"its reader ended with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        lines, end = (error.stdout or b"").splitlines(), f"its reader found no end in {_LONGEST_READ} seconds"
    contents = []
    for k, path in enumerate(paths):
        try:
            content = json.loads(lines[k])
        except (IndexError, ValueError):
            content = {"error": end}
        if "error" in content:
            raise DataError(
                f"{path}: not a readable MATLAB file ({content['error']}); download it again from {published}"
            )
        contents.append(content)
    return contents


def variable(path: Path, content: dict[str, list[Any]], name: str) -> list[Any]:
    """A variable of a file that was read. Raises DataError if the file does not have it."""
    if name not in content:
        raise DataError(f"{path}: holds no variable {name!r}; is this the official file of that name?")
    return content[name]


def whole(value: Any) -> int:
    """A number of a MATLAB file, which stores whole ones as floats too. Raises ValueError if it is not whole."""
    if not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"{str(value)[:40]!r} is not a whole number")
    return int(value)
