"""`dit-cache build --output s3://…` makes there the cache that a folder here would hold."""

from pathlib import Path

import cache_servers as servers
import pytest
from build_process import contents
from typer.testing import CliRunner

from cache_schema.care.verify import verify
from cache_schema.sharing.parts import Selection
from cache_schema.sharing.pull import plan_pull, pull
from pipeline.build.config import BuildConfig
from pipeline.build.part import Part, ShardSlice
from pipeline.build.run import build
from pipeline.chain.steps import Elsewhere
from pipeline.cli import app

CONFIG = BuildConfig(samples_per_shard=8, image_size=16, timesteps=(22,))


def test_two_machines_that_build_a_part_each_make_there_what_one_makes_here(
    teacher, tiny_dataset, tmp_path, monkeypatch
):
    for name, value in servers.s3_environment().items():
        monkeypatch.setenv(name, value)
    url, here = "s3://team/elsewhere/cache", tmp_path / "here"
    conditions = tmp_path / "conditions"
    build(teacher, tiny_dataset, CONFIG, here, conditions=conditions, log=str)
    said: list[str] = []
    for i in (0, 1):
        spool, part = tmp_path / f"spool-{i}", Part(ShardSlice(i, 2))
        manifest = build(
            teacher, tiny_dataset, CONFIG, spool, conditions=conditions, part=part,
            elsewhere=Elsewhere(url).folder(spool, part), log=said.append,
        )  # fmt: skip
        assert manifest.sealed == (i == 1)
        assert not [path for path in spool.glob("features/hidden/c/**/0") if path.is_file()]
    assert any(line.startswith(f"this part of {url} is done") for line in said)
    assert any(line.startswith(f"sealed {url}: ") for line in said)
    pull(plan_pull(url, str(tmp_path / "copy"), Selection(), None))
    assert verify(tmp_path / "copy") == []
    assert contents(tmp_path / "copy") == contents(here)


@pytest.mark.parametrize(
    "options",
    [
        ("--output", "s3://team/cache", "--engine", "ray", "--shard-slice", "0/2"),
        ("--output", "s3://team/cache", "--workers", "2"),
        ("--output", "s3://team/cache", "--repair"),
        ("--output", "s3://team/cache", "--resume"),
        ("--output", "cache", "--spool", "spool"),
        ("--output", "cache", "--take-over"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(options, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["build", *options]).exit_code == 2
    assert list(tmp_path.iterdir()) == []
