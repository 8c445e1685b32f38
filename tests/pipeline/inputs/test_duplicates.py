"""The same file under two classes, or in training and in test, is counted at the scan; --strict refuses it."""

import shutil

import pytest
from cache_building import many_examples
from dataset_layouts import save_image
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.format.duplicates import find_duplicates
from pipeline.datasets import open_dataset
from pipeline.inputs.scan import scan
from pipeline.inputs.tolerance import BadSamples, Tolerance, TooManyBadSamples


@pytest.fixture
def leaking(tmp_path):
    """a and b train, c and d test; one file is in a and c, one in a and b, one twice in d."""
    for k, name in enumerate("abcd"):
        for n in range(3):
            save_image(tmp_path / name / f"{n}.png", (40 * k, 40 * n, 0))
    shutil.copy(tmp_path / "a/0.png", tmp_path / "c/copy.png")
    shutil.copy(tmp_path / "a/1.png", tmp_path / "b/copy.png")
    shutil.copy(tmp_path / "d/0.png", tmp_path / "d/copy.png")
    return open_dataset("folder", tmp_path)


def test_the_same_file_in_two_classes_is_counted_and_named_once(leaking):
    said = []
    scan(leaking, ["train"], bad=BadSamples(Tolerance(), len(leaking.samples), said.append))
    assert said == [
        "warning: 2 files are in several classes or splits, 1 of them in training and in test, such as a/0.png = "
        "c/copy.png: in test and train, class a and c; remove all but one of each; `dit-cache info` names them"
    ]


def test_strict_refuses_the_same_file_in_two_classes(leaking):
    bad = BadSamples(Tolerance(strict=True), len(leaking.samples))
    with pytest.raises(TooManyBadSamples, match=r"--strict: 2 files are .*, 1 of them in training and in test"):
        scan(leaking, ["train"], bad=bad)


sample = st.fixed_dictionaries(
    {
        "sha256": st.sampled_from("pqr"),
        "split": st.sampled_from(["train", "test", "unlabeled"]),
        "label": st.integers(0, 2),
        "state": st.sampled_from(["ok", "ok", "quarantined"]),
    }
)


@many_examples
@given(st.lists(sample, max_size=8))
def test_a_file_is_named_exactly_if_it_is_in_two_classes_or_both_learnt_from_and_in_test(rows):
    rows = [
        row
        | {"id": str(k), "class_name": str(row["label"]), "label": -1 if row["split"] == "unlabeled" else row["label"]}
        for k, row in enumerate(rows)
    ]
    used = [row for row in rows if row["state"] == "ok"]
    expected = set()
    for digest in "pqr":
        same = [row for row in used if row["sha256"] == digest]
        labels = {row["label"] for row in same if row["label"] >= 0}
        splits = {row["split"] for row in same}
        if len(labels) > 1 or ("test" in splits and splits & {"train", "unlabeled"}):
            expected.add(tuple(row["id"] for row in same))
    assert {found.ids for found in find_duplicates(rows)} == expected
