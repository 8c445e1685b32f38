"""What a command prints of an error: the problem, and the command or the option that helps."""

import pickle
from pathlib import Path

import pytest
import typer
from cache_building import features_of, start

from cache_schema import CacheCorrupt, CacheError, CacheNotFound, CacheRequestError, CacheUnsealed, open_cache
from cache_schema.advice import advised
from cache_schema.cli import run

app = typer.Typer()


@app.command()
def read(cache: Path, row: int, timestep: int, allow_partial: bool = False) -> None:
    """Read a sample of a cache."""
    open_cache(cache, allow_partial).read([row], timesteps=[timestep])


def printed(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as left:
        run(app, [str(word) for word in argv], name="dit-test")
    assert left.value.code == 1
    return capsys.readouterr().err


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """A cache with a space in its path that has the second of its shards alone."""
    writer = start(tmp_path / "my cache")
    writer.write_shard(1, features_of(writer.shard_rows(1), writer.manifest))
    return writer.root


def test_a_cache_that_is_not_complete_can_be_read_with_an_option(
    capsys: pytest.CaptureFixture[str], partial: Path
) -> None:
    assert printed(capsys, partial, 3, 10) == (
        f"error: cache {partial} is not sealed: 4 of 7 samples have no features yet; run the build again, it resumes, "
        "or read what is there with --allow-partial (in Python: allow_partial=True)\n"
    )


def test_a_timestep_that_is_lacking_is_an_option_of_the_next_build(
    capsys: pytest.CaptureFixture[str], partial: Path
) -> None:
    said = printed(capsys, partial, 3, 22, "--allow-partial")
    assert said.endswith("lacks timestep 22 (has 10, 16, 28); rebuild with --timesteps 10,16,22,28\n")


def test_a_cache_at_a_url_is_pushed_again_for_nothing_builds_over_what_is_there() -> None:
    error = CacheCorrupt("s3://team/x/c/0 is damaged", cache="s3://team/x")
    assert advised(error) == (
        "s3://team/x/c/0 is damaged; remove it (`dit-cache rm s3://team/x --yes`) and push a whole copy there again, "
        "or build it there anew"
    )


def test_damage_comes_with_the_command_that_mends_it(capsys: pytest.CaptureFixture[str], partial: Path) -> None:
    shard = partial / "features/hidden/c/1/0/0/0/0"
    shard.unlink()
    name = open_cache(partial, allow_partial=True).samples["id"][4].as_py()
    assert printed(capsys, partial, 4, 10, "--allow-partial") == (
        f"error: {shard} is missing: shard 1, sample '{name}' (row 4), view canonical, timestep 10; mend it with "
        f"`dit-cache build --resume --repair --output '{partial}'` and the build's other options\n"
    )


def test_an_error_without_facts_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = printed(capsys, tmp_path / "nothing", 0, 10)
    assert said == f"error: no cache at {tmp_path / 'nothing'}: it has no manifest.json\n"
    assert advised(CacheError("something; do this")) == "something; do this"
    assert advised(CacheCorrupt("bytes are wrong", remedy="copy them again")) == "bytes are wrong; copy them again"


@pytest.mark.parametrize(
    "error",
    [
        CacheNotFound("nothing there"),
        CacheUnsealed("not complete", remedy="build it", missing_samples=4),
        CacheRequestError("lacks timestep 22", timesteps=[10, 22]),
        CacheCorrupt("a file is damaged", remedy="repair it", cache="/c", shard=1, row=3, sample="a"),
    ],
)
def test_an_error_from_another_process_says_and_knows_the_same(error: CacheError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
    assert advised(copy) == advised(error)
