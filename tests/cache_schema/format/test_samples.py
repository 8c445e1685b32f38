"""The samples table has the rows in the order features need, and refuses what would mislead a reader."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from cache_building import tiny_manifest, tiny_samples

from cache_schema import CacheCorrupt, CacheError, fingerprint_samples, make_samples, samples_table
from cache_schema.format.samples import check_against_manifest, load_samples, render_samples
from cache_schema.storage.local import LocalFolder


def row(name: str = "a", **fields: Any) -> dict[str, Any]:
    return {"id": name, "split": "train", "source": f"{name}.jpg", "sha256": "0" * 64, "width": 1, "height": 1} | fields


def test_rows_with_features_come_first_and_quarantined_ones_last() -> None:
    table, count = make_samples(
        [
            row("bad", state="quarantined", reason="empty"),
            row("t", split="test"),
            row("b"),
            row("a"),
            row("u", split="test"),
        ],
        ["train"],
    )
    assert table["id"].to_pylist() == ["b", "a", "t", "u", "bad"]
    assert count == 2


def test_a_table_is_the_same_after_a_round_trip_and_always_the_same_bytes(tmp_path: Path) -> None:
    table, _ = tiny_samples()
    (tmp_path / "samples.parquet").write_bytes(render_samples(table))
    assert load_samples(LocalFolder(tmp_path)).equals(table)
    assert render_samples(load_samples(LocalFolder(tmp_path))) == render_samples(table)
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3)])
    assert render_samples(pieces) == render_samples(table)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a"), row("a")], "id 'a' more than once"),
        ([row(split="validation")], "split 'validation'; allowed: train, test, unlabeled"),
        ([row(state="broken")], "state 'broken'"),
        ([row("a", state="quarantined"), row("b")], "must come last"),
        ([row(width="wide")], "do not fit"),
        ([row(box=[1.0, 2.0])], "do not fit"),
        ([{"id": "a"}], "empty split"),
    ],
)
def test_rows_that_would_mislead_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        samples_table(rows)


def test_the_fingerprint_follows_contents_and_split_but_not_where_files_lie() -> None:
    base = fingerprint_samples(samples_table([row(box=[0, 0, 1, 1])]))
    assert (
        fingerprint_samples(samples_table([row(box=[0, 0, 1, 1], source="elsewhere", box_source="official")])) == base
    )
    for change in ({"sha256": "1" * 64}, {"split": "test"}, {"label": 3}, {"caption": "red"}, {"box": [0, 0, 1, 2]}):
        assert fingerprint_samples(samples_table([row(**({"box": [0, 0, 1, 1]} | change))])) != base


def test_a_table_that_does_not_bear_out_the_manifest_is_refused() -> None:
    samples, rows = tiny_samples()
    manifest = tiny_manifest(samples, rows)
    check_against_manifest(samples, manifest)
    with pytest.raises(CacheError, match="7 samples have features, the table has 5 usable rows"):
        check_against_manifest(samples.slice(0, 5), manifest)
    test_first = pa.concat_tables([samples.slice(7, 3), samples.slice(0, 7), samples.slice(10)])
    with pytest.raises(CacheError, match="must come first"):
        check_against_manifest(test_first, manifest)


@pytest.mark.parametrize("data", [b"", b"PAR1PAR1", b"\x80\x04\x95", bytes(100)])
def test_a_file_that_is_no_table_is_called_corrupt(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "samples.parquet").write_bytes(data)
    with pytest.raises(CacheCorrupt, match="is not a samples table"):
        load_samples(LocalFolder(tmp_path))
