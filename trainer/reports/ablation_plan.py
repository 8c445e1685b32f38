"""Which runs an ablation is made of: the method, what it is held against, and sweeps of single settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config import TrainConfig
from trainer.errors import TrainError
from trainer.methods.registry import METHODS
from trainer.methods.settings import make_config, settings_of

if TYPE_CHECKING:
    from cache_schema import Cache

BASELINE, FULL = "baseline", "gcd"
UNLABELLED = 32  # rows per update of the control without a teacher, where gcd's own preset says nothing


@dataclass(frozen=True)
class Variant:
    """One row of a table: what it shows, the method and its settings on top of the preset."""

    name: str
    about: str
    method: str
    settings: tuple[str, ...] = ()
    cache: str | None = None  # another one than the ablation's


@dataclass(frozen=True)
class Cell:
    """One run of an ablation; its folder's name says what it was made with, so that another config is another run."""

    variant: Variant
    config: TrainConfig

    @property
    def name(self) -> str:
        known = settings_of(self.config.method)
        kept = {name: value for name, value in known.flat(self.config).items() if name not in known.resumable()}
        # Where the cache lies does not change a run; that another one is read does.
        kept["cache"] = self.config.cache if self.variant.cache else ""
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.variant.name.replace('/', '-')}-seed{self.config.seed}-{digest}"


# The losses as the paper writes them.
_PAPER = (
    "loss.drc_on=ed", "loss.cal=raw", "loss.cal_target=as_trained", "loss.stop_gradient=false", "gim.mask_student=0",
    "loss.alpha=1", "loss.align=direct", "loss.share_proxies=true", "gim.residual=none", "gim.detach_student=false",
    "regression.weight=0", "unlabeled_per_batch=0",
)  # fmt: skip
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(BASELINE, "row ①: the student alone, DRC", "baseline"),
        Variant(FULL, "row ④: distilled through the GIM", "gcd"),
        Variant("regression", "control: the same features, plain regression", "regression"),
        Variant("relational", "control: the same features, similarities alone", "relational"),
        Variant("shuffled", "control: features of other images", "gcd", ("shuffle_features=true",)),
        Variant("pseudo-labels", "control: no teacher, the unlabelled images by pseudo-labels", "baseline",
                (f"unlabelled.per_batch={UNLABELLED}",)),
        Variant("consistency", "control: no teacher, the unlabelled images by consistency", "baseline",
                (f"unlabelled.per_batch={UNLABELLED}", "unlabelled.by=consistency")),
        Variant("no-unlabelled", "only the labelled images' features", "gcd", ("unlabeled_per_batch=0",)),
        Variant("drc-on-ed", "DRC on E_D alone", "gcd", ("loss.drc_on=ed",)),
        Variant("unmasked", "E_f always sees E_R; CAL's target too", "gcd",
                ("gim.mask_student=0", "loss.cal_target=as_trained")),
        Variant("paper", "losses as the paper writes them, α = 1", "gcd", _PAPER),
    )
}  # fmt: skip
NEED_UNLABELLED = ("pseudo-labels", "consistency", "no-unlabelled")
BY_DEFAULT = (BASELINE, FULL, "regression", "relational", "shuffled", "pseudo-labels", "consistency", "no-unlabelled")


def choose_variants(
    cache: Cache, names: Sequence[str], sweeps: Iterable[str], random_teacher: str | None
) -> list[Variant]:
    """The variants asked for (by default all controls that the cache allows), and one for each value of each sweep.

    The baseline is always among them. Raises TrainError for names and sweeps that do not exist.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise TrainError(f"variants: there is no {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    unlabelled = "unlabeled" in set(cache.samples["split"].to_pylist())
    lacking = [name for name in names if name in NEED_UNLABELLED and not unlabelled]
    if lacking:
        raise TrainError(f"variants: {lacking[0]} needs unlabelled images, and the cache has none")
    chosen = list(names) or [name for name in BY_DEFAULT if unlabelled or name not in NEED_UNLABELLED]
    variants = [VARIANTS[name] for name in dict.fromkeys([BASELINE, *chosen])]
    if random_teacher is not None:
        variants.append(Variant("random-teacher", "control: a teacher of random weights", "gcd", cache=random_teacher))
    return [*variants, *(variant for sweep in sweeps for variant in read_sweep(sweep))]


def read_sweep(text: str) -> list[Variant]:
    """`gim.queries=4/16/32`, `timesteps=22/22,28`: one variant of gcd for each value between slashes."""
    field, equals, values = text.partition("=")
    settings_of(FULL).field(field.strip())
    if not equals or not all(values.split("/")):
        raise TrainError(f"sweep: write FIELD=VALUE/VALUE, e.g. gim.queries=4/16/32 (got {text!r})")
    settings = [f"{field.strip()}={value.strip()}" for value in values.split("/")]
    return [Variant(setting, "row ④ with this setting", FULL, (setting,)) for setting in settings]


def make_cells(cache: str, variants: Iterable[Variant], seeds: int, preset: str, settings: Sequence[str]) -> list[Cell]:
    """Every variant with every seed, seed by seed; raises TrainError for what is no config.

    `settings` are for all runs whose method has the field, and lie below a variant's own.
    """
    shared = {method: [setting for setting in settings if _has(method, setting)] for method in METHODS}
    nobodys = [s for s in settings if not any(s in known for known in shared.values())]
    if nobodys:
        settings_of(FULL).field(nobodys[0].partition("=")[0].strip())  # says what is wrong with the name
    cells = []
    for seed in range(seeds):
        for variant in variants:
            given = [*shared[variant.method], *variant.settings]
            where = variant.cache or cache
            config = make_config(preset, given, method=variant.method, seed=seed, cache=where)
            cells.append(Cell(variant, config))
    return cells


def _has(method: str, setting: str) -> bool:
    return setting.partition("=")[0].strip() in settings_of(method).fields
