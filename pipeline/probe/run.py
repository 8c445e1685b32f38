"""Which taps and timesteps are worth caching: every tap at every timestep, judged without training anything."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cache_schema.encoding.calibration import Moments
from cache_schema.errors import DitDistillError
from cache_schema.format.vocabulary import MassiveChannels
from cache_schema.storage.files import write_file
from pipeline.curriculum import DEFAULT_TIMESTEPS
from pipeline.datasets.base import Dataset, Sample
from pipeline.inputs.condition_store import ConditionStore, default_store
from pipeline.inputs.feature_source import DiffusionSource, EncoderSource, FeatureSource, Wanted
from pipeline.inputs.framing import Framing
from pipeline.inputs.pictures import save_picture
from pipeline.probe.config import ProbeConfig
from pipeline.probe.picture import draw_heat_maps
from pipeline.probe.scores import (
    Score,
    high_frequency_ratio,
    linear_accuracy,
    pool_cells,
    recall_at_1,
    standardise,
    treat_places,
)
from pipeline.teachers.base import AnyTeacher, Teacher, input_of, is_image_encoder
from pipeline.teachers.passes import memory_errors

# Farther below the best than this many standard errors, the default is worth a warning.
_CLEAR = 2.0


@dataclass(frozen=True)
class Usual:
    """What a build would cache without the advice, which is held against it: its taps are always compared."""

    taps: tuple[str, ...] = ("hidden",)
    timesteps: tuple[int, ...] = DEFAULT_TIMESTEPS
    massive: MassiveChannels = "keep"


USUAL = Usual()


@dataclass(frozen=True)
class Advice:
    """What to cache. default_recall and recall: mean R@1 over the timesteps of the default and of the advice."""

    tap: str
    timesteps: tuple[int, ...]
    recall: float
    default_recall: float | None
    warning: str | None
    massive: MassiveChannels = "keep"

    @property
    def options(self) -> str:
        """The advice as options to type."""
        massive = "" if self.massive == "keep" else f" --massive-channels {self.massive}"
        return f"--taps {self.tap} --timesteps {','.join(map(str, self.timesteps))}{massive}"


def probe(
    teacher: AnyTeacher,
    dataset: Dataset,
    config: ProbeConfig,
    output: Path,
    *,
    conditions: Path | None = None,
    usual: Usual = USUAL,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score every tap at every timestep, print a table, write probe.json and probe.png to `output`.

    Returns what is written to probe.json. conditions: folder of the `ConditionStore`, by default beside `output`.
    Raises DitDistillError where the data set has too few labelled images.
    """
    taps = config.taps or _all_taps(teacher, config, usual)
    for tap in taps:
        teacher.tap_shape(tap)
    samples = choose_samples(dataset, config)
    source_at = _sources(teacher, dataset, taps, conditions or default_store(output), config.seed)
    source_at(0.0).prepare(samples, log=log)
    scores = score_all(teacher, source_at, samples, taps, config)
    advice = advise(scores, config, len(samples), usual)
    classes = len({s.label for s in samples})
    record: dict[str, Any] = {
        "dataset": dataset.name,
        "teacher": teacher.source,
        "refined": teacher.lora is not None,
        "context": teacher.context,
        "crop": teacher.crop,
        "quantization": teacher.quantization,
        "config": asdict(config),
        "images": len(samples),
        "classes": classes,
        "scores": [asdict(score) for score in scores],
        "advice": asdict(advice),
    }
    write_file(output / "probe.json", (json.dumps(record, indent=2) + "\n").encode())
    save_picture(draw_heat_maps(scores), output / "probe.png")
    log(render_table(scores))
    log(
        f"{len(samples)} images of {classes} classes of the split {config.split}; chance: {100 / classes:.1f} %, "
        f"one standard error {100 * standard_error(advice.recall, len(samples)):.1f} points"
    )
    log(f"recommended: {advice.options}")
    if advice.warning:
        log(f"warning: {advice.warning}")
    log(f"wrote {output / 'probe.json'} and {output / 'probe.png'}")
    return record


def _all_taps(teacher: AnyTeacher, config: ProbeConfig, usual: Usual) -> tuple[str, ...]:
    """Every tap, in running order; of the modulated ones, unless all are wanted, those that a build would take."""
    wanted = {*teacher.taps(config.modulated), *usual.taps}
    return tuple(tap for tap in teacher.taps(modulated=True) if tap in wanted)


def choose_samples(dataset: Dataset, config: ProbeConfig) -> list[Sample]:
    """`per_class` images of evenly spread classes, in the data set's order. Raises if there are too few."""
    by_class: dict[int, list[Sample]] = {}
    for sample in dataset.samples:
        if sample.split == config.split and sample.label >= 0:
            by_class.setdefault(sample.label, []).append(sample)
    full = [members for _, members in sorted(by_class.items()) if len(members) >= config.per_class]
    wanted = min(len(full), max(2, config.images // config.per_class))
    if wanted < 2:
        raise DitDistillError(
            f"probing needs 2 classes with {config.per_class} images each; the split {config.split} of {dataset.name} "
            f"has {len(full)}; choose a smaller --per-class or another --split"
        )
    chosen = [full[round(i * (len(full) - 1) / (wanted - 1))] for i in range(wanted)]
    return [members[round(i * (len(members) - 1) / (config.per_class - 1))] for members in chosen
            for i in range(config.per_class)]  # fmt: skip


def _sources(
    teacher: AnyTeacher, dataset: Dataset, taps: Sequence[str], conditions: Path, seed: int
) -> Callable[[float], FeatureSource]:
    """What computes the features at a noise level, of the taps and the canonical view."""

    framing = Framing(input_of(teacher), object_crop=teacher.crop)

    def wanted(sigma: float) -> Wanted:
        return Wanted(tuple(taps), ("canonical",), (sigma,), seed, framing)

    if is_image_encoder(teacher):
        encoder = teacher
        return lambda sigma: EncoderSource(encoder, dataset, wanted(sigma))
    diffusion = cast(Teacher, teacher)
    store = ConditionStore(conditions, diffusion, dataset, framing=framing)
    return lambda sigma: DiffusionSource(diffusion, store, wanted(sigma))


@torch.no_grad()
def score_all(
    teacher: AnyTeacher,
    source_at: Callable[[float], FeatureSource],
    samples: Sequence[Sample],
    taps: Sequence[str],
    config: ProbeConfig,
) -> list[Score]:
    """Score timestep after timestep, so that the features of only one are in memory, taps × images × cells² × C.

    source_at: what computes the features at a noise level; samples: prepared there. Raises DitDistillError, naming the
    image, where features are NaN or infinite: scores that count them would mean nothing.
    """
    sigmas = teacher.sigmas(config.num_steps)
    labels = np.array([s.label for s in samples])
    batches = [samples[i : i + config.batch] for i in range(0, len(samples), config.batch)]
    scores = []
    with tqdm(total=len(samples) * len(config.timesteps), desc="probe", unit="image") as bar:
        for p in config.timesteps:
            source = source_at(sigmas[p - 1])
            pooled: dict[str, list[Tensor]] = {tap: [] for tap in taps}
            energy: dict[str, list[float]] = {tap: [] for tap in taps}
            moments = {tap: Moments(1, teacher.tap_shape(tap).channels) for tap in taps}
            for batch in batches:
                with memory_errors(f"in a forward pass of {len(batch)} images", "use a smaller --batch"):
                    found = source.compute(batch, source.read(batch))
                for tap, tokens in found.items():
                    tokens = tokens[:, 0, 0]  # one view, one timestep: (B, L, C)
                    grid = teacher.tap_shape(tap).grid
                    # Not in 16 bits: channels near 70 000 are common in deep blocks, and float16 ends below.
                    pooled[tap].append(pool_cells(tokens.float(), grid, config.cells).cpu())
                    _check_finite(pooled[tap][-1], batch, f"tap {tap} at timestep {p}")
                    energy[tap] += high_frequency_ratio(tokens.float(), grid).tolist()
                    if config.massive_channels != ("keep",):
                        moments[tap].add(tokens.float().cpu().numpy()[:, None])
                bar.update(len(batch))
            for tap in taps:
                kept = torch.cat(pooled[tap]).numpy()
                for kind in config.treatments:
                    plain = kept
                    if kind != "keep":
                        plain = treat_places(kept, moments[tap].treatment(kind, config.massive_factor))
                    features = standardise(plain)
                    scores.append(
                        Score(
                            tap=tap,
                            timestep=p,
                            recall_at_1=recall_at_1(features, labels),
                            linear=linear_accuracy(features, labels),
                            high_frequency=float(np.mean(energy[tap])),
                            massive=kind,
                            plain_recall_at_1=recall_at_1(plain, labels),
                        )
                    )
    return scores


def _check_finite(pooled: Tensor, batch: Sequence[Sample], where: str) -> None:
    """Raise unless the features (B, D) of a batch are finite; a mean over tokens is not where one of them is not."""
    wrong = (~torch.isfinite(pooled).all(dim=1)).nonzero().flatten().tolist()
    if wrong:
        raise DitDistillError(
            f"{batch[wrong[0]].source}: the teacher's features are NaN or infinite: {where}; use --dtype bfloat16 or "
            "float32, or leave the image out"
        )


def standard_error(share: float, count: int) -> float:
    """The standard error of a share of `count` images; never 0, for a share of 0 or 1 is not certain either."""
    inside = min(max(share, 1 / count), 1 - 1 / count)
    return math.sqrt(inside * (1 - inside) / count)


def advise(scores: Sequence[Score], config: ProbeConfig, images: int, usual: Usual = USUAL) -> Advice:
    """The tap whose best timesteps retrieve best on average, and these timesteps, from coarse to fine."""
    table = {(s.name, s.timestep): s.recall_at_1 for s in scores}
    taps = list(dict.fromkeys(s.name for s in scores))
    named = {s.name: s for s in scores}
    count = min(config.recommend, len(config.timesteps))

    def best_steps(tap: str) -> list[int]:
        return sorted(sorted(config.timesteps, key=lambda p: (-table[tap, p], p))[:count])

    def mean(tap: str, steps: Sequence[int]) -> float:
        return sum(table[tap, p] for p in steps) / len(steps)

    tap = max(taps, key=lambda t: mean(t, best_steps(t)))
    steps = best_steps(tap)
    default = [p for p in usual.timesteps if p in config.timesteps]
    known = [s.name for s in scores if s.tap == usual.taps[0] and s.massive == usual.massive]
    default_recall = mean(known[0], default) if known and default else None
    warning = None
    recall = mean(tap, steps)
    if default_recall is not None and recall - default_recall > _CLEAR * standard_error(recall, images):
        warning = (
            f"the default --taps {usual.taps[0]} --timesteps {','.join(map(str, default))} has a mean R@1 of "
            f"{100 * default_recall:.1f} %, the recommended choice {100 * recall:.1f} %"
        )
    return Advice(named[tap].tap, tuple(steps), recall, default_recall, warning, named[tap].massive)


def render_table(scores: Sequence[Score]) -> str:
    """R@1 / linear accuracy in % and the high-frequency ratio: a line per tap, a column per timestep."""
    taps, steps = list(dict.fromkeys(s.name for s in scores)), sorted({s.timestep for s in scores})
    width = max(12, *map(len, taps))
    table = {(s.name, s.timestep): s for s in scores}
    blocks = []
    for title, show in (
        ("R@1 %, k-NN", lambda s: f"{100 * s.recall_at_1:6.1f}"),
        ("R@1 %, k-NN of features that are not standardised", lambda s: f"{100 * s.plain_recall_at_1:6.1f}"),
        ("linear accuracy %, leave-one-out ridge", lambda s: f"{100 * s.linear:6.1f}"),
        ("high-frequency ratio", lambda s: f"{s.high_frequency:6.3f}"),
    ):
        head = f"{'tap':<{width}}" + "".join(f"  p={p:<4}" for p in steps)
        lines = [f"{tap:<{width}}" + "".join(f" {show(table[tap, p])}" for p in steps) for tap in taps]
        blocks.append("\n".join([title, head, *lines]))
    return "\n\n".join(blocks)
