"""`python -m benchmarks [names] [--except names]`: benchmarks one after the other, each in a process of its own."""

import argparse
import pkgutil
import subprocess
import sys
from pathlib import Path


def names() -> list[str]:
    """Return the benchmarks: every module beside this one that has a `main`."""
    folder = Path(__file__).parent
    modules = pkgutil.iter_modules([str(folder)])
    found = [module.name for module in modules if module.name != "__main__" and not module.ispkg]
    return [name for name in found if "\ndef main(" in (folder / f"{name}.py").read_text(encoding="utf-8")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; all by default")
    parser.add_argument("--except", dest="excluded", default="", metavar="NAMES", help="not these, comma-separated")
    args = parser.parse_args(argv)
    excluded = [name for name in args.excluded.split(",") if name]
    unknown = sorted({*args.names, *excluded} - set(names()))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(names())}")
    failed = []
    for name in args.names or names():
        if name in excluded:
            continue
        print(f"\n## {name}\n", flush=True)
        # What one benchmark leaves in memory or in threads shall not weigh on the next.
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"error: {', '.join(failed)} failed; see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
