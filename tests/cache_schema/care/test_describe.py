"""A description says what the cache holds and how far it is, to people and to scripts."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_building import build, features_of, start, tiny_manifest, tiny_samples

from cache_schema import CacheCorrupt, CacheNotFound, Provenance, create_cache
from cache_schema.care.describe import describe, describe_text
from cache_schema.format.card import format_bytes
from cache_schema.format.samples import make_samples

STORES = ["zarr", "webdataset"]


def on_disk(root: Path, *folders: str) -> int:
    """The bytes of the files of a cache below some folders, without the arrays' metadata and the images' index."""
    files = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if path.name not in ("zarr.json", "index.npy"))


def table(text: str, title: str) -> list[list[str]]:
    """The cells of the lines of a table, heading first."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{title}  "))
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return [re.split(r"  +", line) for line in lines[start:end]]


@pytest.mark.parametrize("store", STORES)
def test_a_sealed_cache_is_described(tmp_path: Path, store: str) -> None:
    made = Provenance(created="2026-01-02", seconds=61.0, versions={"torch": "2"}, device="H200", command="dit-cache x")
    root = build(tmp_path / "cache", made, kind="int8", store=store)
    found = json.loads(json.dumps(describe(root)))
    assert found["state"] == "sealed"
    assert found["shards"] == {"features": {"done": 3, "total": 3}, "images": {"done": 3, "total": 3}}
    assert found["samples_with_features"] == 7
    assert found["arrays"]["hidden"]["shape"] == [7, 2, 3, 6, 8]
    assert found["arrays"]["hidden.scale"]["shape"] == [7, 2, 3, 6]
    assert found["arrays"]["hidden"]["dtype"] == "int8"
    assert [item["reason"] for item in found["quarantined"]] == ["the file is empty"]
    assert found["manifest"]["cache_id"]
    assert "shard_table" not in found
    text = describe_text(root)
    facts = ("sealed", "int8", "flux /somewhere/flux", "2026-01-02", "61 s", "torch 2", "7 samples", "3 of 3", "H200")
    for fact in (*facts, "dit-cache x", store):
        assert fact in text
    fidelity = table(text, "fidelity")
    assert len(fidelity) == 1 + 6
    assert fidelity[1][:2] == ["hidden", "10"]


@pytest.mark.parametrize("store", STORES)
def test_sizes_are_those_of_the_files(tmp_path: Path, store: str) -> None:
    root = build(tmp_path / "cache", kind="int8", store=store)
    found = describe(root)
    assert found["bytes"]["features"] == on_disk(root, "features") == found["manifest"]["bytes_features"]
    assert found["bytes"]["images"] == on_disk(root, "images") == found["manifest"]["bytes_images"]
    assert found["bytes"]["total"] == found["bytes"]["features"] + found["bytes"]["images"]
    shards = sum(entry["bytes"] for entry in describe(root, shard_table=True)["shard_table"])
    assert abs(sum(array["bytes"] for array in found["arrays"].values()) + found["bytes"]["images"] - shards) <= 2
    splits = found["splits"]
    assert {name: (split["rows"], split["rows_with_features"]) for name, split in splits.items()} == {
        "train": (7, 7), "test": (3, 0)
    }  # fmt: skip
    assert splits["test"]["features"] == 0
    assert abs(sum(split["features"] + split["images"] for split in splits.values()) - shards) <= 2


@pytest.mark.parametrize("store", STORES)
def test_a_partial_cache_is_described_with_what_is_done(tmp_path: Path, store: str) -> None:
    writer = start(tmp_path / "cache", store=store)
    writer.write_shard(2, features_of(writer.shard_rows(2), writer.manifest))
    writer.write_shard(0, features_of(writer.shard_rows(0), writer.manifest), {1: "out of range"})
    found = describe(tmp_path / "cache", shard_table=True)
    assert found["shards"]["features"] == {"done": 2, "total": 3}
    assert found["samples_with_features"] == 3
    assert found["bytes"]["images"] == 0
    assert found["fidelity"]
    table_of_features = [entry for entry in found["shard_table"] if entry["kind"] == "features"]
    assert [(entry["rows"], entry["committed"]) for entry in table_of_features] == [
        ([0, 3], True), ([3, 6], False), ([6, 7], True)
    ]  # fmt: skip
    assert table_of_features[0]["failed"] == [1]
    assert 0.9 < table_of_features[2]["cosine_min"] <= 1
    assert not any(entry["committed"] for entry in found["shard_table"] if entry["kind"] == "images")
    text = describe_text(tmp_path / "cache", shard_table=True)
    assert "partial: 3 of 7 samples have features" in text
    assert [row[:4] for row in table(text, "shard")[1:4]] == [
        ["features", "0", "0-2", "committed"],
        ["features", "1", "3-5", "missing"],
        ["features", "2", "6-6", "committed"],
    ]


def test_the_worst_shard_can_be_found(cache_of: Callable[..., Path]) -> None:
    found = describe(cache_of(kind="int8"), shard_table=True)
    worst = min(entry["cosine_min"] for entry in found["shard_table"] if entry["kind"] == "features")
    assert worst == min(item["cosine_min"] for item in found["fidelity"])


def test_a_cache_that_was_only_planned_is_described(tmp_path: Path) -> None:
    start(tmp_path / "cache")
    for name in ("samples.parquet", "journal"):
        target = tmp_path / "cache" / name
        target.unlink() if target.is_file() else shutil.rmtree(target)
    assert "partial: 0 of 7" in describe_text(tmp_path / "cache", shard_table=True)


def test_long_lists_are_cut_in_the_text_and_whole_in_json(tmp_path: Path) -> None:
    samples, rows = tiny_samples(quarantined=15)
    create_cache(tmp_path / "cache", tiny_manifest(samples, rows), samples)
    assert len(describe(tmp_path / "cache")["quarantined"]) == 15
    text = describe_text(tmp_path / "cache")
    assert text.count("the file is empty") == 10
    assert "quarantined  15" in text
    assert "and 5 more; --json lists all" in text


def test_files_that_are_in_train_and_in_test_are_named(tmp_path: Path) -> None:
    samples, _ = tiny_samples()
    rows = samples.to_pylist()
    for row in rows[-2:]:  # a test sample and a quarantined one, which does not count
        row["sha256"] = rows[0]["sha256"]
    samples, count = make_samples(rows, ["train"])
    create_cache(tmp_path / "cache", tiny_manifest(samples, count), samples)
    (found,) = json.loads(json.dumps(describe(tmp_path / "cache")["duplicates"]))
    assert found == {
        "ids": [rows[0]["id"], rows[-2]["id"]],
        "classes": sorted([rows[0]["class_name"], rows[-2]["class_name"]]),
        "splits": ["test", "train"],
    }
    text = describe_text(tmp_path / "cache")
    assert "the same file in several classes, or in training and test  1" in text
    assert f"{rows[0]['id']} = {rows[-2]['id']}  in test and train, class {' and '.join(found['classes'])}" in text


@pytest.mark.parametrize("name", ["manifest.json", "samples.parquet", "journal/features-00001.json"])
def test_a_broken_cache_is_one_clear_line(tmp_path: Path, name: str) -> None:
    root = build(tmp_path / "cache")
    (root / name).write_bytes(b"{}")
    with pytest.raises(CacheCorrupt, match=re.escape(name)) as broken:
        describe(root)
    assert "\n" not in str(broken.value)


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
