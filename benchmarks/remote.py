"""What a distance costs: streaming from an object store, side by side with other tools and with a plain download.

`python -m benchmarks.remote`. One S3 server process on loopback (`benchmarks.object_server`), reached directly and with
a delay added to every request. Every tool reads epochs in shuffled order, 32 samples at a time into one array, from an
empty local copy; each time in a process of its own, in turns, medians. "Second" is the median of the epochs after the
first, which all begin alike. The bound fetches the same objects into files by as many requests at once. Pushing and
pulling are held against a plain copy of the same files.
"""

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alternatives import SHUFFLE_BUFFER, WRITERS, as_array
from benchmarks.measure import save, shuffled_order, table, version
from benchmarks.synthetic import INT8, TAP, Workload, encoded_features, mapped_payloads, write_cache
from cache_schema import FeatureLoader, open_cache
from cache_schema.encoding.number_formats import Array

BATCH = 32
REQUESTS = 16  # of the plain copies, at once
_RANGE, _PART = 8 << 20, 16 << 20  # bytes of one request of a plain download, of one part of a plain upload
_EPOCHS = 6  # of which the first has everything to fetch
_PAUSE = 0.5  # seconds
_UNSEEN = 1 << 20  # no stored value
BUCKET = "bench"
# Of each (number of the row, its sample); one call is one epoch.
Samples = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class Scene:
    """Where a contender finds the server, the stores on it and an empty folder of its own."""

    port: int
    stores: Path
    scratch: Path
    workload: Workload
    samples: int


@dataclass(frozen=True)
class Contender:
    """A tool that streams, or `copies`. `open` returns one epoch, which notes a value of every row."""

    name: str
    distribution: str
    store: str
    open: Callable[[Scene], Callable[[Array], int]]
    copies: bool = False


def ours(scene: Scene) -> Callable[[Array], int]:
    """Stream our own cache through the loader that training uses."""
    return _by_loader(f"s3://{BUCKET}/cache")


def ours_here(scene: Scene) -> Callable[[Array], int]:
    """Read the same cache from the local disk, for the second epoch to be held against."""
    return _by_loader(str(scene.stores / BUCKET / "cache"))


def _by_loader(location: str) -> Callable[[Array], int]:
    loader = FeatureLoader(open_cache(location), BATCH, tap=TAP, seed=0)

    def epoch(seen: Array) -> int:
        # Start over: what was read ahead after the first epoch is not to be a present for the second.
        loader.load_state_dict(loader.state_dict())
        for batch in loader:
            seen[batch.rows.numpy()] = batch.payload[:, -1, -1, -1].numpy()
        return len(loader)

    return epoch


def litdata(scene: Scene) -> Callable[[Array], int]:
    from litdata import StreamingDataset
    from litdata.streaming import downloader

    # Its client would refuse a server without TLS.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    # Four objects ahead were faster than two, its default, and than more.
    dataset = StreamingDataset(
        f"s3://{BUCKET}/litdata", cache_dir=str(scene.scratch / "local"), shuffle=True, max_pre_download=4
    )
    return functools.partial(_gather, lambda: ((int(each["row"]), each["features"]) for each in dataset), scene)


def mosaicml(scene: Scene) -> Callable[[Array], int]:
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        remote=f"s3://{BUCKET}/mosaicml-streaming", local=str(scene.scratch / "local"), shuffle=True, batch_size=BATCH
    )
    return functools.partial(_gather, lambda: ((int(each["row"]), each["features"]) for each in dataset), scene)


def webdataset(scene: Scene) -> Callable[[Array], int]:
    import webdataset as wds

    names = sorted(path.name for path in (scene.stores / BUCKET / "webdataset").glob("*.tar"))
    urls = [f"http://127.0.0.1:{scene.port}/{BUCKET}/webdataset/{name}" for name in names]
    local = scene.scratch / "local"
    local.mkdir()
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), cache_dir=str(local), empty_check=False)
    dataset = dataset.shuffle(SHUFFLE_BUFFER).decode()
    return functools.partial(_gather, lambda: ((int(each["__key__"]), each["npy"]) for each in dataset), scene)


def _gather(samples: Callable[[], Samples], scene: Scene, seen: Array) -> int:
    """Take one epoch, samples copied into one array a batch; return the number of batches."""
    out = np.empty((BATCH, *scene.workload.shape), scene.workload.dtype)
    stream, count = iter(samples()), 0
    while batch := list(itertools.islice(stream, BATCH)):
        for place, (row, sample) in enumerate(batch):
            np.copyto(out[place], as_array(sample, scene.workload))
            seen[row] = out[place, -1, -1, -1]
        count += 1
    return count


def plain(scene: Scene) -> Callable[[Array], int]:
    """Fetch the objects of our cache into files, in pieces of 8 MB, as the tools of a bucket do."""
    import obstore

    store = _bucket()

    def epoch(seen: Array) -> int:
        found = [meta for part in obstore.list(store, "cache") for meta in part]
        files = {meta["path"]: _new_file(scene.scratch / "plain" / meta["path"]) for meta in found}

        def copy(piece: tuple[str, int, int]) -> None:
            name, start, stop = piece
            os.pwrite(files[name], obstore.get_range(store, name, start=start, end=stop), start)

        pieces = [
            (meta["path"], start, min(start + _RANGE, meta["size"]))
            for meta in found
            for start in range(0, meta["size"], _RANGE)
        ]
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(copy, pieces))
        for file in files.values():
            os.close(file)
        shutil.rmtree(scene.scratch / "plain")
        return 0

    return epoch


def upload(scene: Scene) -> Callable[[Array], int]:
    """Copy the files of our cache into the bucket, each in parts of 16 MB, as the tools of a bucket do."""
    import obstore

    store, cache = _bucket(), scene.stores / BUCKET / "cache"
    files = [path for path in cache.rglob("*") if path.is_file()]

    def copy(path: Path) -> None:
        name = f"{scene.scratch.name}/{path.relative_to(cache).as_posix()}"
        obstore.put(store, name, path, chunk_size=_PART, max_concurrency=4)

    def all_files(seen: Array) -> int:
        with ThreadPoolExecutor(REQUESTS) as pool:
            return len(list(pool.map(copy, files)))

    return all_files


def pushed(scene: Scene) -> Callable[[Array], int]:
    """Do what `dit-cache push` does."""
    from cache_schema.sharing.push import plan_push, push

    def once(seen: Array) -> int:
        push(plan_push(str(scene.stores / BUCKET / "cache"), f"s3://{BUCKET}/{scene.scratch.name}"))
        return 1

    return once


def pulled(scene: Scene) -> Callable[[Array], int]:
    """Do what `dit-cache pull` does."""
    from cache_schema.sharing.pull import plan_pull, pull

    def once(seen: Array) -> int:
        pull(plan_pull(f"s3://{BUCKET}/cache", str(scene.scratch / "copy")))
        return 1

    return once


def _bucket() -> Any:
    from obstore.store import S3Store

    options: Any = {"allow_http": True}
    return S3Store(BUCKET, endpoint=os.environ["AWS_ENDPOINT_URL"], client_options=options)


def _new_file(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


PLAIN, HERE, OURS = "plain download (bound)", "`FeatureLoader`, local", "`FeatureLoader`, streaming"
UPLOAD, PUSH, PULL = "plain upload", "`dit-cache push`", "`dit-cache pull`"
CONTENDERS = [
    Contender(PLAIN, "", "cache", plain, copies=True),
    Contender(HERE, "dit-distill", "cache", ours_here),
    Contender(OURS, "dit-distill", "cache", ours),
    Contender("litdata, shuffled", "litdata", "litdata", litdata),
    Contender("MosaicML streaming, shuffled", "mosaicml-streaming", "mosaicml-streaming", mosaicml),
    Contender("webdataset, shuffle buffer", "webdataset", "webdataset", webdataset),
    Contender(UPLOAD, "", "cache", upload, copies=True),
    Contender(PUSH, "dit-distill", "cache", pushed, copies=True),
    Contender(PULL, "dit-distill", "cache", pulled, copies=True),
]


def write_stores(place: Path, workload: Workload, samples: int) -> None:
    """Write our cache and the stores of the tools that are installed, as the objects of one bucket."""
    write_cache(place / "cache", workload, samples)
    payloads = mapped_payloads(place / "cache", workload)
    for writer in WRITERS:
        if version(writer.distribution) and any(each.store == writer.distribution for each in CONTENDERS):
            writer.write(place / writer.distribution, workload, payloads)


@contextlib.contextmanager
def served(root: Path, delays: list[float]) -> Iterator[list[int]]:
    """Serve a folder; yields the port at which requests wait for each of the delays, in milliseconds."""
    command = [sys.executable, "-m", "benchmarks.object_server", str(root), *map(str, delays)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield [int(port) for port in server.stdout.readline().split()]
        finally:
            server.stdin.close()
            server.wait()


def use(port: int, local: Path) -> None:
    """Have every client of this process find the server, and keep what it keeps in `local`."""
    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint,
        "DIT_CACHE_LOCAL": str(local),
    }  # fmt: skip


def _take_epochs(line: Connection, contender: Contender, scene: Scene, expected: dict[int, int]) -> None:
    """In a process of its own: say when all is imported, then answer the seconds of the first epoch and of a later."""
    try:
        use(scene.port, scene.scratch / "blocks")
        _import_for(contender)
        line.send("ready")
        line.recv()
        seconds: list[float] = []
        started = time.perf_counter()
        epoch = contender.open(scene)
        for _ in range(1 if contender.copies else _EPOCHS):
            seen = np.full(scene.samples, _UNSEEN)
            epoch(seen)
            seconds.append(time.perf_counter() - started)
            if not contender.copies:
                _check(contender.name, seen, expected)
                time.sleep(_PAUSE)  # in which a tool finishes what it reads ahead
            started = time.perf_counter()
        line.send([seconds[0], *([statistics.median(seconds[1:])] if seconds[1:] else [])])
    except Exception:  # noqa: BLE001 - the parent raises it again
        line.send(RuntimeError(traceback.format_exc()))
    line.recv()


def _check(name: str, seen: Array, expected: dict[int, int]) -> None:
    """Raise ValueError unless every row was delivered and the values are those that were written."""
    wrong = [row for row, value in expected.items() if seen[row] != value]
    if wrong or (seen == _UNSEEN).any():
        raise ValueError(f"{name} does not deliver what was written, in rows {wrong[:3]} or by leaving some out")


def _import_for(contender: Contender) -> None:
    for name in {"litdata": ["litdata"], "mosaicml-streaming": ["streaming"], "webdataset": ["webdataset"]}.get(
        contender.distribution, ["obstore", "botocore.session"]
    ):
        __import__(name)


def take_turn(contender: Contender, scene: Scene, expected: dict[int, int]) -> list[float]:
    """Return the seconds of the first epoch, from opening on, and of a later one, in a fresh process."""
    scene.scratch.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy", "torch", "cache_schema"])
    mine, theirs = context.Pipe()
    process = context.Process(target=_take_epochs, args=(theirs, contender, scene, expected))
    process.start()
    theirs.close()
    try:
        answers = []
        for _ in range(2):
            answers.append(mine.recv())
            if isinstance(answers[-1], RuntimeError):
                raise RuntimeError(f"{contender.name} failed: {answers[-1]}")
            mine.send("go on")
        return answers[1]
    finally:
        mine.close()
        process.join()
        shutil.rmtree(scene.scratch, ignore_errors=True)


def measure(workload: Workload, samples: int, rounds: int, delays: list[float], names: list[str]) -> dict[str, Any]:
    """Measure the contenders that are installed, at every delay; return their figures."""
    present = {
        each.name: each
        for each in CONTENDERS
        if (not each.distribution or version(each.distribution)) and (not names or any(n in each.name for n in names))
    }
    with tempfile.TemporaryDirectory(prefix="remote-") as place:
        stores = Path(place) / "stores"
        (stores / BUCKET).mkdir(parents=True)
        write_stores(stores / BUCKET, workload, samples)
        rows = range(0, samples, max(1, samples // 8))
        expected = {row: int(encoded_features(stores / BUCKET / "cache", workload, row)[-1, -1, -1]) for row in rows}
        found: dict[float, dict[str, list[list[float]]]] = {delay: {name: [] for name in present} for delay in delays}
        with served(stores, delays) as ports:
            for turn, (delay, port) in itertools.product(range(rounds), zip(delays, ports, strict=True)):
                for name in shuffled_order(present, turn):
                    scratch = Path(place) / f"{turn}-{delay:g}"
                    scene = Scene(port, stores, scratch, workload, samples)
                    found[delay][name].append(take_turn(present[name], scene, expected))
                    shutil.rmtree(stores / BUCKET / scratch.name, ignore_errors=True)
    medians = {
        f"{delay:g} ms": {
            name: [statistics.median(epoch) for epoch in zip(*turns, strict=True)] for name, turns in each.items()
        }
        for delay, each in found.items()
    }
    return {"workload": str(workload), "samples": samples, "rounds": rounds, "bytes": samples * workload.sample_bytes,
            "seconds": medians}  # fmt: skip


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown: a caption and a table for every delay."""
    parts = [f"{result['workload']}; {result['samples']} samples, medians of {result['rounds']} rounds."]
    for delay, seconds in result["seconds"].items():
        bound = seconds.get(PLAIN, [None])[0]
        here = seconds.get(HERE, [None, None])[1]
        up = seconds.get(UPLOAD, [None])[0]
        rows: list[list[object]] = []
        for contender in CONTENDERS:
            if contender.name not in seconds:
                rows.append([contender.name, "not measured", None, None, None, None])
                continue
            first, second = [*seconds[contender.name], None][:2]
            base = up if contender.name in (UPLOAD, PUSH) else bound
            rows.append([
                contender.name, version(contender.distribution) if contender.distribution else None,
                result["bytes"] / first / 1e6, _ratio(base, first) if contender.name != HERE else None,
                None if second is None else result["bytes"] / second / 1e6, _ratio(here, second),
            ])  # fmt: skip
        header = ["", "version", "first epoch, MB/s", "of the plain copy", "second, MB/s", "of local"]
        parts.append(f"{delay} added to every request:\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _ratio(base: float | None, seconds: float | None) -> str | None:
    return None if base is None or seconds is None else f"{base / seconds:.2f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description=__doc__)
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delays", default="0,20", help="milliseconds added to every request, comma-separated")
    parser.add_argument("--only", default="", help="contenders whose names contain one of these, comma-separated")
    parser.add_argument("--small", action="store_true", help="a tiny workload, to see that everything works")
    args = parser.parse_args(argv)
    workload = Workload("int8", tokens=8, channels=16) if args.small else INT8
    names = [name for name in args.only.split(",") if name]
    result = measure(workload, args.samples, args.rounds, [float(delay) for delay in args.delays.split(",")], names)
    print(render(result))
    if not args.small and not names:
        save("remote", result)


if __name__ == "__main__":
    main()
