"""What a build should be told before it costs days: where Stage I, the teacher and the build do not fit together."""

from pathlib import Path

from pipeline.teachers.base import AnyTeacher

# Step-distilled models were trained at the few noise levels of a short schedule.
_FEW_STEPS = 8


def remarks_on(teacher: AnyTeacher, lora: Path | None, num_steps: int) -> list[str]:
    """One line for each thing that runs but is not what one would want; nothing where all fits together."""
    return [*_stage_one(teacher, lora), *_schedule(teacher, num_steps)]


def _stage_one(teacher: AnyTeacher, lora: Path | None) -> list[str]:
    if lora is None:
        return []
    from pipeline.teachers.lora import refined_with

    ours = {"guidance": teacher.guidance, "resolution": teacher.resolution, "crop": teacher.crop}
    return [
        f"warning: the LoRA {lora} was refined with {name} {theirs}, this runs with {name} {ours[name]}"
        for name, theirs in refined_with(lora).items()
        if theirs != ours[name]
    ]


def _schedule(teacher: AnyTeacher, num_steps: int) -> list[str]:
    if not getattr(teacher, "step_distilled", False) or num_steps <= _FEW_STEPS:
        return []
    return [
        f"warning: {teacher.source} is distilled to a few steps and was not trained at the noise levels of "
        f"{num_steps}; use its base model, or --num-steps 4 --timesteps 1,2,3,4"
    ]
