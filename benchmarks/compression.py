"""What compression saves and costs, per number format: `python -m benchmarks.compression`.

Chunks are encoded as a cache would encode them: features of the demo teacher at its own resolution and at four times
that (chunks of a realistic size), and random ones of FLUX's width, whose numbers say nothing about each other. Writing
is compressing and `write` into a file; reading is `pread` and decompressing into a reused buffer; one thread, page
cache, MB of uncompressed bytes, the median of several rounds in turns.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from cache_schema.encoding.calibration import Moments
from cache_schema.encoding.number_formats import encode
from cache_schema.stores.compression import compress, decompress
from pipeline.build.config import BuildConfig
from pipeline.build.source import wanted_of
from pipeline.datasets import open_dataset
from pipeline.inputs.condition_store import ConditionStore
from pipeline.inputs.feature_source import teacher_features
from pipeline.teachers import load_teacher

RESULTS = Path(__file__).parent / "results"
KINDS = ("int8", "float8_e4m3", "bfloat16", "float32")
COMPRESSIONS = ("none", "zstd", "blosc:lz4", "blosc:zstd")
TIMESTEPS = (10, 16, 22, 28)


def demo_features(resolution: int | None, images: int) -> np.ndarray:
    """Features (n, 1, T, L, C) of the demo teacher at the default tap."""
    dataset = open_dataset("demo", None, images)
    teacher = load_teacher("demo", resolution=resolution, dtype=torch.float32, device="cpu")
    config = BuildConfig(timesteps=TIMESTEPS)
    sigmas = teacher.sigmas(config.num_steps)
    wanted = wanted_of(config, [sigmas[p - 1] for p in TIMESTEPS])
    chosen = [sample for sample in dataset.samples if sample.split == "train"][:images]
    parts = []
    with TemporaryDirectory() as folder:
        store = ConditionStore(Path(folder), teacher, dataset)
        store.prepare(chosen)
        for i in range(0, len(chosen), 4):
            conditions = {"canonical": store.read(chosen[i : i + 4], "canonical")}
            found = teacher_features(teacher, chosen[i : i + 4], conditions, wanted)
            parts.append(found["hidden"])
    return torch.cat(parts).float().numpy()


def random_features(samples: int) -> np.ndarray:
    """Gaussian features (n, 1, T, L, C) of FLUX's width, pooled 2x2 at 512², four channels 1000 times larger."""
    x = np.random.default_rng(0).standard_normal((samples, 1, len(TIMESTEPS), 256, 3072), dtype=np.float32)
    x[..., [5, 700, 1500, 3000]] *= 1000
    return x


def encoded_chunks(kind: str, features: np.ndarray) -> list[np.ndarray]:
    """The payload of every sample, view and timestep, as it would be stored."""
    moments = Moments(features.shape[2], features.shape[4])
    for sample in features:
        moments.add(sample)
    channel = moments.channel_amplitudes()
    payloads = [encode(kind, sample, channel).payload for sample in features]
    return [chunk.reshape(-1) for payload in payloads for chunk in payload.reshape(-1, *payload.shape[-2:])]


class Round:
    """Writes all chunks with one compression into a file and reads them back."""

    def __init__(self, compression: str, chunks: list[np.ndarray], folder: Path) -> None:
        self.compression, self.chunks = compression, chunks
        self.path = folder / compression.replace(":", "-")
        self.buffer = np.empty(chunks[0].nbytes, np.uint8)
        self.sizes: list[int] = []
        self.seconds: dict[str, list[float]] = {"write": [], "read": []}

    def run(self) -> None:
        """Write and read once."""
        started = time.perf_counter()
        with self.path.open("wb", buffering=0) as file:
            pieces = (
                chunk.view(np.uint8).data if self.compression == "none" else compress(chunk, self.compression)
                for chunk in self.chunks
            )
            self.sizes = [file.write(piece) for piece in pieces]
        self.seconds["write"].append(time.perf_counter() - started)
        fd = os.open(self.path, os.O_RDONLY)
        started, offset = time.perf_counter(), 0
        for size in self.sizes:
            if self.compression == "none":
                os.preadv(fd, [self.buffer.data], offset)
            else:
                decompress(os.pread(fd, size, offset), self.buffer, self.compression, str(self.path))
            offset += size
        self.seconds["read"].append(time.perf_counter() - started)
        os.close(fd)
        assert self.buffer.tobytes() == self.chunks[-1].tobytes()

    def result(self) -> dict[str, float | str]:
        """Share of bytes saved, MB/s of uncompressed bytes."""
        total = sum(chunk.nbytes for chunk in self.chunks)
        speeds = {f"{name}_mb_s": total / 1e6 / statistics.median(found) for name, found in self.seconds.items()}
        return {"compression": self.compression, "saved": 1 - sum(self.sizes) / total, **speeds}


def measure(name: str, features: np.ndarray, rounds: int) -> list[dict[str, float | str]]:
    """Every number format with every compression."""
    results = []
    for kind in KINDS:
        chunks = encoded_chunks(kind, features)
        with tempfile.TemporaryDirectory() as folder:
            contenders = [Round(compression, chunks, Path(folder)) for compression in COMPRESSIONS]
            for _ in range(rounds):
                for contender in contenders:
                    contender.run()
        shared = {"features": name, "kind": kind, "chunk_bytes": chunks[0].nbytes}
        results += [{**shared, **contender.result()} for contender in contenders]
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    sources = {
        "demo teacher, 48²": demo_features(None, args.images),
        "demo teacher, 192²": demo_features(192, max(4, args.images // 4)),
        "random, FLUX's width": random_features(4),
    }
    results = [record for name, features in sources.items() for record in measure(name, features, args.rounds)]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compression.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print("| features | format | chunk kB | compression | saved | write MB/s | read MB/s |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: |")
    for r in results:
        print(
            f"| {r['features']} | {r['kind']} | {r['chunk_bytes'] / 1e3:.0f} | {r['compression']} | "
            f"{100 * r['saved']:.1f} % | {r['write_mb_s']:,.0f} | {r['read_mb_s']:,.0f} |"
        )


if __name__ == "__main__":
    main()
