"""Recall of the student over seeds and variants: `python -m benchmarks.ablation --cache runs/demo/cache`.

Every variant is the demo preset with some settings changed; every run makes the same number of student updates. Runs
are made side by side, one thread each.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DEMO_CACHE = Path("runs/demo/cache")

PAPER = ["loss.drc_on=ed", "loss.cal=raw", "loss.cal_target=as_trained", "loss.stop_gradient=false",
         "gim.mask_student=0", "loss.alpha=1"]  # fmt: skip

# name → (what it shows, mode, settings on top of the demo preset)
VARIANTS: dict[str, tuple[str, str, list[str]]] = {
    "baseline": ("student alone, DRC", "baseline", []),
    "distill": ("the demo's defaults", "distill", []),
    "no-unlabelled": ("only the labelled images' features", "distill", ["unlabeled_per_batch=0"]),
    "drc-on-ed": ("DRC on E_D alone", "distill", ["loss.drc_on=ed"]),
    "unmasked": (
        "E_f always sees E_R; CAL's target too",
        "distill",
        ["gim.mask_student=0", "loss.cal_target=as_trained"],
    ),
    "paper": ("losses as the paper writes them, α = 1", "distill", ["unlabeled_per_batch=0", *PAPER]),
}


def run_one(name: str, seed: int, cache: Path, work: Path, preset: str, extra: list[str]) -> dict:
    """Train and evaluate one run (or read it, if it is there), and return its scores with its time."""
    _, mode, settings = VARIANTS[name]
    folder = work / f"{name}-{seed}"
    program = str(Path(sys.executable).parent / "dit-train")
    options = [o for s in [*settings, *extra, "threads=1"] for o in ("--set", s)]
    common = ["--cache", str(cache), "--preset", preset, "--mode", mode, "--seed", str(seed), "--output", str(folder)]
    if not (folder / "eval.json").exists():
        train = [program, "run", *common, "--overwrite", *options]
        for command in (train, [program, "eval", str(folder)]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scores = json.loads((folder / "eval.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    run = {"variant": name, "seed": seed, "seconds": result["seconds"], "updates": result["student_updates"]}
    return {**run, **scores["student"], "auxiliary": scores["auxiliary"]}


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation in percent; the bare value for one seed."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def table(records: list[dict]) -> str:
    """A Markdown table, one row per variant in the order of VARIANTS."""
    lines = ["| variant | what it is | seeds | R@1 % | R@8 % | mAP@R % | E_D R@1 % | E_D, E_R masked |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (about, _, _) in VARIANTS.items():
        mine = [r for r in records if r["variant"] == name]
        if not mine:
            continue
        cells = [spread([r[k] for r in mine]) for k in ("recall_at_1", "recall_at_8", "map_at_r")]
        for kind in ("unmasked", "masked"):
            found = [r["auxiliary"][kind]["mean"]["recall_at_1"] for r in mine if r.get("auxiliary")]
            cells.append(spread(found) if found else "–")
        lines.append(f"| {name} | {about} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="runs/demo/cache by default, skipped where `make demo` did not run")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--name", default="ablation", help="benchmarks/results/NAME.json")
    parser.add_argument(
        "--set", action="append", default=[], help="a setting for every run, which all of its methods must have"
    )
    args = parser.parse_args(argv)
    if args.cache is None and not (DEMO_CACHE / "manifest.json").exists():
        print(f"skipped: no cache at {DEMO_CACHE}; run `make demo` first")
        return
    args.cache = args.cache or DEMO_CACHE
    if not (args.cache / "manifest.json").exists():
        parser.error(f"no cache at {args.cache}: run `make demo` first, or name one with --cache")
    plan = [(name, seed) for seed in range(args.seeds) for name in args.variants.split(",")]
    records = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for record in pool.map(lambda p: run_one(*p, args.cache, args.work, args.preset, args.set), plan):
            records.append(record)
            print(f"{record['variant']} seed {record['seed']}: R@1 {100 * record['recall_at_1']:.1f} %", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(records, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
