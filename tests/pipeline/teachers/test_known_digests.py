"""A large file is read once, by one process, and again whenever anything about it may have changed."""

import hashlib
import multiprocessing
import os

import pytest

from pipeline.teachers import known_digests
from pipeline.teachers.known_digests import known_digest
from pipeline.teachers.weights import component_digest, file_digest


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file that counts as large and as one that has lain there, for a user without any other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_digests, "WORTH", 10)
    monkeypatch.setattr(known_digests, "_SETTLED", -1e6)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"a" * 100)
    return path


@pytest.fixture
def reads(weights):
    """`reads(path)` is its digest; `reads.paths` those that were read for it."""

    def compute(path):
        reads.paths.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def reads(path=weights):
        return known_digest(path, compute)

    reads.paths = []
    return reads


def test_a_file_is_read_once(reads, weights):
    assert reads() == reads() == reads() == hashlib.sha256(b"a" * 100).hexdigest()
    assert reads.paths == [weights]


def test_a_small_file_is_read_and_nothing_remembered(reads, weights, tmp_path):
    weights.write_bytes(b"a")
    reads()
    reads()
    assert len(reads.paths) == 2
    assert not (tmp_path / "cache").exists()


def test_other_contents_are_seen_though_size_and_modification_time_are_set_back(reads, weights):
    reads()
    before = weights.stat()
    weights.write_bytes(b"b" * 100)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert reads() == hashlib.sha256(b"b" * 100).hexdigest()


def test_another_file_in_its_place_is_read(reads, weights, tmp_path):
    reads()
    other = tmp_path / "other"
    other.write_bytes(b"c" * 100)
    other.replace(weights)
    assert reads() == hashlib.sha256(b"c" * 100).hexdigest()


def test_a_link_is_what_it_leads_to(reads, weights, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(weights)
    reads()
    assert reads(link) == reads()
    assert reads.paths == [weights]


def test_what_was_changed_a_moment_ago_or_while_it_was_read_is_not_remembered(reads, weights, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(known_digests, "_SETTLED", 3.0)
        reads()
        reads()
    assert len(reads.paths) == 2

    def compute(path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.write_bytes(b"d" * 100)
        return digest

    known_digest(weights, compute)
    assert reads() == hashlib.sha256(b"d" * 100).hexdigest()


@pytest.mark.parametrize("content", [b"", b"{", b'{"state": 1}', b"[]", bytes(range(128, 192))])
def test_what_is_remembered_and_damaged_is_computed_again(reads, tmp_path, content):
    expected = reads()
    (entry,) = (tmp_path / "cache/dit-distill/digests").iterdir()
    entry.write_bytes(content)
    assert reads() == expected == reads()
    assert len(reads.paths) == 2


def test_without_a_folder_to_remember_in_it_is_computed_each_time(reads, tmp_path):
    (tmp_path / "cache").write_bytes(b"a file")
    assert reads() == reads()
    assert len(reads.paths) == 2


def test_of_processes_that_ask_at_once_one_reads(weights, tmp_path):
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    asked, may_end = context.Semaphore(0), context.Event()

    def ask() -> None:
        def compute(path):
            with log.open("a") as file:
                file.write("read\n")
            may_end.wait()
            return hashlib.sha256(path.read_bytes()).hexdigest()

        asked.release()
        assert known_digest(weights, compute) == hashlib.sha256(b"a" * 100).hexdigest()

    processes = [context.Process(target=ask) for _ in range(3)]
    for process in processes:
        process.start()
    for _ in processes:
        asked.acquire()
    may_end.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "read\n"


def test_the_digest_of_a_component_is_what_it_always_was(weights):
    (weights.parent / "model").mkdir()
    file = weights.rename(weights.parent / "model/weights.safetensors")
    line = f"weights.safetensors\0{file_digest(file)}\n".encode()
    expected = hashlib.sha256(line).hexdigest()
    assert component_digest(file.parent) == expected == component_digest(file.parent)
