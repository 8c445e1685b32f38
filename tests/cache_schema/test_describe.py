"""A description says what the cache holds and how far it is, to people and to scripts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_building import build, features_of, start

from cache_schema import CacheNotFound, Provenance
from cache_schema.card import format_bytes
from cache_schema.describe import describe, describe_text


def test_a_sealed_cache_is_described(tmp_path: Path) -> None:
    root = build(
        tmp_path / "cache", Provenance(created="2026-01-02", seconds=61.0, versions={"torch": "2"}), kind="int8"
    )
    found = json.loads(json.dumps(describe(root)))
    assert found["state"] == "sealed"
    assert found["shards"] == {"features": {"done": 3, "total": 3}, "images": {"done": 3, "total": 3}}
    assert found["samples_with_features"] == 7
    assert found["shapes"]["hidden"] == [7, 2, 3, 6, 8]
    assert found["shapes"]["hidden.scale"] == [7, 2, 3, 6]
    assert [item["reason"] for item in found["quarantined"]] == ["the file is empty"]
    assert found["manifest"]["cache_id"]
    text = describe_text(root)
    for fact in ("sealed", "int8", "flux /somewhere/flux", "2026-01-02", "61 s", "torch 2", "7 samples", "3 of 3"):
        assert fact in text
    assert "fidelity hidden at 10" in text


def test_a_partial_cache_is_described_with_what_is_done(tmp_path: Path) -> None:
    writer = start(tmp_path / "cache")
    writer.write_shard(2, features_of(writer.shard_rows(2), writer.manifest))
    assert describe(tmp_path / "cache")["shards"]["features"] == {"done": 1, "total": 3}
    assert "partial: 1 of 7 samples have features" in describe_text(tmp_path / "cache")


def test_describing_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFound):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("count", "text"), [(None, "unknown"), (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2e13, "20.0 TB")]
)
def test_bytes_are_written_as_people_do(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


def test_a_description_of_a_cache_without_images_says_none(cache_of: Callable[..., Path]) -> None:
    assert "images none" not in describe_text(cache_of())
    assert any(line.split() == ["images", "none"] for line in describe_text(cache_of(with_images=False)).splitlines())
