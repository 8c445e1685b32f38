"""Where a finished step left its result and the command that goes on from there, as its last line."""

import shlex
from pathlib import Path

from pipeline.config import RunConfig, Step, TeacherOptions


def next_line(done: Step, config: RunConfig, output: Path, lora: Path | None = None) -> str:
    """What to do after a step of its own, whose result is at `output`. lora: the one that a probe looked through."""
    if done in ("build", "verify"):
        return f"the cache is in {output}; next: {_command('dit-train', 'run', {'--cache': output})}"
    images, teacher = data_options(config), teacher_options(config)
    if done == "annotate":
        images["--annotations"] = output
        return f"the annotations are in {output}; next: {_command('dit-cache', 'refine', images | teacher)}"
    build = images | teacher | {"--lora": output if done == "refine" else lora}
    if done == "refine":
        return f"the LoRA is in {output}; next: {_command('dit-cache', 'build', build)}"
    return f"the probe is in {output}; next, with the taps and timesteps above: {_command('dit-cache', 'build', build)}"


def data_options(config: RunConfig) -> dict[str, object]:
    """The options that choose the same images; None where one is not needed."""
    data = config.data
    return {
        "--dataset": data.name,
        "--data": data.root,
        "--limit": data.limit,
        "--train-classes": None if data.train_classes is None else ",".join(data.train_classes),
        "--train-ratio": data.train_ratio,
        "--superclass": data.superclass,
        "--annotations": data.annotations,
    }


def teacher_options(config: RunConfig) -> dict[str, object]:
    """The options that choose the same teacher, seeing the same pixels; None where one is not needed."""
    teacher = config.teacher
    return {
        "--teacher": teacher.name,
        "--revision": teacher.revision,
        "--resolution": teacher.resolution,
        "--guidance": None if teacher.guidance == TeacherOptions.guidance else teacher.guidance,
        "--context": teacher.context,
        "--input": None if teacher.input == "object" else teacher.input,
        "--crop": None if teacher.crop == "box" else teacher.crop,
    }


def _command(program: str, command: str, options: dict[str, object]) -> str:
    words = [str(word) for option, value in options.items() if value is not None for word in (option, value)]
    return shlex.join([program, command, *words])
