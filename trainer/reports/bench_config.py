"""The settings of `dit-train bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cache_schema.fields import Setting, check_limits
from cache_schema.settings import Settings
from trainer.errors import TrainError


@dataclass(frozen=True)
class BenchConfig:
    """How inference is timed."""

    batch: Annotated[
        int, Setting("Images at once where throughput is measured; latency is always of one.", least=1)
    ] = 64
    seconds: Annotated[float, Setting("Of measuring, for each line and batch.", above=0)] = 5.0
    warmup: Annotated[int, Setting("Calls before, which do not count.", least=1)] = 5
    precision: Annotated[Literal["float32", "bfloat16"], Setting("Of the forward pass; scores are of float32.")] = (
        "float32"
    )
    threads: Annotated[int | None, Setting("Of torch; its own choice by default.", least=1)] = None
    device: Annotated[str, Setting("auto, cpu, cuda, …")] = "auto"

    def __post_init__(self) -> None:
        check_limits(self, TrainError)


BENCH = Settings(BenchConfig, command="dit-train bench", example="batch=256", error=TrainError)
