"""Compiled loops are kept for the next process where that is possible, and work where it is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENCODE = """
import numpy as np
from cache_schema.encoding.number_formats import encode
print(encode("int8", np.ones((1, 2, 3, 4), np.float32), np.ones((2, 4), np.float32)).payload.sum())
"""
NOWHERE = "from numba.core import caching; caching.CacheImpl._locator_classes = []"
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"


def encode_in_a_process(folder: Path, first: str = "") -> None:
    """Encode 24 values, each of which becomes 127, with compiled code kept in a folder."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", first + ENCODE],
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout.strip(), done.stderr) == (str(24 * 127), "")


def kept_files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb?")}


def test_what_one_process_compiled_another_one_finds(tmp_path: Path) -> None:
    encode_in_a_process(tmp_path)
    kept = kept_files(tmp_path)
    assert kept
    encode_in_a_process(tmp_path)
    assert kept_files(tmp_path) == kept


@pytest.mark.parametrize("first", [NOWHERE, FULL], ids=["nowhere to keep it", "no room to keep it"])
def test_features_are_encoded_where_compiled_code_cannot_be_kept(tmp_path: Path, first: str) -> None:
    encode_in_a_process(tmp_path, first)
    assert not kept_files(tmp_path)


@pytest.mark.parametrize("size", [0, 30])
def test_features_are_encoded_where_kept_code_was_cut_short(tmp_path: Path, size: int) -> None:
    encode_in_a_process(tmp_path)
    for path in kept_files(tmp_path):
        os.truncate(path, size)
    encode_in_a_process(tmp_path)
