"""`dit-cache probe`."""

from pathlib import Path
from typing import Annotated

import typer

from cache_schema.options import Exposed
from cache_schema.settings import Values
from pipeline.commands.options import (
    ANNOTATIONS,
    CONDITIONS,
    DATASET,
    FORWARD,
    IMAGES,
    LIMIT,
    PRECISION,
    TEACHER,
    DebugOption,
    configured_by,
)
from pipeline.config import SETTINGS, configure
from pipeline.presets import run_folder

_ALL = "all"


def _read_timesteps(text: str) -> object:
    return text if text == _ALL else SETTINGS.accept("probe.timesteps", text)


@configured_by(
    DATASET, *IMAGES, ANNOTATIONS, LIMIT, *TEACHER, "probe.taps",
    Exposed("probe.timesteps", help="Timesteps to compare, or all of 1 to --num-steps.", reads=_read_timesteps),
    "probe.modulated", "probe.massive_channels", "probe.massive_factor",
    "probe.num_steps", "probe.images", "probe.per_class", "probe.split", "probe.cells", "probe.recommend",
    "probe.seed", "probe.batch", CONDITIONS, *PRECISION, *FORWARD, "teacher.offload", "teacher.compile",
)  # fmt: skip
def probe(
    given: Values,
    lora: Annotated[Path | None, typer.Option(help="LoRA of Stage I (folder or file).")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results; default runs/<dataset>/probe.")] = None,
    debug: DebugOption = False,
) -> None:
    """Compare taps and timesteps before caching: retrieval, linear separability, high-frequency ratio of each."""
    from pipeline.chain.steps import probe_teacher

    if given.get("probe.timesteps") == _ALL:
        del given["probe.timesteps"]
        steps = given.get("probe.num_steps", SETTINGS.field("probe.num_steps").default)
        given["probe.timesteps"] = list(range(1, steps + 1))
    config = configure(given)
    probe_teacher(config, lora, output or run_folder(config.data.name) / "probe")
