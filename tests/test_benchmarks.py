"""The benchmarks run, at a size that measures nothing, with what the runtime environment has."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import alternatives, cluster, cold, measure, reading, remote, searching, synthetic, training_speed
from benchmarks.gpu_check.feeding import write_fed_cache

ROOT = Path(__file__).parent.parent


def run(*arguments: str, expect: int = 0, timeout: int = 120) -> str:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows_of(markdown: str) -> dict[str, list[str]]:
    """The cells of every table row of a Markdown text, by its first cell."""
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(("kind", "stores"), [("int8", "--together"), ("bfloat16", "--no-together")])
def test_every_reader_is_measured_or_said_to_be_missing(kind, stores):
    small = ["--small", "--samples", "6", "--rounds", "1", "--batch", "3", "--least-seconds", "0.001"]
    rows = rows_of(run("benchmarks.reading", "--workloads", kind, stores, *small))
    for reader in [*reading.OURS, *alternatives.READERS]:
        cells = rows[reader.name]
        installed = not reader.distribution or measure.version(reader.distribution) is not None
        assert (cells[0] == "not installed") == (not installed)
        assert bool(re.fullmatch(r"[0-9,.]+", cells[1])) == installed


def test_a_cold_disk_is_measured_beside_bare_reads_by_ever_more_threads(capsys):
    reading.main(["--cold", "--small", "--workloads", "int8", "--samples", "6", "--rounds", "1", "--batch", "3"])
    rows = rows_of(capsys.readouterr().out)
    bare = {f"`os.preadv`, {threads} threads" for threads in cold.THREADS}
    assert bare | {cold.AGAIN, cold.ONE_BY_ONE, cold.AHEAD} <= set(rows)


def test_a_graph_is_measured_beside_exact_search(capsys):
    pytest.importorskip("usearch")
    searching.main(["--small"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 1,000")]
    assert [int(line[1]) for line in lines] == list(searching.EXPANSIONS)
    assert all(float(line[2]) > 0.9 for line in lines)


def test_every_writer_is_measured_or_said_to_be_missing():
    rows = rows_of(run("benchmarks.writing", "--small", "--rounds", "1", "--workloads", "int8"))
    for writer in alternatives.WRITERS:
        installed = measure.version(writer.distribution) is not None
        assert (rows[writer.name][0] == "not installed") == (not installed)
    # Their sum is the time of a shard; the rest must not hide most of it.
    assert {"checksum", "write", "fsync", "in all"} <= set(rows)


def test_every_format_is_encoded_side_by_side_with_numpy_and_torch():
    rows = [line.split(" | ") for line in run("benchmarks.encoding", "--small", "--rounds", "1").splitlines()]
    assert [(row[0], row[1]) for row in rows[2:]] == [
        (f"| {kind}", given) for kind in ("int8", "float8_e4m3", "bfloat16") for given in ("float32", "bfloat16")
    ]


def test_a_joint_and_a_reused_context_are_measured_side_by_side():
    rows = [
        line for line in run("benchmarks.context_reuse", "--small", "--rounds", "1").splitlines() if "| 4 |" in line
    ]
    assert [row.split(" | ")[0] for row in rows] == ["| hidden", "| single.2"]
    # 8 tokens of text and 16 of each image; reused: the context once, with a token in place of its text.
    assert all(row.split(" | ")[2:4] == ["160", "113"] for row in rows)


def test_a_reader_that_delivers_other_values_is_not_measured(tmp_path):
    workload = synthetic.Workload("int8", tokens=4, channels=8)
    cache = synthetic.write_cache(tmp_path / "cache", workload, 3)
    wrong = reading.Reader("liar", "", "cache", lambda folder, w: lambda rows: (rows, np.zeros((3, *w.shape), w.dtype)))
    with pytest.raises(ValueError, match="liar does not deliver what was written"):
        reading.prepare(wrong, tmp_path, workload, 3, 3)
    assert cache.is_dir()


def test_what_does_not_fit_in_memory_is_measured_one_store_at_a_time():
    readers = [*reading.OURS, *alternatives.READERS]
    assert reading.fits_in_memory(synthetic.INT8, 1, 1, readers)
    assert not reading.fits_in_memory(synthetic.BFLOAT16, 100_000, 32, readers)


def test_a_contender_whose_process_fails_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)broken failed: .*ZeroDivisionError"):
        measure.in_turns_apart({"broken": _broken}, rounds=1)


def test_a_cache_is_pushed_pulled_and_streamed_from_the_benchmarks_own_server(capsys):
    pytest.importorskip("obstore")
    small = ["--small", "--samples", "40", "--rounds", "1", "--delays", "1"]
    remote.main([*small, "--only", "plain,streaming`,FeatureLoader,dit-cache"])
    rows = rows_of(capsys.readouterr().out)
    for contender in remote.CONTENDERS:
        ours = contender.distribution in ("", "dit-distill")
        assert (rows[contender.name][0] == "not measured") != ours
        assert bool(re.fullmatch(r"[0-9,.]+", rows[contender.name][1])) == ours


def test_a_build_on_a_cluster_is_bound_by_its_gpus_or_by_the_store_and_a_killed_worker_costs_time():
    free = {"latency": 0.0, "uneven": 0.0, "lost_after": 1e12}
    store = cluster.stored(synthetic.INT8, 2000)
    few = cluster.Assumptions(images=2000, gpus=4, **free)
    ideal = store.shards / 4 * store.images_per_shard / few.images_per_second
    assert cluster.simulate(store, few).seconds == pytest.approx(ideal, rel=0.2)
    narrow = cluster.Assumptions(images=2000, gpus=4, store=1e6, **free)
    assert cluster.simulate(store, narrow).seconds == pytest.approx(store.bytes / 1e6, rel=0.1)
    dying = cluster.Assumptions(images=2000, gpus=4, **{**free, "lost_after": 100.0})
    killed = cluster.simulate(store, dying)
    assert killed.workers_killed > 0
    assert killed.seconds > ideal


def test_steps_that_stream_and_embedding_are_measured_beside_what_they_are_held_against(tmp_path):
    folder = write_fed_cache(tmp_path / "fed", synthetic.Workload("int8", 16, 32), 8, 32)
    (row,) = training_speed.feeding({training_speed.WIDE: folder}, steps=1, rounds=1)
    assert row["images"] == 4
    assert min(row["streamed"], row["memory"], row["baseline"]) > 0
    rates = training_speed.embedding(folder, tmp_path, images=3, rounds=1)
    assert min(rates["embed"], rates["decoding"], rates["student"]) > 0


def _broken() -> dict[str, measure.Work]:
    return {"way": lambda: 1 / 0}


def test_every_benchmark_can_be_named_and_no_other():
    listed = run("benchmarks", "--help")
    assert all(name in listed for name in ("reading", "writing", "scaling"))
    assert "there is no benchmark nonsense" in run("benchmarks", "nonsense", expect=2)


def test_without_a_gpu_its_checks_run_at_the_demo_teachers_size():
    """Those that are quick; `make gpu-check` runs all of them."""
    quick = "device,attention,compiled,second view,card,kept,loader,training,fed from,DRC,NCCL"
    said = run("benchmarks.gpu_check", "--device", "cpu", "--only", quick, timeout=280)
    lines = [re.split(r"\s{2,}", line) for line in said.splitlines() if line.startswith(("PASS", "none", "FAIL"))]
    words = {line[1]: line[0] for line in lines}
    assert len(words) == 12
    assert {name for name, word in words.items() if word == "none"} == {"DiT compiled", "a card of 24 GB"}
    assert set(words.values()) == {"PASS", "none"}, said
    assert "no GPU is used" in said.splitlines()[0]


def test_a_check_that_fails_or_breaks_is_told_and_the_others_go_on(monkeypatch, capsys):
    from benchmarks.gpu_check import __main__ as command
    from benchmarks.gpu_check.scene import Failed

    def fails(scene: object) -> str:
        raise Failed("it is wrong by 3")

    def breaks(scene: object) -> str:
        raise ZeroDivisionError("division by zero")

    checks = (("first", fails), ("second", breaks), ("third", lambda scene: "fine"))
    monkeypatch.setattr(command, "CHECKS", checks)
    assert command.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"FAIL  first .* it is wrong by 3\nFAIL  second .* ZeroDivisionError.*\nPASS  third .* fine", said)
    assert "1 of 3 passed; failed: first, second" in said
