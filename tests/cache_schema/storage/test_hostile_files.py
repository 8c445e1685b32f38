"""Things that are no plain files, files too large to be true, and links: not waited for, and not written through."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache_hostile import COMMANDS, READING

Attack = Callable[..., Any]

FILES = {
    "zarr": [
        "manifest.json",
        "samples.parquet",
        "README.md",
        "journal/features-00001.json",
        "journal/images-00000.json",
        "journal/calibration-00000.json",
        "features/zarr.json",
        "features/hidden/c/1/0/0/0/0",
        "features/hidden.channel/c/0/0",
        "images/00000.tar",
        "images/index.npy",
    ],
    "webdataset": ["features/00001.tar", "features/hidden.channel.npy"],
}
EVERY_FILE = [(store, name) for store, names in FILES.items() for name in names]


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return plant


@pytest.mark.parametrize(("store", "name"), EVERY_FILE)
def test_what_is_no_plain_file_is_neither_read_nor_waited_for(attack: Attack, store: str, name: str) -> None:
    makers = [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")]
    for make in makers:
        outcome = attack(in_place_of(name, make), READING, kind="int8", store=store)
        assert "verify" in outcome.refused()


@pytest.mark.parametrize("partial", [False, True])
def test_commands_refuse_what_is_no_plain_file_as_well(attack: Attack, partial: bool) -> None:
    for name in ("manifest.json", "samples.parquet", "journal/layout-00000.json"):
        outcome = attack(in_place_of(name, os.mkfifo), ("convert", "resume", *COMMANDS), partial, kind="int8")
        assert {"convert", "dit-cache verify"} <= outcome.refused()


@pytest.mark.parametrize("name", ["journal", "images", "features"])
def test_a_file_in_place_of_a_folder_is_an_error_in_words(attack: Attack, name: str) -> None:
    def plant(root: Path) -> None:
        shutil.rmtree(root / name)
        (root / name).write_bytes(b"not a folder")

    for partial in (False, True):
        assert "verify" in attack(plant, partial=partial, kind="int8").refused()


@pytest.mark.parametrize("name", ["journal", "images", "features", "features/hidden"])
def test_an_unfinished_cache_with_a_linked_folder_is_not_written_to(attack: Attack, name: str) -> None:
    def plant(root: Path) -> None:
        target = root.parent.parent / "precious"
        shutil.copytree(root / name, target, dirs_exist_ok=True)
        shutil.rmtree(root / name)
        (root / name).symlink_to(target)
        for path in sorted(target.rglob("*-00002.json")) + sorted(target.rglob("00002.tar")):
            path.unlink()

    outcome = attack(plant, ("verify", "resume", "repair"), partial=True, kind="int8")
    assert {"verify", "resume", "repair"} <= outcome.refused()


def test_links_that_lead_in_circles_or_away_are_reported(attack: Attack) -> None:
    for name in ("manifest.json", "samples.parquet", "journal/features-00000.json", "images/00000.tar"):
        circle = in_place_of(name, lambda path: path.symlink_to(path.name))
        assert "verify" in attack(circle, READING).refused()

        def away(root: Path, name: str = name) -> None:
            kept = root.parent.parent / "precious/kept"
            shutil.move(root / name, kept)
            (root / name).symlink_to(kept)

        assert attack(away, READING).by_operation["verify"].startswith("problems")


@pytest.mark.parametrize(("store", "name"), EVERY_FILE)
def test_a_file_of_a_terabyte_of_nothing_is_refused_at_once(attack: Attack, store: str, name: str) -> None:
    def plant(root: Path) -> None:
        os.truncate(root / name, 1 << 40)

    assert "verify" in attack(plant, READING, kind="int8", store=store).refused()


def test_a_terabyte_that_its_record_vouches_for_is_not_read_into_memory(attack: Attack) -> None:
    """What checks it byte by byte would take hours, as for an honest file of that size, so nothing here does."""
    for store, name in (("zarr", "features/hidden/c/0/0/0/0/0"), ("webdataset", "features/00000.tar")):
        outcome = attack(lambda root, name=name: os.truncate(root / name, 1 << 40), ("read", "images"), store=store)
        assert "read" in outcome.refused()
