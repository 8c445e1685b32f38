"""What README says about using a cache from Python runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from cache_building import build

from cache_schema import Curriculum, open_cache

ROOT = Path(__file__).parents[2]
ROWS = 20


def examples(readme: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), flags=re.S)


def test_the_examples_of_from_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curriculum = Curriculum(num_steps=28, timesteps=[10, 22, 28], sigmas=[0.9, 0.3, 0.05], seed=7)
    for folder, store in (("cache", "zarr"), ("tars", "webdataset")):
        build(tmp_path / "runs/demo" / folder, kind="int8", feature_rows=ROWS, curriculum=curriculum, store=store)
    monkeypatch.chdir(tmp_path)
    blocks = examples("cache_schema/README.md")
    assert len(blocks) == 4
    assert examples("README.md") == blocks[:2]
    names: dict = {}
    tokens = []
    for block in blocks:
        exec(compile(block.replace('"cuda"', '"cpu"'), "README.md", "exec"), names)
        tokens.append(names["tokens"])
    cache = open_cache("runs/demo/cache")
    assert torch.equal(tokens[0], cache.read([7, 3, 11], timesteps=[22, 28]).decode())
    assert torch.equal(tokens[2], cache.read(range(8, 16)).decode())
    assert tokens[3].shape == (ROWS, 2, *tokens[2].shape[1:])
