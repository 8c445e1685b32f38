"""What a reader says about damage: which file, shard, sample, view and timestep."""

from cache_schema.errors import CacheCorrupt, CacheError
from cache_schema.format.manifest import Manifest
from cache_schema.format.samples import load_samples
from cache_schema.storage.folder import Folder


def sample_id(folder: Folder, row: int) -> str | None:
    """Return the id of the sample in a row of the samples table, or None where the table cannot tell."""
    try:
        samples = load_samples(folder)
    except CacheError:
        return None
    return samples["id"][row].as_py() if row < samples.num_rows else None


def damaged(
    folder: Folder, reason: object, shard: int | None = None, row: int | None = None, more: str = ""
) -> CacheCorrupt:
    """Return the error that says what of a cache is damaged, and where; `more` names a view and a timestep."""
    where = [] if shard is None else [f"shard {shard}"]
    name = None if row is None else sample_id(folder, row)
    if row is not None:
        where.append(f"row {row}" if name is None else f"sample {name!r} (row {row})")
    where += [more] if more else []
    return CacheCorrupt(
        f"{reason}{': ' if where else ''}{', '.join(where)}",
        remedy="let the build that made the cache repair it",
        cache=str(folder),
        shard=shard,
        row=row,
        sample=name,
    )


def view_and_timestep(manifest: Manifest, view: int, step: int) -> str:
    """Return the words for a chunk of a sample; `step` counts the cache's timesteps from 0."""
    return f"view {manifest.views[view]}, timestep {manifest.curriculum.timesteps[step]}"
