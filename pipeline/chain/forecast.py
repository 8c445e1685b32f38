"""What a run would do, before it does anything: for each step its inputs, its result, bytes and hours.

No weights are loaded and nothing is written. Hours follow from speeds that the user gives or an unfinished step has
shown; what cannot be known from these is said to be unknown.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_schema.errors import CacheNotFound
from cache_schema.format.journal import committed_shards
from cache_schema.format.manifest_file import load_manifest
from cache_schema.storage.local import LocalFolder
from pipeline.chain.agreement import remarks_on_plan
from pipeline.chain.state import RunFolder, State, config_for, lora_for, output_of
from pipeline.config import RunConfig, Step
from pipeline.datasets.base import Dataset, split_counts
from pipeline.device import choose_device
from pipeline.estimate import sizes
from pipeline.opening import outline_of
from pipeline.probe.run import choose_samples

# Forward passes that a training step costs: backward is twice forward, and activations may be computed twice.
_PASSES_TRAINING, _PASSES_RECOMPUTING = 3, 4


@dataclass(frozen=True)
class Rates:
    """Speeds: images_per_second of the teacher in a build, all timesteps of a view; the others as they are named."""

    images_per_second: float | None = None
    refine_steps_per_second: float | None = None
    annotate_images_per_second: float | None = None


@dataclass(frozen=True)
class StepForecast:
    """One step. inputs, output: paths. work: in words. bytes: of the result, where known. hours: None if unknown."""

    step: Step
    state: str
    inputs: tuple[str, ...]
    output: str
    work: str
    bytes: int | None = None
    hours: float | None = None
    basis: str = ""
    differing: tuple[str, ...] = ()


def forecast(config: RunConfig, folder: Path, dataset: Dataset, rates: Rates) -> dict[str, Any]:
    """What `dit-cache run` would do, as plain JSON values. dataset: opened with `config.data`.

    Keys: `folder`, `dataset` (name, protocol, splits), `teacher`, `steps` (see `StepForecast`), `disk` and
    `conditions` (as in `pipeline.estimate.sizes.estimate`, or None), `hours` (of what is to do, in all), `unknown`
    (steps whose hours are not known), `warnings` (lines about what does not fit together).
    Raises what the steps would for taps or encodings that do not fit the teacher.
    """
    forecaster = _Forecaster(config, folder, dataset, rates)
    steps = [forecaster.step(state) for state in RunFolder(folder, config, dataset.samples).states()]
    left = [step for step in steps if step.state != "done"]
    building = any(step.step == "build" for step in left)
    return {
        "folder": str(folder),
        "dataset": {"name": dataset.name, "protocol": dataset.protocol, "splits": split_counts(dataset.samples)},
        "teacher": config.teacher.name,
        "steps": [asdict(step) for step in steps],
        "disk": forecaster.size["disk"] if building else None,
        "conditions": forecaster.size["conditions"] if building else None,
        "hours": sum(step.hours or 0.0 for step in left),
        "unknown": [step.step for step in left if step.hours is None],
        "warnings": remarks_on_plan(config, forecaster.outline, [step.step for step in left]),
    }


class _Forecaster:
    """One method per step, which returns what is known of it: work, bytes, hours and their basis.

    size: what `pipeline.estimate.sizes.estimate` says of the build.
    """

    def __init__(self, config: RunConfig, folder: Path, dataset: Dataset, rates: Rates) -> None:
        self.config, self.folder, self.dataset, self.rates = config, folder, dataset, rates
        speed = rates.images_per_second
        self.outline = outline = outline_of(config.teacher)
        described = "annotate" in config.steps and config.annotate.captions == "vlm"
        plan = sizes.plan_cache(outline, config.build, dataset, None, captions_differ=described)
        rate = None if speed is None else sizes.TeacherRate(speed, "given")
        self.size = sizes.estimate(plan, sizes.Demand(), output_of(folder, "build"), rate)
        self.asked = next(s for s in self.size["sizes"] if s["kind"] == config.build.encoding)

    def step(self, state: State) -> StepForecast:
        known = getattr(self, f"_{state.step}")(state)
        if state.name == "done":
            known |= {"hours": 0.0, "basis": "done"}
        return StepForecast(
            step=state.step,
            state=state.name,
            inputs=tuple(self._inputs(state.step)),
            output=str(state.output),
            differing=state.differing,
            **known,
        )

    def _inputs(self, step: Step) -> list[str]:
        if step == "verify":
            return [str(output_of(self.folder, "build"))]
        seen = config_for(self.config, self.folder, step)
        inputs = [f"data set {seen.data.name}" + (f" in {seen.data.root}" if seen.data.root else "")]
        inputs += [str(seen.data.annotations)] if seen.data.annotations else []
        inputs += [f"teacher {seen.teacher.name}"] if step != "annotate" else []
        lora = lora_for(self.config, self.folder) if step in ("probe", "build") else None
        return [*inputs, str(lora)] if lora else inputs

    def _annotate(self, state: State) -> dict[str, Any]:
        chosen, images, rate = self.config.annotate, len(self.dataset.samples), self.rates.annotate_images_per_second
        boxes = f"boxes by {chosen.detector}" if chosen.boxes == "detector" else f"boxes: {chosen.boxes}"
        captions = f"captions by {chosen.captioner}" if chosen.captions == "vlm" else f"captions: {chosen.captions}"
        work = f"{images:,} images; {boxes}; {captions}"
        if chosen.boxes != "detector" and chosen.captions != "vlm":
            return {"work": work, "hours": 0.0, "basis": "no model runs, images are read once"}
        if rate is None:
            return {"work": work, "basis": "--annotate-images-per-second"}
        return {"work": work, "hours": images / rate / 3600, "basis": "given"}

    def _refine(self, state: State) -> dict[str, Any]:
        chosen, rate = self.config.refine, self.rates.refine_steps_per_second
        step, seconds = _progress(state.output)
        left = chosen.steps - step
        images = chosen.batch * chosen.accumulate
        begun = f"{left:,} of {chosen.steps:,} steps" if step else f"{chosen.steps:,} steps"
        work = f"{begun} of {images} image{'' if images == 1 else 's'}, LoRA of rank {chosen.rank}"
        if rate is not None:
            return {"work": work, "hours": left / rate / 3600, "basis": "given"}
        if step:
            return {"work": work, "hours": left * seconds / step / 3600, "basis": f"measured over {step:,} steps"}
        if self._passes_per_second is None:
            return {"work": work, "basis": "--refine-steps-per-second or --images-per-second"}
        recomputing = chosen.gradient_checkpointing
        if recomputing is None:
            recomputing = choose_device(self.config.teacher.device).type == "cuda"
        passes = _PASSES_RECOMPUTING if recomputing else _PASSES_TRAINING
        hours = left * images * passes / self._passes_per_second / 3600
        return {"work": work, "hours": hours, "basis": f"about, a training step as {passes} forward passes"}

    def _probe(self, state: State) -> dict[str, Any]:
        chosen, images = self.config.probe, len(choose_samples(self.dataset, self.config.probe))
        taps = ", ".join(chosen.taps) or "every tap"
        work = f"{images} images at {len(chosen.timesteps)} timesteps, {taps}"
        if self._passes_per_second is None:
            return {"work": work, "basis": "--images-per-second"}
        hours = images * len(chosen.timesteps) / self._passes_per_second / 3600
        return {"work": work, "hours": hours, "basis": "about, as in the build"}

    def _build(self, state: State) -> dict[str, Any]:
        chosen, time = self.config.build, self.size["teacher_time"]
        reduced = [f"pool {chosen.pool}"] if chosen.pool > 1 else []
        reduced += [f"pca {chosen.pca}"] if chosen.pca else []
        work = (
            f"{self.size['rows']['features']:,} images × {', '.join(chosen.views)} × timesteps "
            f"{','.join(map(str, chosen.timesteps))}, {', '.join([chosen.encoding, *reduced])}"
        )
        known = {"work": work, "bytes": self.asked["total"]}
        if time is None:
            return {**known, "basis": "--images-per-second"}
        return {**known, "hours": time["hours"] * _share_left(state.output), "basis": "given"}

    def _verify(self, state: State) -> dict[str, Any]:
        return {
            "work": "every file against its checksum",
            "bytes": self.asked["total"],
            "hours": 0.0,
            "basis": "reads the cache once",
        }

    @property
    def _passes_per_second(self) -> float | None:
        """Forward passes of the teacher per second, one image at one timestep each; None if no speed is given."""
        speed = self.rates.images_per_second
        return None if speed is None else speed * len(self.config.build.timesteps)


def _progress(output: Path) -> tuple[int, float]:
    """The step of the newest checkpoint of Stage I and the seconds that it took; zeros where there is none."""
    from pipeline.refine.checkpoint import newest_progress

    found = newest_progress(output)
    return (found.step, found.seconds) if found else (0, 0.0)


def _share_left(cache: Path) -> float:
    """The share of a cache's feature shards that is still to be computed."""
    try:
        shards = load_manifest(LocalFolder(cache)).store.feature_shards
    except CacheNotFound:
        return 1.0
    return 1.0 - len(committed_shards(LocalFolder(cache), "features")) / max(1, shards)
