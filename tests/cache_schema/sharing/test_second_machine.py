"""A second machine's life: it has a URL, and never had the images or the teacher."""

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import cache_servers as servers
import numpy as np
import pyarrow as pa
import pytest
from cache_building import features_of, tiny_manifest, tiny_samples
from PIL import Image

from cache_schema import Provenance, create_cache, open_cache

BIN = Path(sys.executable).parent
URL = "s3://team/second/birds"
STUDENT = ["student.depth=1", "student.embed_dim=32", "student.num_heads=2", "student.img_size=32"]


class Machine:
    """A home directory and a folder to work in, both empty at first, with access to the S3 server and nothing else."""

    def __init__(self, home: Path) -> None:
        self.work = home / "work"
        self.work.mkdir(parents=True)
        self.environment = {
            "HOME": str(home),
            "PATH": os.environ.get("PATH", ""),
            "OMP_NUM_THREADS": "1",
            "DIT_CACHE_REMOTE": "s3://team/second",
            **servers.s3_environment(),
        }

    def run(self, program: str, *arguments: str, expect: int = 0) -> str:
        command = [str(BIN / program), *arguments]
        done = subprocess.run(command, cwd=self.work, env=self.environment, capture_output=True, text=True)
        assert done.returncode == expect, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def _picture(row: int) -> bytes:
    stream = BytesIO()
    pixels = np.random.default_rng(row).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def _build(path: Path) -> Path:
    samples, rows = tiny_samples(8, others=6, quarantined=0)
    # Two images a class, so that an image can find another of its class.
    table = [{**row, "label": row["label"] // 2, "class_name": f"class {row['label'] // 2}"} for row in
             samples.to_pylist()]  # fmt: skip
    samples = pa.Table.from_pylist(table, schema=samples.schema)
    writer = create_cache(path, tiny_manifest(samples, rows, kind="float16"), samples)
    for shard in writer.missing_shards():
        writer.write_shard(shard, features_of(writer.shard_rows(shard), writer.manifest))
    for shard in writer.missing_image_shards():
        writer.write_images(shard, [_picture(row) for row in writer.image_rows(shard)])
    writer.seal(Provenance(created="2026-03-03T00:00:00+00:00"))
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Machine A's work is done: it built a cache, pushed it, and is gone. Returned is what only it had."""
    first = Machine(tmp_path_factory.mktemp("a"))
    cache = _build(first.work / "cache")
    said = first.run("dit-cache", "push", "cache", URL)
    assert "teacher's licence" in said
    return cache


def test_machine_b_lists_trains_by_streaming_and_evaluates(shared: Path, tmp_path: Path) -> None:
    second = Machine(tmp_path / "b")
    listed = json.loads(second.run("dit-cache", "ls", "--json"))
    assert [(entry["name"], entry["state"]) for entry in listed] == [("birds", "sealed")]
    settings = [word for setting in STUDENT for word in ("--set", setting)]
    second.run("dit-train", "run", "--cache", URL, "--preset", "small", "--updates", "2", "--batch-size", "4",
               "--output", "run", "--local-cache", "100MB", *settings)  # fmt: skip
    scores = json.loads(second.run("dit-train", "eval", "run", "--json"))
    assert scores["queries"] == 6
    result = json.loads((second.work / "run/result.json").read_text())
    assert result["cache_id"] == open_cache(shared).manifest.cache_id
    assert not list(second.work.rglob("manifest.json"))
    assert list((tmp_path / "b/.cache/dit-distill/blocks").glob("??/*"))
