"""Which runs an ablation is made of: the method, what it is held against, and sweeps of single settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import TrainConfig, UnlabelledFrom
from trainer.errors import TrainError
from trainer.methods.gcd.config import GcdConfig
from trainer.methods.registry import METHODS
from trainer.methods.settings import absolute, make_config, require_weights, settings_of
from trainer.reports.control_targets import PIXELS, TIMESTEP, WORDS, check_target, target_folder
from trainer.runs import SplitName

if TYPE_CHECKING:
    from cache_schema import Cache

BASELINE, AUXILIARY, FULL = "baseline", "auxiliary", "gcd"
UNLABELLED = 32  # rows per update of the controls without a teacher, where gcd takes none


@dataclass(frozen=True)
class Variant:
    """One row of a table: what it shows, the method and its settings on top of the preset."""

    name: str
    about: str
    method: str
    settings: tuple[str, ...] = ()
    cache: str | None = None  # another one than the ablation's
    target: str | None = None  # what is read in the features' place, of `control_targets`
    same_images: bool = False  # the baseline with the unlabelled images that gcd takes


@dataclass(frozen=True)
class Unlabelled:
    """What runs of gcd take of images without a label."""

    per_update: int = UNLABELLED
    images_from: UnlabelledFrom = "unlabeled"


@dataclass(frozen=True)
class Cell:
    """One run of an ablation; its folder's name says what it was made with, so that another config is another run."""

    variant: Variant
    config: TrainConfig

    @property
    def name(self) -> str:
        known = settings_of(self.config.method)
        free = known.resumable() - self.config.followed
        kept = {name: value for name, value in known.flat(self.config).items() if name not in free}
        # Where the cache lies does not change a run; that another one is read does.
        kept["cache"] = self.config.cache if self.variant.cache else ""
        if self.variant.target:
            kept["features"] = ""  # made from the cache, and where it was put
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.variant.name.replace('/', '-')}-seed{self.config.seed}-{digest}"


# The losses as the paper writes them.
_PAPER = (
    "loss.drc_on=ed", "loss.cal=raw", "loss.cal_target=as_trained", "loss.stop_gradient=false", "gim.mask_student=0",
    "loss.alpha=1", "loss.align=direct", "loss.share_proxies=true", "gim.residual=none", "gim.detach_student=false",
    "regression.weight=0", "unlabeled_per_batch=0",
)  # fmt: skip
# A control shows what it does to follow something else, however little that is worth.
_ALL_THE_SAME = "follow=always"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(BASELINE, "row ①: the student alone, DRC", "baseline"),
        Variant(AUXILIARY, "row ③: the teacher's features at test time too", "auxiliary"),
        Variant(FULL, "row ④: distilled through the GIM", "gcd"),
        Variant("regression", "control: the same features, plain regression", "regression"),
        Variant("crop-pixels", "control: no teacher, regression of the object's pixels", "regression",
                (_ALL_THE_SAME,), target=PIXELS),
        Variant("pixels-by-gim", "control: no teacher, the object's pixels through the GIM", FULL,
                (_ALL_THE_SAME,), target=PIXELS),
        Variant("caption-words", "control: no teacher, regression of the caption's words", "regression",
                ("regression.tokens=0", "regression.pooled=1", _ALL_THE_SAME), target=WORDS),
        Variant("relational", "control: the same features, similarities alone", "relational"),
        Variant("shuffled", "control: features of other images", "gcd", ("shuffle_features=true", _ALL_THE_SAME)),
        Variant("pseudo-labels", "control: no teacher, the unlabelled images by pseudo-labels", "baseline",
                ("unlabelled.by=pseudo",), same_images=True),
        Variant("consistency", "control: no teacher, the unlabelled images by consistency", "baseline",
                ("unlabelled.by=consistency",), same_images=True),
        Variant("no-unlabelled", "only the labelled images' features", "gcd", ("unlabeled_per_batch=0",)),
        Variant("drc-on-ed", "DRC on E_D alone", "gcd", ("loss.drc_on=ed",)),
        Variant("unmasked", "E_f always sees E_R; CAL's target too", "gcd",
                ("gim.mask_student=0", "loss.cal_target=as_trained")),
        Variant("paper", "losses as the paper writes them, α = 1", "gcd", _PAPER),
    )
}  # fmt: skip
NEED_UNLABELLED = ("pseudo-labels", "consistency", "no-unlabelled")
# What says which runs there are, and the option that it is chosen by.
_OF_OPTIONS = {"seed": "--seeds", "method": "--variants", "mode": "--variants", "cache": "--cache"}
BY_DEFAULT = (
    BASELINE, AUXILIARY, FULL, "regression", "crop-pixels", "pixels-by-gim", "caption-words", "relational", "shuffled",
    "pseudo-labels", "consistency", "no-unlabelled",
)  # fmt: skip
# Sweeps of the paper's tables by the letter it uses; those of `stages` and `tap` depend on the cache.
SWEEPS = {
    "k": "gim.queries=4/16/32/64",
    "n": "gim.bridge_layers=0/1/3/6",
    "alpha": "loss.alpha=0.1/0.3/1/3/10",
    "stages": "timesteps",
    "tap": "tap",
}


def choose_variants(
    cache: Cache,
    names: Sequence[str],
    sweeps: Iterable[str],
    random_teacher: str | None,
    unrefined_teacher: str | None = None,
    split: SplitName = "test",
    others: Iterable[str] = (),
    taken: Unlabelled = Unlabelled(),
) -> list[Variant]:
    """The variants asked for (by default all controls that the cache allows), and one for each value of each sweep.

    others: `NAME=CACHE`, gcd with the features of another cache of the same images. taken: by runs of gcd, as
    `unlabelled_of` says. The baseline is always among the variants. Raises TrainError for names and sweeps that do not
    exist, and for variants asked for that cannot be made.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise TrainError(f"variants: there is no {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    reasons = {name: _reason_against(cache, VARIANTS[name], split, taken) for name in names or BY_DEFAULT}
    refused = [reason for name, reason in reasons.items() if name in names and reason]
    if refused:
        raise TrainError(f"variants: {refused[0]}")
    variants = [
        VARIANTS[name] for name in dict.fromkeys([BASELINE, *(n for n, reason in reasons.items() if not reason)])
    ]
    variants = [_named_by_teacher(variant, cache) for variant in variants]
    if unrefined_teacher is not None:
        about = "row ②: a teacher that was not refined, at test time too"
        variants.insert(1, Variant("auxiliary-unrefined", about, "auxiliary", cache=unrefined_teacher))
    if random_teacher is not None:
        variants.append(
            Variant("random-teacher", "control: a teacher of random weights", "gcd", (_ALL_THE_SAME,), random_teacher)
        )
    variants += [_with_other_features(other) for other in others]
    return [*variants, *(variant for sweep in sweeps for variant in read_sweep(sweep, cache))]


def left_out(cache: Cache, split: SplitName = "test", taken: Unlabelled = Unlabelled()) -> list[str]:
    """Why controls that are made by default are not made on this cache, a line each."""
    reasons = (_reason_against(cache, VARIANTS[name], split, taken) for name in BY_DEFAULT)
    return [reason for reason in reasons if reason]


def _reason_against(cache: Cache, variant: Variant, split: SplitName, taken: Unlabelled) -> str | None:
    """Why a variant cannot be made of a cache, or would be another one again, if so."""
    of_split = variant.name in NEED_UNLABELLED and taken.images_from != "train"
    if of_split and "unlabeled" not in set(cache.samples["split"].to_pylist()):
        return (
            f"{variant.name} needs unlabelled images, and the cache has none; --set unlabeled_from=train takes the "
            "training images again, in another view"
        )
    if variant.name == "no-unlabelled" and not taken.per_update:
        return (
            "no-unlabelled would be gcd once more, which takes no unlabelled images here; --set unlabeled_per_batch=32 "
            "has it take some"
        )
    if variant.method == AUXILIARY and split == "test" and "test" not in cache.manifest.dataset.feature_splits:
        return (
            f"{variant.name} reads the features of test images, and the cache has none: build it with --features "
            "train,test (and unlabeled, where there are such images)"
        )
    if variant.target is not None:
        try:
            check_target(cache, variant.target)
        except TrainError as error:
            return str(error)
    return None


def _with_other_features(other: str) -> Variant:
    name, equals, cache = other.partition("=")
    if not (name and equals and cache) or name in VARIANTS:
        raise TrainError(
            f"other-features: write NAME=CACHE, with a name of its own, e.g. latents=runs/latents (got {other!r})"
        )
    return Variant(name, "the same with other features", FULL, (f"features={absolute(cache)}",))


def _named_by_teacher(variant: Variant, cache: Cache) -> Variant:
    """Which row of the paper the auxiliary is, ② or ③, depends on whether Stage I refined the cache's teacher."""
    if variant.name != AUXILIARY or cache.manifest.teacher.lora_digest is not None:
        return variant
    return replace(variant, about="row ②: the teacher's features at test time too (it was not refined)")


def read_sweep(text: str, cache: Cache | None = None) -> list[Variant]:
    """`gim.queries=4/16/32`, `timesteps=22/22,28`: one variant of gcd for each value between slashes.

    Or the name of one of `SWEEPS`, which go by what the cache has where they depend on it.
    """
    if text in SWEEPS and cache is not None:
        text = _sweep_of(text, cache)
    field, equals, values = text.partition("=")
    _refuse_option(field)
    settings_of(FULL).field(field.strip())
    if not equals or not all(values.split("/")):
        raise TrainError(
            f"sweep: write FIELD=VALUE/VALUE, e.g. gim.queries=4/16/32, or one of {', '.join(SWEEPS)} (got {text!r})"
        )
    settings = [f"{field.strip()}={value.strip()}" for value in values.split("/")]
    return [Variant(setting, "row ④ with this setting", FULL, (setting,)) for setting in settings]


def _sweep_of(name: str, cache: Cache) -> str:
    if name == "tap":
        return f"tap={'/'.join(tap.name for tap in cache.manifest.taps)}"
    if name == "stages":  # the clearest alone, then with the next noisier one, to all of them
        steps = sorted(cache.manifest.curriculum.timesteps)
        stages = [",".join(map(str, steps[first:])) for first in reversed(range(len(steps)))]
        return f"timesteps={'/'.join(stages)}"
    return SWEEPS[name]


def make_cells(
    cache: str,
    variants: Iterable[Variant],
    seeds: int,
    preset: str,
    settings: Sequence[str],
    targets: Mapping[str, Path] | None = None,
) -> list[Cell]:
    """Every variant with every seed, seed by seed; raises TrainError for what is no config.

    `settings` are for all runs whose method has the field, and lie below a variant's own. `targets`: where the targets
    of controls are, by kind, as `target_folders` says.
    """
    for setting in settings:
        _refuse_option(setting.partition("=")[0])
    shared = {method: [setting for setting in settings if _has(method, setting)] for method in METHODS}
    nobodys = [s for s in settings if not any(s in known for known in shared.values())]
    if nobodys:
        settings_of(FULL).field(nobodys[0].partition("=")[0].strip())  # says what is wrong with the name
    equal = _as_gcd(unlabelled_of(preset, settings))
    cells = []
    for seed in range(seeds):
        for variant in variants:
            own = [*(equal if variant.same_images else ()), *shared[variant.method]]
            given = [*own, *variant.settings, *_of_target(variant, targets or {})]
            where = variant.cache or cache
            config = make_config(preset, given, method=variant.method, seed=seed, cache=where)
            require_weights(config, preset)
            cells.append(Cell(variant, config))
    return cells


def unlabelled_of(preset: str, settings: Sequence[str]) -> Unlabelled:
    """What runs of gcd take of images without a label, by the settings of all runs."""
    config = _full(preset, [setting for setting in settings if _has(FULL, setting)])
    return Unlabelled(config.unlabeled_per_batch, config.unlabeled_from)


def _as_gcd(taken: Unlabelled) -> tuple[str, ...]:
    """What has a baseline take the unlabelled images that a run of gcd takes, as many per update."""
    return f"unlabelled.per_batch={taken.per_update or UNLABELLED}", f"unlabelled.images_from={taken.images_from}"


def _full(preset: str, settings: Sequence[str]) -> GcdConfig:
    config = make_config(preset, settings, method=FULL)
    assert isinstance(config, GcdConfig)
    return config


def check_other_caches(own: Cache, cells: Iterable[Cell], allow_partial: bool = False) -> None:
    """Open what cells read beside the ablation's cache, before a run is made; raises what opening raises, TrainError.

    A control that cannot be made is to be known of before the hours that the others take.
    """
    from cache_schema import open_cache
    from trainer.data.features import match_samples, open_sources
    from trainer.methods.registry import find_method

    for cell in {cell.variant.name: cell for cell in cells}.values():
        config, variant, cache = cell.config, cell.variant, own
        if variant.cache is not None:
            cache = open_cache(variant.cache, allow_partial=allow_partial)
            lacking = int((match_samples(own, cache) < 0).sum())
            if lacking:
                raise TrainError(
                    f"{variant.name}: {variant.cache} lacks {lacking} of the {len(own.samples)} images of "
                    f"{own.manifest.label}; it must be of the same images"
                )
        elif getattr(config, "features", None) is None or variant.target is not None:
            continue
        open_sources(cache, find_method(config.method).needs(config))


def target_folders(cache: Cache, variants: Iterable[Variant], output: Path) -> dict[str, Path]:
    """Where the targets that variants regress are to be, by kind."""
    kinds = dict.fromkeys(variant.target for variant in variants if variant.target)
    return {kind: target_folder(output, cache, kind) for kind in kinds}


def _of_target(variant: Variant, targets: Mapping[str, Path]) -> list[str]:
    """What makes a run regress another target; whatever all runs are told of taps and timesteps is not of this one."""
    if variant.target is None:
        return []
    told = f"features={targets[variant.target]}", f"tap={variant.target}"
    return [*told, f"timesteps={TIMESTEP}", "timesteps_per_step=none"]


def _refuse_option(field: str) -> None:
    """Raise TrainError for a field that is not the same in all runs, or not to be varied beside what varies."""
    option = _OF_OPTIONS.get(field.strip())
    if option is not None:
        raise TrainError(f"{field.strip()} is chosen by {option}: a setting would make rows of the table the same run")


def _has(method: str, setting: str) -> bool:
    return setting.partition("=")[0].strip() in settings_of(method).fields
