"""An attacker's tools: change anything in a cache and sign it again, then see what a victim's process does with it."""

import json
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema.format import journal
from cache_schema.format.identity import compute_cache_id
from cache_schema.format.manifest_file import manifest_checksum, render_document
from cache_schema.storage.files import digest_file

READING = ("open", "samples", "read", "images", "verify", "describe")
COMMANDS = ("dit-cache info", "dit-cache verify", "dit-cache convert", "dit-cache preview")
EVERYTHING = (*READING, "convert", "resume", *COMMANDS)
# A tiny cache takes a few megabytes; the most honest thing measured here, 40. What is refused must not take more.
MEMORY = 400 << 20


@dataclass(frozen=True)
class Outcome:
    """What each operation came to: "done", "problems: ...", "refused: ..." or "escaped: ..."."""

    by_operation: dict[str, str]
    memory: int | None
    exit_code: int

    def refused(self) -> set[str]:
        return {name for name, found in self.by_operation.items() if not found.startswith("done")}

    def check_harmless(self) -> None:
        escaped = {name: found for name, found in self.by_operation.items() if found.startswith("escaped")}
        assert not escaped, "\n".join(f"{name}: {found}" for name, found in escaped.items())
        assert self.exit_code == 0, f"ended with {self.exit_code} after {self.by_operation}"
        assert self.memory is not None
        assert self.memory < MEMORY, f"took {self.memory >> 20} MB: {self.by_operation}"


class Victim:
    """The process of `hostile_process.py`: started once, asked many times."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("hostile_process.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent.parent,
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def use(self, root: Path, twin: Path, scratch: Path, operations: Collection[str] = EVERYTHING) -> Outcome:
        """Do things with the cache at `root`; `twin` is the intact cache that it was, `scratch` takes what is made."""
        request = {"root": str(root), "twin": str(twin), "scratch": str(scratch), "operations": list(operations)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        outcomes: dict[str, str] = {}
        memory = None
        for line in self._process.stdout:
            name, found = json.loads(line)
            if name == "end":
                return Outcome(outcomes, memory, found)
            if name == "memory":
                memory = found
            else:
                outcomes[name] = found
        raise AssertionError("the process that all of this happens in has ended")


def forge_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the cache id and the checksum that follow."""
    document = json.loads((root / "manifest.json").read_bytes())
    change(document)
    document["cache_id"] = compute_cache_id(document)
    document["provenance"]["checksum"] = manifest_checksum(document)
    (root / "manifest.json").write_bytes(render_document(document))


def forge_record(root: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a journal record and give it the checksum that follows."""
    path = root / "journal" / f"{name}.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(journal._render(document))


def vouch_for(root: Path, record: str, file: str) -> None:
    """Make a journal record say that a file is as it is."""
    found = digest_file(root / file)

    def change(document: dict[str, Any]) -> None:
        document["files"][file] |= {"bytes": found.bytes, "crc32c": found.crc32c}

    forge_record(root, record, change)
