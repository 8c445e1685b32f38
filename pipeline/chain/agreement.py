"""What a build should be told before it costs days: where Stage I, the teacher and the build do not fit together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cache_schema.errors import DitDistillError
from cache_schema.format.vocabulary import ObjectCrop
from pipeline.config import RunConfig, TeacherOptions
from pipeline.opening import outline_of

if TYPE_CHECKING:
    from pipeline.teachers import TeacherOutline

# Step-distilled models were trained at the few noise levels of a short schedule.
_FEW_STEPS = 8


class Running(Protocol):
    """How a teacher runs, as far as it must agree with Stage I and the schedule; loaded or only planned."""

    @property
    def source(self) -> str: ...
    @property
    def guidance(self) -> float | None: ...
    @property
    def resolution(self) -> int: ...
    @property
    def crop(self) -> ObjectCrop: ...
    @property
    def step_distilled(self) -> bool: ...


@dataclass(frozen=True)
class Planned:
    """A teacher before it is loaded. Fulfils `Running`."""

    source: str
    guidance: float | None
    resolution: int
    crop: ObjectCrop
    step_distilled: bool


def planned(options: TeacherOptions, outline: "TeacherOutline | None" = None) -> Planned:
    """How the teacher of a configuration would run. outline: of it, if it is known already; raises TeacherError."""
    if outline is None:
        outline = outline_of(options)
    guidance = options.guidance if outline.architecture.guidance_embeds else None
    return Planned(outline.source, guidance, outline.resolution, options.crop, outline.step_distilled)


def remarks_on(teacher: Running, lora: Path | None, num_steps: int, asked: TeacherOptions | None = None) -> list[str]:
    """One line for each thing that runs but is not what one would want; nothing where all fits together.

    asked: how the teacher was to run, where that is known.
    """
    unread = [] if asked is None else _unread(teacher, asked)
    return [*unread, *_stage_one(teacher, lora), *_schedule(teacher, num_steps)]


def remarks_on_plan(config: RunConfig, outline: "TeacherOutline", steps: Sequence[str]) -> list[str]:
    """The same before any of these steps has begun, with what Stage I would be told.

    Raises DitDistillError for what Stage I would refuse.
    """
    teacher = planned(config.teacher, outline)
    remarks = _unread(teacher, config.teacher) if {"refine", "probe", "build"} & set(steps) else []
    if "refine" in steps:
        check_train_guidance(config, teacher)
        remarks += remarks_on_stage_one(teacher)
        trained = config.refine.train_guidance
        if trained is not None and trained != teacher.guidance:
            remarks.append(f"warning: Stage I runs with guidance {trained:g}, the build with {teacher.guidance:g}")
    schedules = {"probe": config.probe.num_steps, "build": config.build.num_steps}
    for said in (_schedule(teacher, count) for step, count in schedules.items() if step in steps):
        remarks += [line for line in said if line not in remarks]
    return remarks


def remarks_on_stage_one(teacher: Running) -> list[str]:
    """Where Stage I is not what one would want of this teacher."""
    if not teacher.step_distilled:
        return []
    return [
        f"warning: {teacher.source} is distilled to a few steps, and Stage I trains it at all noise levels; refine its "
        "base model"
    ]


def check_train_guidance(config: RunConfig, teacher: Running) -> None:
    """Raise DitDistillError where Stage I is told a guidance that the teacher does not read."""
    if config.refine.train_guidance is not None and teacher.guidance is None:
        raise DitDistillError(
            f"--train-guidance {config.refine.train_guidance:g}: the teacher {teacher.source} embeds no guidance; "
            "leave it out"
        )


def _unread(teacher: Running, asked: TeacherOptions) -> list[str]:
    """Guidance that was asked for of a teacher that embeds none."""
    if teacher.guidance is not None or asked.guidance == TeacherOptions.guidance:
        return []
    return [f"warning: --guidance {asked.guidance:g} changes nothing: the teacher {teacher.source} embeds no guidance"]


def _stage_one(teacher: Running, lora: Path | None) -> list[str]:
    if lora is None:
        return []
    from pipeline.teachers.lora import refined_with

    ours = {"guidance": teacher.guidance, "resolution": teacher.resolution, "crop": teacher.crop}
    return [
        f"warning: the LoRA {lora} was refined with {name} {theirs}, this runs with {name} {ours[name]}"
        for name, theirs in refined_with(lora).items()
        if theirs != ours[name]
    ]


def _schedule(teacher: Running, num_steps: int) -> list[str]:
    if not teacher.step_distilled or num_steps <= _FEW_STEPS:
        return []
    return [
        f"warning: {teacher.source} is distilled to a few steps and was not trained at the noise levels of "
        f"{num_steps}; use its base model, or --num-steps 4 --timesteps 1,2,3,4"
    ]
