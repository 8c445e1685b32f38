"""Which part of a cache is asked for, and the manifest of that part, which says of what it is one."""

from dataclasses import dataclass

import pyarrow as pa

from cache_schema.errors import CacheRequestError
from cache_schema.format.journal import Kind
from cache_schema.format.manifest import Manifest, Provenance
from cache_schema.format.manifest_file import as_unsealed, manifest_checksum, revalidate
from cache_schema.format.samples import count_usable


@dataclass(frozen=True)
class Selection:
    """What of a cache is wanted; everything by default. Shards are whole: a few samples more may come along.

    split: rows of this split. samples: rows [a, b). taps, timesteps: these alone, which makes a cache of its own, with
    the id of one that was built with them. images_only: no features.
    """

    split: str | None = None
    samples: tuple[int, int] | None = None
    taps: tuple[str, ...] | None = None
    images_only: bool = False
    timesteps: tuple[int, ...] | None = None

    @property
    def partial(self) -> bool:
        """Whether rows or all features are left out: what comes is not a whole cache then."""
        return self.split is not None or self.samples is not None or self.images_only

    def __str__(self) -> str:
        words = [f"split {self.split}"] if self.split else []
        words += [f"samples {self.samples[0]}:{self.samples[1]}"] if self.samples else []
        words += [f"taps {','.join(self.taps)}"] if self.taps else []
        words += [f"timesteps {','.join(map(str, self.timesteps))}"] if self.timesteps else []
        words += ["images only"] if self.images_only else []
        return ", ".join(words) or "everything"


EVERYTHING = Selection()


def parse_samples_range(text: str) -> tuple[int, int]:
    """Return the rows that `0:1000` stands for; raises CacheRequestError."""
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal() or int(first) >= int(last):
        raise CacheRequestError(f"{text!r} is no range of samples; write for example 0:1000")
    return int(first), int(last)


def manifest_of(selection: Selection, whole: Manifest, url: str) -> Manifest:
    """Return the manifest of a part of a cache; that of the whole where everything is asked for.

    Raises CacheRequestError for taps or timesteps that it lacks, or that its store or encoding cannot give alone.
    """
    if selection == EVERYTHING:
        return whole
    manifest = whole if selection.taps is None else _with_taps(whole, selection.taps)
    manifest = manifest if selection.timesteps is None else _with_timesteps(manifest, selection.timesteps)
    said = f"{selection} of cache {whole.cache_id[:12]}, manifest {manifest_checksum(whole.document())}, at {url}"
    provenance: Provenance = manifest.provenance.model_copy(update={"pulled": said, "checksum": None})
    manifest = revalidate(manifest.model_copy(update={"provenance": provenance}))
    return as_unsealed(manifest) if selection.partial else manifest


def _with_taps(whole: Manifest, names: tuple[str, ...]) -> Manifest:
    lacking = [name for name in names if whole.tap(name) is None]
    if lacking or not names:
        have = ", ".join(tap.name for tap in whole.taps)
        raise CacheRequestError(f"cache {whole.label} lacks tap {lacking[0] if lacking else ''} (has {have})")
    if whole.store.kind != "zarr":
        raise CacheRequestError(
            f"cache {whole.label} keeps all taps of a sample in one tar, so none comes alone; leave --taps out"
        )
    taps = [tap for tap in whole.taps if tap.name in names]
    fidelity = [item for item in whole.fidelity if item.tap in names]
    changes = {"taps": taps, "fidelity": fidelity, "cache_id": "", "bytes_features": None}
    return revalidate(whole.model_copy(update=changes))


def _with_timesteps(whole: Manifest, steps: tuple[int, ...]) -> Manifest:
    have, encoding = whole.curriculum, whole.encoding
    lacking = [step for step in steps if step not in have.timesteps]
    if lacking:
        raise CacheRequestError(
            f"cache {whole.label} lacks timestep {lacking[0]} (has {', '.join(map(str, have.timesteps))})"
        )
    if whole.store.kind != "zarr":
        raise CacheRequestError(
            f"cache {whole.label} keeps all timesteps of a sample in one tar; leave --timesteps out"
        )
    if encoding.pca is not None or encoding.massive != "keep":
        # One built with these alone would have other components, and the same id.
        what = "principal components" if encoding.pca is not None else "massive channels"
        raise CacheRequestError(
            f"the {what} of cache {whole.label} are those of all its timesteps together; leave --timesteps out"
        )
    kept = [step for step in have.timesteps if step in steps]
    sigmas = [have.sigmas[have.timesteps.index(step)] for step in kept]
    fidelity = [item for item in whole.fidelity if item.timestep in kept]
    curriculum = have.model_copy(update={"timesteps": kept, "sigmas": sigmas})
    changes = {"curriculum": curriculum, "fidelity": fidelity, "cache_id": "", "bytes_features": None}
    return revalidate(whole.model_copy(update=changes))


def parse_timesteps(text: str) -> tuple[int, ...]:
    """Return the timesteps that `10,22,28` stands for; raises CacheRequestError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() and len(word) < 10 for word in words):
        raise CacheRequestError(f"{text!r} are no timesteps; write for example 10,22,28")
    return tuple(map(int, words))


def shards_of(selection: Selection, manifest: Manifest, samples: pa.Table) -> set[tuple[Kind, int]]:
    """Return the shards that hold what is asked for; raises CacheRequestError where that is nothing."""
    usable, store = count_usable(samples), manifest.store
    first, last = selection.samples or (0, usable)
    wanted = list(range(first, min(last, usable)))
    if selection.split is not None:
        splits = samples["split"].to_pylist()
        wanted = [row for row in wanted if splits[row] == selection.split]
        if not wanted and selection.split not in splits:
            known = ", ".join(sorted(set(splits)))
            raise CacheRequestError(f"cache {manifest.label} has no split {selection.split!r} (has {known})")
    if not wanted:
        raise CacheRequestError(f"cache {manifest.label} has no sample of {selection}: it has {usable}")
    shards: set[tuple[Kind, int]] = set()
    if not selection.images_only:
        with_features = (row for row in wanted if row < manifest.dataset.feature_rows)
        shards |= {("features", row // store.samples_per_shard) for row in with_features}
    if manifest.images is not None:
        shards |= {("images", row // store.images_per_shard) for row in wanted}
    return shards
