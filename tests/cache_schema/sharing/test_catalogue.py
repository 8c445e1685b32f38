"""What caches are at a place is read from them; nothing is removed that is not one, or that somebody needs."""

import json
from collections.abc import Callable
from pathlib import Path

import cache_servers as servers
import pytest
from cache_building import interrupted, tree

from cache_schema import CacheError, CacheNotFound, open_cache
from cache_schema.format.manifest_file import as_unsealed
from cache_schema.sharing.catalogue import Entry, catalogue, find_built, matching, remove, table, unused
from cache_schema.sharing.push import plan_push, push
from cache_schema.storage.places import folder_at

CacheOf = Callable[..., Path]


@pytest.fixture(autouse=True)
def s3(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in servers.s3_environment().items():
        monkeypatch.setenv(name, value)


def test_a_catalogue_lists_finds_and_removes_what_is_there(
    cache_of: CacheOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = "s3://team/catalogue"
    here = open_cache(cache_of(kind="int8"))
    label, cache_id = here.manifest.label, here.manifest.cache_id
    push(plan_push(str(here.root), f"{prefix}/{label}"))
    push(plan_push(str(cache_of(kind="float16")), f"{prefix}/floats"))
    folder_at(f"{prefix}/broken").write("manifest.json", b"{")
    folder_at(f"{prefix}/other").write("notes.txt", b"no cache")
    entries = catalogue(prefix)
    assert [entry.name for entry in entries] == ["broken", "floats", label]
    assert "cannot be read" in entries[0].row()["state"]
    assert "int8" in table(entries)
    assert [entry.name for entry in matching(entries, ["encoding=int8", "tiny"])] == [label]
    with pytest.raises(CacheError, match="no column"):
        list(matching(entries, ["colour=red"]))
    assert find_built(cache_id, label) is None
    monkeypatch.setenv("DIT_CACHE_REMOTE", prefix)
    assert find_built(cache_id, label) == f"{prefix}/{label}"
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/config.json").write_text(f'{{"cache": "{prefix}/floats"}}')
    assert [entry.name for entry in unused(entries, tmp_path / "runs")] == [label]
    with pytest.raises(CacheError):
        remove(prefix)
    with pytest.raises(CacheNotFound):
        remove(f"{prefix}/other")
    assert remove(f"{prefix}/{label}") > 5
    assert [entry.name for entry in catalogue(prefix)] == ["broken", "floats"]
    assert folder_at(f"{prefix}/other").exists("notes.txt")


def test_what_is_left_of_a_removed_cache_can_be_removed_and_nothing_else(cache_of: CacheOf, tmp_path: Path) -> None:
    there = tmp_path / "there"
    push(plan_push(str(cache_of(kind="int8")), str(there)))
    for at in ("features/", "samples", "journal/seal"):
        interrupted(lambda: remove(str(there)), "delete", at)
    remove(str(there))
    assert tree(there) == {}
    (there / "journal").mkdir(exist_ok=True)
    (there / "journal/monday.json").write_text("{}")
    with pytest.raises(CacheNotFound):
        remove(str(there))


def test_a_cache_that_is_under_way_or_that_any_run_reads_is_not_unused(
    cache_of: CacheOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = Entry("birds", str(cache_of(kind="int8")), open_cache(cache_of(kind="int8")).manifest)
    assert sealed.manifest is not None
    begun = Entry("begun", "s3://team/begun", as_unsealed(sealed.manifest))
    run = tmp_path / "runs/a"
    run.mkdir(parents=True)
    assert unused([sealed, begun], tmp_path / "runs") == [sealed]
    (tmp_path / "mine").symlink_to(sealed.url)
    monkeypatch.chdir(tmp_path)
    for name, said in (
        ("config.json", {"cache": "s3://team/other", "features": "mine"}),
        ("config.json", {"cache": f"file://{sealed.url}/"}),
        ("config.json", {"cache": f"file://localhost{sealed.url[:-1]}%{ord(sealed.url[-1]):02X}"}),
        ("caches.json", {"other_caches": {"features": sealed.manifest.cache_id}}),
    ):
        (run / name).write_text(json.dumps(said))
        for here in (tmp_path, Path("/")):
            monkeypatch.chdir(here)
            assert unused([sealed, begun], tmp_path / "runs") == []
        (run / name).unlink()
