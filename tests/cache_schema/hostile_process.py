"""A process that does everything one can do with a cache, under limits, once for every request on its standard input.

It imports everything first and then forks for each request, so that a request costs what its work costs.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: F401 -- so that the memory it takes counts as the baseline

import pipeline.cli
import pipeline.commands.convert
import pipeline.commands.inspect
import pipeline.preview.run
from cache_schema import CacheError, create_cache, open_cache
from cache_schema import cli as command_line
from cache_schema.care.convert import convert
from cache_schema.care.describe import describe, describe_text
from cache_schema.care.repair import repair
from cache_schema.care.verify import verify
from cache_schema.format.manifest_file import load_manifest
from cache_schema.format.samples import load_samples
from cache_schema.storage.local import LocalFolder

# What one cache may take beyond the imports, and how long, before it counts as an attack that succeeded.
ADDRESS_SPACE = 2 << 30
SECONDS = 120


def read(root: Path) -> None:
    cache = open_cache(root, allow_partial=True)
    rows = list(cache.feature_rows[:100])
    for tap in cache.manifest.taps[:3]:
        for row in rows[:20]:
            cache.read([row], tap=tap.name, view=len(cache.manifest.views) - 1).decode()
        cache.read(rows, tap=tap.name).decode()


def images(root: Path) -> None:
    cache = open_cache(root, allow_partial=True)
    for row in range(min(10, cache.samples.num_rows - 1)):
        cache.images([row])


def resume(root: Path, twin: Path) -> None:
    """Continue the cache as if it were one's own, from the manifest and samples of an intact one."""
    manifest = load_manifest(LocalFolder(twin))
    writer = create_cache(root, manifest, load_samples(LocalFolder(twin)))
    writer.missing_shards()
    writer.missing_image_shards()
    if writer.needs_calibration():
        return
    writer.seal()


def command(*argv: str) -> None:
    """Run dit-cache; raise if what it printed could do anything to a terminal, or it called itself a bug."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line.run(pipeline.cli.app, list(argv), name="dit-cache")
        except SystemExit as left:
            code = left.code
    printed = out.getvalue() + err.getvalue()
    if any(not letter.isprintable() and letter not in "\n\r" for letter in printed):
        raise AssertionError(f"dit-cache {argv[0]} printed {printed[:2000]!r}")
    if code == 1 and argv[0] != "verify" and len(err.getvalue().strip().split("\n")) != 1:
        raise AssertionError(f"dit-cache {argv[0]} did not fail in one line: {err.getvalue()[:2000]!r}")
    if code not in (0, 1):
        raise AssertionError(f"dit-cache {argv[0]} ended with {code}: {printed[:2000]!r}")
    if code == 1:
        raise CacheError(err.getvalue().strip())


def operations(root: Path, twin: Path, scratch: Path) -> dict[str, Callable[[], Any]]:
    def other_store() -> str:
        return "zarr" if load_manifest(LocalFolder(root)).store.kind == "webdataset" else "webdataset"

    return {
        "open": lambda: len(open_cache(root, allow_partial=True)),
        "samples": lambda: open_cache(root, allow_partial=True).samples,
        "read": lambda: read(root),
        "images": lambda: images(root),
        "verify": lambda: [str(problem) for problem in verify(root)],
        "describe": lambda: (describe(root, True), describe_text(root, True)),
        "convert": lambda: convert(root, scratch / "copy", other_store()),
        "resume": lambda: resume(root, twin),
        "repair": lambda: [str(mended) for mended in repair(root)],
        "dit-cache info": lambda: command("info", str(root), "--shards"),
        "dit-cache preview": lambda: command("preview", str(root), "--random", "2", "-o", str(scratch / "page.png")),
        "dit-cache verify": lambda: command("verify", str(root)),
        "dit-cache convert": lambda: command("convert", str(root), str(scratch / "other"), "--store", "zarr"),
    }


def outcome_of(operation: Callable[[], Any]) -> str:
    try:
        found = operation()
    except CacheError as error:
        return f"refused: {type(error).__name__}: {error}"[:500]
    except BaseException as error:  # noqa: BLE001 -- this is what the tests are about
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        return f"escaped: {type(error).__name__}: {str(error)[:500]}\n{where}"
    return f"problems: {found[:5]}" if isinstance(found, list) and found else "done"


def serve(request: dict[str, Any]) -> None:
    """Do the work of one request in a fork, which writes a line per operation and then how its memory grew."""
    root, twin, scratch = (Path(request[name]) for name in ("root", "twin", "scratch"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Its default action ends the process: a hang is seen as a death by this signal.
    signal.alarm(SECONDS)
    for name, operation in operations(root, twin, scratch).items():
        if name in request["operations"]:
            print(json.dumps([name, outcome_of(operation)]), flush=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps(["memory", grown << 10]), flush=True)


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                serve(json.loads(line))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(json.dumps(["end", os.waitstatus_to_exitcode(status)]), flush=True)


if __name__ == "__main__":
    main()
