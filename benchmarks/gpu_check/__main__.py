"""`python -m benchmarks.gpu_check`: one line a check, PASS or FAIL, with its seconds and the most memory it took."""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from cache_schema.devices import DeviceError, prepare_memory

# Before PyTorch is imported; and threads that wait for a core shall not keep one busy, as on a shared runner of CI.
prepare_memory()
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch  # noqa: E402

from benchmarks.gpu_check import environment, features, feeding, idle, loading, memory, processes, stage_one, training  # noqa: E402
from benchmarks.gpu_check.scene import Failed, NotHere, Scene, open_scene  # noqa: E402
from pipeline.teachers import quiet_libraries  # noqa: E402

CHECKS: tuple[tuple[str, Callable[[Scene], str]], ...] = (
    ("driver and device", environment.device),
    ("attention kernel", environment.attention),
    ("gradients of attention", environment.gradients),
    ("DiT, plain", features.plain),
    ("DiT with a LoRA", features.with_lora),
    ("DiT with int8 weights", features.int8),
    ("DiT compiled", features.compiled),
    ("DiT offloaded", features.offloaded),
    ("memory, predicted and measured", memory.predicted),
    ("out of memory in the second view", memory.second_view),
    ("a card of 24 GB", memory.small_card),
    ("idle between batches", idle.idle),
    ("Stage I, activations kept", stage_one.kept),
    ("Stage I, activations recomputed", stage_one.recomputed),
    ("Stage I goes on from a checkpoint", stage_one.resumed),
    ("page-locked loader with workers", loading.pinned),
    ("training step", training.step),
    ("a run fed from a cache", feeding.fed),
    ("DRC under autocast", training.drc),
    ("one process of NCCL", processes.collective),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="only checks whose name has one of these, comma-separated"
    )
    args = parser.parse_args(argv)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        try:
            scene = open_scene(args.device, Path(folder))
        except DeviceError as error:
            print(f"FAIL  device: {error}")
            return 1
        print(scene.title, flush=True)
        words = args.only.lower().split(",")
        chosen = [(name, check) for name, check in CHECKS if any(word.strip() in name.lower() for word in words)]
        failed = [name for name, check in chosen if not _run(scene, name, check)]
    print(f"{len(chosen) - len(failed)} of {len(chosen)} passed" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed or not chosen else 0


def _run(scene: Scene, name: str, check: Callable[[Scene], str]) -> bool:
    scene.begin()
    started = time.perf_counter()
    word, said = "PASS", ""
    try:
        said = check(scene)
    except NotHere as reason:
        word, said = "none", str(reason)
    except Failed as failure:
        word, said = "FAIL", str(failure)
    except Exception as error:  # noqa: BLE001
        # One check that breaks must not hide the others: this is where all of them are told.
        traceback.print_exc()
        word, said = "FAIL", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    seconds = time.perf_counter() - started
    print(f"{word}  {name:34} {seconds:6.1f} s  {scene.peak_gb():6.2f} GB  {said}", flush=True)
    return word != "FAIL"


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    sys.exit(main())
