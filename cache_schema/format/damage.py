"""What a reader says about damage: which file, shard, sample, view and timestep, and the command that mends it."""

import shlex

from cache_schema.errors import CacheCorrupt, CacheError
from cache_schema.format.manifest import Manifest
from cache_schema.format.samples import load_samples
from cache_schema.storage.folder import Folder


def mending_command(where: object) -> str:
    """Return the command that mends the cache at `where`, to be given with the options the cache was built with."""
    return f"dit-cache build --resume --repair --output {shlex.quote(str(where))}"


def how_to_mend(where: object) -> str:
    """Return the end of a message about damage to the cache at `where`."""
    return f"mend it with `{mending_command(where)}` and the build's other options"


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
    """Return the error that says what is damaged, where, and what mends it; `more` names a view and a timestep."""
    where = [] if shard is None else [f"shard {shard}"]
    if row is not None:
        name = sample_id(folder, row)
        where.append(f"row {row}" if name is None else f"sample {name!r} (row {row})")
    where += [more] if more else []
    return CacheCorrupt(f"{reason}{': ' if where else ''}{', '.join(where)}; {how_to_mend(folder)}")


def view_and_timestep(manifest: Manifest, view: int, step: int) -> str:
    """Return the words for a chunk of a sample; `step` counts the cache's timesteps from 0."""
    return f"view {manifest.views[view]}, timestep {manifest.curriculum.timesteps[step]}"
