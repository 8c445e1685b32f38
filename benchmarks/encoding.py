"""How long features take to become stored bytes, side by side with the same formats in plain NumPy and PyTorch.

`python -m benchmarks.encoding`. One sample (4, 256, 768) at a time, 32 samples in turn so that none is in a cache, one
core. The contenders compute what the formats' definition says, a pass over the array for every step; their bytes are
compared with ours before anything is timed.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import in_turns, save, table
from benchmarks.synthetic import INT8, Workload, features
from cache_schema.encoding.number_formats import Array, encode

SAMPLES = 32
# Format → the largest number of a token.
PEAKS = {"int8": 127.0, "float8_e4m3": 448.0}
INPUTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def in_numpy(kind: str, sample: Tensor, channel: Array) -> Array:
    """Return a sample's payload, computed with NumPy as far as that knows the types."""
    x = sample.float().numpy()
    if not np.isfinite(x).all():
        raise ValueError("features are not finite")
    if kind == "bfloat16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    calibrated = x * (1 / channel)[:, None]
    scale = np.abs(calibrated).max(axis=-1, keepdims=True) / np.float32(PEAKS[kind])
    scaled = calibrated / scale
    if kind == "int8":
        return np.rint(scaled).astype(np.int8)
    return torch.from_numpy(scaled.clip(-448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def in_torch(kind: str, sample: Tensor, channel: Array) -> Array:
    """Return a sample's payload, computed with PyTorch."""
    x = sample.float()
    if not x.isfinite().all():
        raise ValueError("features are not finite")
    if kind == "bfloat16":
        return x.to(torch.bfloat16).view(torch.uint16).numpy()
    calibrated = x * torch.from_numpy(1 / channel)[:, None]
    scaled = calibrated / (calibrated.abs().amax(-1, keepdim=True) / PEAKS[kind])
    if kind == "int8":
        return scaled.round().to(torch.int8).numpy()
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def ours(kind: str, sample: Tensor, channel: Array) -> Array:
    """Return a sample's payload as a cache stores it."""
    return encode(kind, sample, channel).payload  # type: ignore[arg-type]


CONTENDERS: dict[str, Callable[[str, Tensor, Array], Array]] = {"ours": ours, "numpy": in_numpy, "torch": in_torch}


def measure(workload: Workload, kind: str, given: str, rounds: int) -> dict[str, Any]:
    """Measure one format from one type of features; return milliseconds per sample."""
    samples = [torch.from_numpy(features(workload, [i])[0]).to(INPUTS[given]) for i in range(SAMPLES)]
    channel = (0.5 + np.arange(workload.channels * len(workload.timesteps)) % 7).astype(np.float32)
    channel = channel.reshape(len(workload.timesteps), -1)
    expected = ours(kind, samples[0], channel)
    for name, contender in CONTENDERS.items():
        found = contender(kind, samples[0], channel)
        # 1 / channel and 1 / scale may be rounded otherwise, which moves a number in a million by one step.
        if (found != expected).mean() > 1e-3:
            raise ValueError(f"{name} does not encode {kind} as it is defined")

    def all_samples(contender: Callable[[str, Tensor, Array], Array]) -> None:
        for sample in samples:
            contender(kind, sample, channel)

    calls = {name: (lambda contender=contender: all_samples(contender)) for name, contender in CONTENDERS.items()}
    seconds = in_turns(calls, rounds)
    took = {name: 1e3 * statistics.median(found) / SAMPLES for name, found in seconds.items()}
    return {"format": kind, "features": given, "milliseconds": took}


def render(results: list[Mapping[str, Any]]) -> str:
    """Return the Markdown table."""
    rows = []
    for result in results:
        took = result["milliseconds"]
        ratios = [f"{took[name] / took['ours']:.1f}" for name in ("numpy", "torch")]
        rows.append([result["format"], result["features"], *(f"{took[name]:.2f}" for name in CONTENDERS), *ratios])
    header = ["format", "from", "ours, ms", "NumPy, ms", "PyTorch, ms", "NumPy / ours", "PyTorch / ours"]
    return table(header, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoding", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a tiny workload, to see that everything works")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    workload = Workload("int8", tokens=8, channels=16) if args.small else INT8
    pairs = itertools.product(("int8", "float8_e4m3", "bfloat16"), INPUTS)
    results = [measure(workload, kind, given, args.rounds) for kind, given in pairs]
    print(render(results))
    if not args.small:
        save("encoding", {"workload": str(workload), "rounds": args.rounds, "results": results})


if __name__ == "__main__":
    main()
