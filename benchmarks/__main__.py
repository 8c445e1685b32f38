"""`python -m benchmarks [names]`: the named benchmarks, or all, one after the other, each in a process of its own."""

import pkgutil
import subprocess
import sys
from pathlib import Path


def names() -> list[str]:
    """Return the benchmarks: every module beside this one that can be run."""
    folder = Path(__file__).parent
    found = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return [name for name in found if "\ndef main(" in (folder / f"{name}.py").read_text(encoding="utf-8")]


def main(argv: list[str]) -> int:
    known = [name for name in names() if name != "__main__"]
    unknown = sorted(set(argv) - set(known))
    if unknown:
        print(f"error: there is no benchmark {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    failed = []
    for name in argv or known:
        print(f"\n## {name}\n", flush=True)
        # What one benchmark leaves in memory or in threads shall not weigh on the next.
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"error: {', '.join(failed)} failed; see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
