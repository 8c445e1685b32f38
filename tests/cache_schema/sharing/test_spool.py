"""A cache is built into a place elsewhere by one machine or several, and is the one that would have been built here."""

from pathlib import Path
from unittest import mock

import cache_servers as servers
import pytest
from cache_building import features_of, image_of, tiny_manifest, tiny_samples, tree

from cache_schema import CacheError, CacheMismatch, CacheUnsealed, CacheWriter, create_cache, open_cache
from cache_schema.care.verify import verify
from cache_schema.sharing.catalogue import remove
from cache_schema.sharing.parts import Selection
from cache_schema.sharing.pull import plan_pull, pull
from cache_schema.sharing.spool import spooled_folder
from cache_schema.storage.places import folder_at


@pytest.fixture(autouse=True)
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIT_CACHE_LOCAL", str(tmp_path / "blocks"))
    for name, value in servers.s3_environment().items():
        monkeypatch.setenv(name, value)


def begin(url: str, spool: Path, *part: int, take_over: bool = False) -> CacheWriter:
    samples, rows = tiny_samples()
    folder = spooled_folder(url, spool, *part, take_over=take_over)
    return create_cache(folder, tiny_manifest(samples, rows, kind="int8"), samples)


def write(writer: CacheWriter, shards: list[int], images: list[int], scale: float = 1.0) -> None:
    """Do a part of a build; scale: of the features that this machine would calibrate on."""
    if writer.needs_calibration():
        features = features_of(range(7), writer.manifest)
        writer.calibrate({tap: values * scale for tap, values in features.items()})
    for shard in shards:
        writer.write_shard(shard, features_of(writer.shard_rows(shard), writer.manifest))
    for shard in images:
        writer.write_images(shard, [image_of(row) for row in writer.image_rows(shard)])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the same cache, built in a folder."""
    root = tmp_path_factory.mktemp("local") / "cache"
    samples, rows = tiny_samples()
    writer = create_cache(root, tiny_manifest(samples, rows, kind="int8"), samples)
    write(writer, [0, 1, 2], [0, 1, 2])
    writer.seal()
    return tree(root)


def files_at(url: str) -> dict[str, bytes]:
    folder = folder_at(url)
    return {name: folder.read_bounded(name, 1 << 26) for name in folder.walk()}


def test_what_is_built_there_is_byte_for_byte_what_is_built_here_and_no_shard_stays_here(
    local: dict[str, bytes], tmp_path: Path
) -> None:
    url = "s3://team/spool/one"
    writer = begin(url, tmp_path / "spool")
    write(writer, [0, 1, 2], [0])
    assert not [name for name in tree(tmp_path / "spool") if "/c/1/" in name or name.endswith(".tar")]
    with pytest.raises(CacheUnsealed):
        open_cache(url)
    write(writer, [], [1, 2])
    assert writer.seal().sealed
    assert files_at(url) == local
    assert verify(url) == []
    # Started again there is nothing to do.
    again = begin(url, tmp_path / "spool")
    assert again.missing_shards() == again.missing_image_shards() == []
    assert files_at(url) == local


def test_another_machine_goes_on_from_what_is_there_once_it_is_told_that_the_first_was_given_up(
    local: dict[str, bytes], tmp_path: Path
) -> None:
    url = "s3://team/spool/given-up"
    write(begin(url, tmp_path / "first"), [1], [0])
    with pytest.raises(CacheMismatch, match=r"is being built on another machine.*--shard-slice.*--take-over"):
        begin(url, tmp_path / "second")
    same = begin(url, tmp_path / "first")
    assert (same.missing_shards(), same.missing_image_shards()) == ([0, 2], [1, 2])
    kept = folder_at(url).stat("journal/features-00001.json")  # type: ignore[attr-defined]
    other = begin(url, tmp_path / "second", take_over=True)
    assert (other.missing_shards(), other.missing_image_shards()) == ([0, 2], [1, 2])
    assert not other.needs_calibration()
    write(other, [0, 2], [1, 2])
    other.seal()
    assert files_at(url) == local
    assert folder_at(url).stat("journal/features-00001.json") == kept  # type: ignore[attr-defined]


def test_machines_that_do_a_part_each_encode_by_one_calibration_even_if_they_measure_different_ones(
    local: dict[str, bytes], tmp_path: Path
) -> None:
    url = "s3://team/spool/parts"
    first, second = begin(url, tmp_path / "0", 0, 2), begin(url, tmp_path / "1", 1, 2)
    with pytest.raises(CacheMismatch, match="is being built in 2 parts, not 1; give --shard-slice I/2"):
        begin(url, tmp_path / "whole")
    assert first.needs_calibration()
    assert second.needs_calibration()
    write(first, [], [])
    # The second looked whether there is a calibration before the first had stored it, and measured another one.
    with mock.patch.object(second, "needs_calibration", return_value=True):
        write(second, [], [], scale=3.0)
    write(first, [0, 2], [0, 2])
    write(second, [1], [1])
    assert second.missing_shards() == second.missing_image_shards() == []
    second.seal()
    assert files_at(url) == local
    pull(plan_pull(url, str(tmp_path / "copy"), Selection(), None))
    assert verify(tmp_path / "copy") == []


def test_a_spool_of_a_cache_that_was_removed_there_is_begun_anew(local: dict[str, bytes], tmp_path: Path) -> None:
    url = "s3://team/spool/removed"
    write(begin(url, tmp_path / "spool"), [0, 1], [])
    for name in list(folder_at(url).walk()):
        folder_at(url).delete(name)
    writer = begin(url, tmp_path / "spool")
    assert writer.missing_shards() == [0, 1, 2]
    write(writer, [0, 1, 2], [0, 1, 2])
    writer.seal()
    assert files_at(url) == local


def record_at(url: str, name: str) -> bytes:
    return folder_at(url).read_bounded(f"journal/{name}.json", 1 << 20)


def test_a_spool_of_a_cache_that_was_removed_and_begun_by_another_is_begun_anew(
    local: dict[str, bytes], tmp_path: Path
) -> None:
    url = "s3://team/spool/begun-anew"
    write(begin(url, tmp_path / "0", 0, 2), [], [], scale=3.0)
    write(begin(url, tmp_path / "1", 1, 2), [], [])  # whose spool holds that calibration
    remove(url)
    write(begin(url, tmp_path / "0", 0, 2), [], [])
    write(begin(url, tmp_path / "1", 1, 2), [1], [])
    assert record_at(url, "features-00001") == local["journal/features-00001.json"]


def test_a_build_that_ended_before_or_amid_its_beginning_goes_on_with_the_same_command_or_elsewhere(
    local: dict[str, bytes], tmp_path: Path
) -> None:
    url, spool, other = "s3://team/spool/amid", tmp_path / "spool", tmp_path / "other"
    token = spooled_folder(url, spool).token
    assert spooled_folder(url, spool).token == token
    for there, take_over, scale in ((spool, False, 3.0), (spool, False, 4.0), (other, True, 5.0)):
        writer = begin(url, there, take_over=take_over)
        with (
            mock.patch("cache_schema.sharing.spool.send", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            write(writer, [], [], scale)
        assert folder_at(url).exists("calibration.json")  # what it would be was said, and is not there
    # As earlier releases said it.
    folder_at(url).write("calibration.json", local["journal/calibration-00000.json"].replace(b"0", b"1"))
    write(begin(url, other, take_over=True), [], [])
    assert record_at(url, "calibration-00000") == local["journal/calibration-00000.json"]


def test_places_and_folders_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("mine")
    with pytest.raises(CacheError, match="other is not empty and no spool of a build"):
        spooled_folder("s3://team/spool/other", tmp_path / "other")
    assert (tmp_path / "other/letter.txt").exists()
    for url in ("https://127.0.0.1/cache", "hf://datasets/mia/caches"):
        with pytest.raises(CacheError, match="a cache is built into s3, gs, az or sftp"):
            spooled_folder(url, tmp_path / "spool")
