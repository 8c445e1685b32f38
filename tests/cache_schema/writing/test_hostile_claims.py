"""Manifests and journals that are valid, signed and lying, or not even JSON: no allocation, no path, no terminal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache_hostile import COMMANDS, EVERYTHING, READING, forge_manifest, forge_record, vouch_for

from cache_schema import open_cache
from cache_schema.format.identity import compute_cache_id
from cache_schema.format.manifest_file import load_manifest
from cache_schema.storage.local import LocalFolder

Attack = Callable[..., Any]
STORES = ["zarr", "webdataset"]
# Overrides the title of a terminal, moves its cursor, fakes a line, and turns the direction of the text around.
ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\nerror: all is well\u202e\u2028\x9b31m"


def manifest_bytes(data: bytes) -> Callable[[Path], None]:
    return lambda root: (root / "manifest.json").write_bytes(data) and None


DEEP = b'{"schema_version": 2, "provenance": %s}' % (b"[" * 10_000 + b"]" * 10_000)
NOT_MANIFESTS = {
    "nested 10 000 deep": DEEP,
    "objects nested 10 000 deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "never closed": b"[" * 5_000_000,
    "not UTF-8": b'{"schema_version": 2, "name": "\xff\xfe"}',
    "half of a surrogate": b'{"schema_version": 2, "\\ud800": "\\udfff", "provenance": {}}',
    "a float too large": b'{"schema_version": 1e400}',
    "a number of 10 000 digits": b'{"schema_version": ' + b"9" * 10_000 + b"}",
    "a version of 4 000 digits": b'{"schema_version": ' + b"9" * 4_000 + b"}",
    "a negative version of 4 300 digits": b'{"schema_version": -' + b"9" * 4_300 + b"}",
    "a pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "20 MB of empty lists": b'{"schema_version": 2, "provenance": [' + b"[]," * 7_000_000 + b"[]]}",
}


@pytest.mark.parametrize("what", NOT_MANIFESTS)
def test_bytes_that_no_manifest_has_are_refused_by_everything(attack: Attack, what: str) -> None:
    outcome = attack(manifest_bytes(NOT_MANIFESTS[what]))
    assert outcome.refused() == set(EVERYTHING)


@pytest.mark.parametrize("depth", range(900, 1000, 10))
def test_nesting_just_as_deep_as_python_bears_is_refused_too(depth: int, tmp_path: Path) -> None:
    from cache_schema import CacheCorrupt

    deep = b'{"schema_version": 2, "provenance": {"checksum": "00000000", "x": %s}}' % (b"[" * depth + b"]" * depth)
    (tmp_path / "manifest.json").write_bytes(deep)
    with pytest.raises(CacheCorrupt):
        load_manifest(LocalFolder(tmp_path))


def test_a_key_given_twice_counts_once_and_is_reported(attack: Attack) -> None:
    def plant(root: Path) -> None:
        text = (root / "manifest.json").read_text()
        (root / "manifest.json").write_text('{"sealed": false,' + text.lstrip()[1:])

    assert {"verify", "dit-cache verify"} <= attack(plant).refused()


def test_a_manifest_of_a_gigabyte_is_not_read(attack: Attack) -> None:
    def plant(root: Path) -> None:
        with (root / "manifest.json").open("r+b") as file:
            file.truncate(1 << 30)

    assert attack(plant).refused() == set(EVERYTHING)


def setting(**places: Any) -> Callable[[dict[str, Any]], None]:
    """A change of fields given as part__field."""

    def change(document: dict[str, Any]) -> None:
        for name, value in places.items():
            *parts, last = name.split("__")
            target = document
            for part in parts:
                target = target[part]
            target[last] = value

    return change


def all_taps(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: [tap.update(values) for tap in document["taps"]] and None


HUGE = 1 << 34
PROMISES: dict[str, Callable[[dict[str, Any]], object]] = {
    "16 billion rows": setting(dataset__feature_rows=HUGE, store__feature_shards=HUGE // 3 + 1),
    "16 billion rows in one shard": setting(
        dataset__feature_rows=HUGE, store__samples_per_shard=HUGE, store__feature_shards=1
    ),
    "16 billion rows, one of which failed": setting(
        dataset__feature_rows=HUGE, store__feature_shards=HUGE // 3 + 1, failed_rows=[5]
    ),
    "16 billion image shards": setting(store__image_shards=HUGE, store__images_per_shard=1),
    "16 billion image shards without images": setting(images=None, store__image_shards=HUGE),
    "a petabyte per sample": all_taps(tokens=1 << 14, channels=1 << 14, grid=[1 << 7, 1 << 7]),
    "more tokens than there may be": all_taps(tokens=1 << 40, channels=1, grid=[1 << 20, 1 << 20]),
    "20 000 timesteps": setting(
        curriculum__num_steps=1 << 23,
        curriculum__timesteps=list(range(1, 50_001)),
        curriculum__sigmas=[0.5] * 20_000,
    ),
    "30 000 views": setting(views=[f"view {i}" for i in range(30_000)]),
    "basis of a terabyte": lambda document: (
        setting(encoding__pca=1 << 18)(document),
        all_taps(tokens=1, grid=[1, 1], channels=1 << 18, teacher_channels=1 << 20)(document),
    ),
    "numbers of 4 000 digits": setting(curriculum__seed=10**3999),
    "rows of 4 000 digits": setting(dataset__feature_rows=10**3999),
    "rows below nothing": setting(dataset__feature_rows=-1),
    "a tap that is a path": all_taps(name="../../../precious/notes"),
    "a tap that is absolute": all_taps(name="/etc"),
    "text in place of numbers": setting(dataset__feature_rows="7" * 100_000),
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("promise", PROMISES)
def test_what_a_signed_manifest_promises_is_not_believed(attack: Attack, promise: str, store: str) -> None:
    def plant(root: Path) -> None:
        forge_manifest(root, PROMISES[promise])

    outcome = attack(plant, (*READING, "resume", "dit-cache info"), kind="int8", store=store)
    if promise != "numbers of 4 000 digits":
        assert {"verify", "resume"} <= outcome.refused()


@pytest.mark.parametrize("promise", ["16 billion rows in one shard", "16 billion image shards", "30 000 views"])
def test_what_an_unfinished_cache_promises_is_not_believed_either(attack: Attack, promise: str) -> None:
    def plant(root: Path) -> None:
        forge_manifest(root, PROMISES[promise])

    assert "resume" in attack(plant, (*READING, "resume"), partial=True, kind="int8").refused()


def test_the_tools_of_these_tests_forge_well(cache_of: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "cache"
    shutil.copytree(cache_of(), root)
    forge_manifest(root, setting(dataset__name="forged", curriculum__seed=3))
    manifest = open_cache(root).manifest
    assert manifest.dataset.name == "forged"
    assert manifest.cache_id == compute_cache_id(manifest.document())


def test_nothing_in_a_manifest_reaches_the_terminal_as_it_is(attack: Attack) -> None:
    def plant(root: Path) -> None:
        forge_manifest(
            root,
            setting(
                dataset__name=ESCAPES,
                dataset__counts={ESCAPES: 1},
                teacher__source=ESCAPES,
                views=[ESCAPES, "other"],
                provenance__command=ESCAPES,
                provenance__versions={ESCAPES: ESCAPES},
            ),
        )

    outcome = attack(plant, COMMANDS)
    assert outcome.by_operation["dit-cache info"] == "done"


RECORDS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a file outside": (
        "features-00000",
        lambda r: r["files"].update({"../../precious/notes.txt": {"bytes": 4, "crc32c": "00000000"}}),
    ),
    "only a file outside": (
        "layout-00000",
        lambda r: r.update(files={"/etc/passwd": {"bytes": 4, "crc32c": "00000000"}}),
    ),
    "calibration outside": (
        "calibration-00000",
        lambda r: r.update(files={"../../../../etc/passwd": {"bytes": 4, "crc32c": "00000000"}}),
    ),
    "rows of a petabyte": ("features-00000", setting(rows=[0, HUGE])),
    "rows backwards": ("features-00000", setting(rows=[5, 2])),
    "another shard": ("features-00000", setting(shard=1)),
    "images outside their tar": ("images-00000", setting(offsets=[[HUGE, 1]] * 4)),
    "images of the whole tar": ("images-00000", setting(offsets=[[512, HUGE]] * 4)),
    "images on top of each other": ("images-00000", setting(offsets=[[512, 9]] * 4)),
    "negative images": ("images-00000", setting(offsets=[[-512, 9]] * 4)),
    "images without end": ("images-00000", setting(offsets=[[512, 9]] * 20_000)),
    "no images": ("images-00000", setting(offsets=[])),
    "a number for checksums": (
        "features-00000",
        lambda r: [file.update(row_crc32c=5, piece_crc32c=None) for file in r["files"].values()],
    ),
    "lists for checksums": (
        "features-00000",
        lambda r: [file.update(row_crc32c=[[[]]] * 9) for file in r["files"].values()],
    ),
    "failures of rows elsewhere": ("features-00000", setting(failed=[{"row": HUGE, "reason": ESCAPES}])),
    "escapes for a file": ("features-00000", lambda r: r["files"].update({ESCAPES: {"bytes": 1, "crc32c": "0" * 8}})),
    "fidelity beyond numbers": ("features-00000", lambda r: [item.update(tokens=10**400) for item in r["fidelity"]]),
    "fidelity that overflows": (
        "features-00000",
        lambda r: r.update(fidelity=[r["fidelity"][0] | {"energy": 1e308, "squared_error": 1e308}] * 9),
    ),
    "fidelity of no timestep": ("features-00000", lambda r: [item.update(timestep=-5) for item in r["fidelity"]]),
    "fidelity of nothing": ("features-00000", lambda r: [item.update(energy=0, tokens=1) for item in r["fidelity"]]),
    "a field nobody knows": ("images-00000", setting(**{ESCAPES.replace("__", ""): 1})),
}


# What was measured is nobody's to check afterwards, as long as it is numbers.
UNNOTICED = [what for what in RECORDS if what.startswith("fidelity")]


def check_record(attack: Attack, what: str, partial: bool, *more: str) -> None:
    name, change = RECORDS[what]
    outcome = attack(lambda root: forge_record(root, name, change), (*READING, *more), partial=partial, kind="int8")
    if what not in ("failures of rows elsewhere", *UNNOTICED):
        assert "verify" in outcome.refused()


@pytest.mark.parametrize("what", RECORDS)
def test_a_signed_journal_record_that_lies_is_refused(attack: Attack, what: str) -> None:
    check_record(attack, what, False, "convert", "dit-cache verify")


@pytest.mark.parametrize("what", [w for w, (n, _) in RECORDS.items() if n != "features-00000" or w in UNNOTICED])
def test_a_lying_record_of_an_unfinished_cache_is_refused(attack: Attack, what: str) -> None:
    check_record(attack, what, True, "resume")


def test_a_record_that_is_no_json_is_refused(attack: Attack) -> None:
    for data in (DEEP, b"9" * 10_000, b'{"files": {"a": 1e400}}', b"\xff", b"", b'{"\\ud800": 1}'):
        outcome = attack(lambda root, data=data: (root / "journal/features-00001.json").write_bytes(data), READING)
        assert "verify" in outcome.refused()


def test_the_metadata_for_other_readers_is_what_the_manifest_says(attack: Attack) -> None:
    """Signed or not: zarr-python would believe this file."""

    def plant(root: Path) -> None:
        path = root / "features/hidden/zarr.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [1 << 50, 2, 3, 6, 8]}))
        vouch_for(root, "layout-00000", "features/hidden/zarr.json")

    assert "problems" in attack(plant, READING).by_operation["verify"]
