"""Which store a cache has."""

from cache_schema.format.manifest import Manifest, StoreKind
from cache_schema.stores.base import FeatureStore
from cache_schema.stores.webdataset_store import WebDatasetStore
from cache_schema.stores.zarr_store import ZarrStore

_STORES: dict[StoreKind, type[FeatureStore]] = {"zarr": ZarrStore, "webdataset": WebDatasetStore}


def store_of(manifest: Manifest) -> FeatureStore:
    """Return the store of a cache."""
    return _STORES[manifest.store.kind](manifest)
