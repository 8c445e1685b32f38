"""How the cost of a cache grows with its samples: building, verifying, opening and reading 1 k, 10 k and 100 k of them.

`python -m benchmarks.scaling`. Small features (T=4, 16 tokens, 32 channels, int8) and small images, so that what is
counted is the work per sample and per shard, not the bytes. Every step runs in a process of its own, whose peak memory
(ru_maxrss) is given in all and beyond what importing the same modules takes. Prints a table, writes
benchmarks/results/scaling.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TOKENS, CHANNELS, TIMESTEPS, BATCH = 16, 32, (10, 16, 22, 28), 32
COLUMNS = ("build_s", "verify_s", "open_s", "samples_per_s", "build_mb", "verify_mb", "open_mb", "read_mb")


def build(folder: Path, samples: int) -> dict[str, float]:
    """Write and seal a cache of random features and images."""
    import numpy as np

    from cache_schema import (
        Curriculum,
        DatasetInfo,
        Encoding,
        ImagesInfo,
        TapInfo,
        TeacherInfo,
        create_cache,
        fingerprint_samples,
        plan_manifest,
        samples_table,
    )

    started = time.perf_counter()
    table = samples_table(
        {"id": f"class-{i % 200:03d}/{i:07d}", "split": "train", "label": i % 200, "class_name": f"class {i % 200}",
         "source": f"images/{i:07d}.jpg", "sha256": f"{i:064x}", "width": 500, "height": 375,
         "box": [1.0, 2.0, 300.0, 200.0], "caption": f"a bird with {i % 977} feathers and a beak of {i % 31} mm"}
        for i in range(samples)
    )  # fmt: skip
    manifest = plan_manifest(
        dataset=DatasetInfo(name="random", protocol="none", fingerprint=fingerprint_samples(table), superclass="bird",
                            counts={"train": samples}, feature_splits=["train"], feature_rows=samples),
        teacher=TeacherInfo(family="none", source="random", pipeline_class="none", digests={}, dtype="float32",
                            resolution=64, text="none"),
        curriculum=Curriculum(num_steps=28, timesteps=list(TIMESTEPS), sigmas=[0.8, 0.6, 0.4, 0.1], seed=0),
        taps=[TapInfo(name="hidden", tokens=TOKENS, channels=CHANNELS, grid=(4, 4))],
        encoding=Encoding(kind="int8"), views=["canonical"], images=ImagesInfo(size=32, format="png"),
        image_rows=samples, samples_per_shard=256,
    )  # fmt: skip
    writer = create_cache(folder, manifest, table)
    rng = np.random.default_rng(0)
    shape = (1, len(TIMESTEPS), TOKENS, CHANNELS)
    block = rng.standard_normal((256, *shape), dtype=np.float32)
    writer.calibrate({"hidden": block[:64]})
    for k in writer.missing_shards():
        writer.write_shard(k, {"hidden": np.roll(block, k, axis=0)[: len(writer.shard_rows(k))]})
    image = rng.bytes(1000)
    for k in writer.missing_image_shards():
        writer.write_images(k, [image] * len(writer.image_rows(k)))
    writer.seal()
    return {"build_s": time.perf_counter() - started}


def verify(folder: Path, samples: int) -> dict[str, float]:
    """Check every byte of the cache."""
    from cache_schema.care.verify import verify as check

    started = time.perf_counter()
    assert check(folder) == []
    return {"verify_s": time.perf_counter() - started}


def opening(folder: Path, samples: int) -> dict[str, float]:
    """Open the cache, count its samples, load their table, read a first batch."""
    import torch  # noqa: F401

    from cache_schema import open_cache

    started = time.perf_counter()
    cache = open_cache(folder)
    assert len(cache) == samples == cache.samples.num_rows
    cache.read([samples - 1])
    return {"open_s": time.perf_counter() - started}


def read(folder: Path, samples: int) -> dict[str, float]:
    """Read random batches from everywhere until every shard was seen many times, the second half with a clock."""
    import numpy as np

    from cache_schema import open_cache

    cache = open_cache(folder)
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, samples, BATCH) for _ in range(2000)]
    for rows in batches[:1000]:
        cache.read(rows)
    started = time.perf_counter()
    for rows in batches[1000:]:
        cache.read(rows)
    return {"samples_per_s": 1000 * BATCH / (time.perf_counter() - started)}


STEPS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "build": build, "verify": verify, "open": opening, "read": read,
}  # fmt: skip


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _run_step(step: str, folder: Path, samples: int) -> None:
    """In a process of its own: run one step and print what it took as JSON."""
    import numpy  # noqa: F401
    import torch  # noqa: F401

    import cache_schema.care.verify
    import cache_schema.reading.reader
    import cache_schema.writing.writer  # noqa: F401

    imported = _peak_mb()
    measured = STEPS[step](folder, samples)
    peak = _peak_mb()
    print(json.dumps({**measured, f"{step}_mb": peak - imported, f"{step}_total_mb": peak}))


def measure(folder: Path, samples: int) -> dict[str, float]:
    """Run all steps for one number of samples; seconds, MB, samples per second."""
    row: dict[str, float] = {"samples": samples}
    for step in STEPS:
        command = [sys.executable, "-m", "benchmarks.scaling", "--step", step, "--folder", str(folder)]
        done = subprocess.run([*command, "--samples", str(samples)], stdout=subprocess.PIPE, text=True, check=True)
        row |= json.loads(done.stdout)
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", default="1000,10000,100000", help="Numbers of samples, with commas.")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        _run_step(args.step, args.folder, int(args.samples))
        return
    rows = []
    for samples in (int(number) for number in args.samples.split(",")):
        with tempfile.TemporaryDirectory() as place:
            rows.append(measure(Path(place) / "cache", samples))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"| samples | {' | '.join(COLUMNS)} |\n| ---: |{' ---: |' * len(COLUMNS)}")
    for row in rows:
        print(f"| {row['samples']:,.0f} | {' | '.join(f'{row[name]:,.2f}' for name in COLUMNS)} |")


if __name__ == "__main__":
    main()
