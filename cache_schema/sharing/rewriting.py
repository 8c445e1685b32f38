"""Records and documents as another manifest of the same features implies them: of fewer taps, other provenance."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cache_schema.format import layout
from cache_schema.format.card import render_card
from cache_schema.format.journal import Record, file_record
from cache_schema.format.manifest import Manifest
from cache_schema.storage.files import digest
from cache_schema.stores.registry import store_of


@dataclass(frozen=True)
class Rewritten:
    """A record as it should be, and those of its files that are made here rather than copied."""

    record: Record
    made: dict[str, bytes] = field(default_factory=dict)


def rewrite(manifest: Manifest, record: Record, calibration: Mapping[str, bytes] = MappingProxyType({})) -> Rewritten:
    """Return the record that a cache with this manifest has in place of `record`, of one with at least its arrays.

    `calibration` are the contents of those of its files that are not as they were, by name.
    """
    store = store_of(manifest)
    if record.kind == "layout":
        made = store.documents()
        kept = {layout.SAMPLES_NAME}
    elif record.kind == "seal":
        made = {layout.CARD_NAME: render_card(manifest)}
        kept = {layout.IMAGE_INDEX_NAME}
    elif record.kind == "features":
        made, kept = {}, set(store.shard_files(record.shard))
    elif record.kind == "calibration":
        made, kept = dict(calibration), set(map(store.calibration_file, layout.all_calibrations(manifest)))
    else:
        made, kept = {}, set(record.files)
    taps = {tap.name for tap in manifest.taps}
    files = {name: file for name, file in record.files.items() if name in kept}
    files |= {name: file_record(digest(data)) for name, data in made.items()}
    steps = manifest.curriculum.timesteps
    fidelity = [item for item in record.fidelity if item.tap in taps and item.timestep in steps]
    return Rewritten(record.model_copy(update={"files": files, "fidelity": fidelity, "checksum": None}), made)
