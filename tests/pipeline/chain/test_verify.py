"""What the step `verify` says of a cache that is as it was written."""

from pathlib import Path

import pytest
from cache_building import features_of, start

from pipeline.chain.steps import verify_cache


def test_an_unfinished_cache_is_sound_as_far_as_it_goes_and_what_it_lacks_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = start(tmp_path / "cache")
    writer.write_shard(1, features_of(writer.shard_rows(1), writer.manifest))
    verify_cache(writer.root)
    sound, lacking = capsys.readouterr().out.splitlines()
    assert sound.endswith("every file is as it was written")
    assert lacking.startswith(f"but cache {writer.root} is not sealed: 4 of 7 samples have no features yet; run ")
