"""The contract of dit-distill: what a teacher cache is, how it is written, read and checked. Knows no model.

What one needs to read and write caches can be imported from here; `cache_schema.verify` and `cache_schema.describe`
hold what one does with a finished one. The modules behind these names are loaded when first used, so that a command
line can import `cache_schema.errors` or `cache_schema.cli` without waiting for torch and pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cache_schema.errors import (
    CacheCorrupt,
    CacheError,
    CacheMismatch,
    CacheNotFound,
    CacheRequestError,
    CacheStorageError,
    CacheUnreachable,
    CacheUnsealed,
    DitDistillError,
    InvalidEncoding,
    InvalidFeatures,
    LoaderError,
    LowFidelity,
    UnsupportedSchema,
)

if TYPE_CHECKING:
    from cache_schema.format.manifest import (
        CropsInfo,
        Curriculum,
        DatasetInfo,
        Encoding,
        Fidelity,
        ImagesInfo,
        Manifest,
        Provenance,
        StoreInfo,
        TapInfo,
        TeacherInfo,
    )
    from cache_schema.format.samples import SAMPLES_SCHEMA, fingerprint_samples, make_samples, samples_table
    from cache_schema.loading.dataset import CacheDataset, FeatureBatch
    from cache_schema.loading.loader import FeatureLoader
    from cache_schema.reading.batch import EncodedBatch
    from cache_schema.reading.reader import Cache, open_cache
    from cache_schema.writing.creation import create_cache
    from cache_schema.writing.plan import plan_manifest
    from cache_schema.writing.writer import CacheWriter

_LAZY = {
    "EncodedBatch": "reading.batch",
    "CacheDataset": "loading.dataset",
    "FeatureBatch": "loading.dataset",
    "FeatureLoader": "loading.loader",
    "CropsInfo": "format.manifest",
    "Curriculum": "format.manifest",
    "DatasetInfo": "format.manifest",
    "Encoding": "format.manifest",
    "Fidelity": "format.manifest",
    "ImagesInfo": "format.manifest",
    "Manifest": "format.manifest",
    "Provenance": "format.manifest",
    "StoreInfo": "format.manifest",
    "TapInfo": "format.manifest",
    "TeacherInfo": "format.manifest",
    "plan_manifest": "writing.plan",
    "Cache": "reading.reader",
    "open_cache": "reading.reader",
    "SAMPLES_SCHEMA": "format.samples",
    "fingerprint_samples": "format.samples",
    "make_samples": "format.samples",
    "samples_table": "format.samples",
    "CacheWriter": "writing.writer",
    "create_cache": "writing.creation",
}

__all__ = [
    "SAMPLES_SCHEMA",
    "Cache",
    "CacheCorrupt",
    "CacheDataset",
    "CacheError",
    "CacheMismatch",
    "CacheNotFound",
    "CacheRequestError",
    "CacheStorageError",
    "CacheUnreachable",
    "CacheUnsealed",
    "CacheWriter",
    "CropsInfo",
    "Curriculum",
    "DatasetInfo",
    "DitDistillError",
    "EncodedBatch",
    "Encoding",
    "FeatureBatch",
    "FeatureLoader",
    "Fidelity",
    "ImagesInfo",
    "InvalidEncoding",
    "InvalidFeatures",
    "LoaderError",
    "LowFidelity",
    "Manifest",
    "Provenance",
    "StoreInfo",
    "TapInfo",
    "TeacherInfo",
    "UnsupportedSchema",
    "create_cache",
    "fingerprint_samples",
    "make_samples",
    "open_cache",
    "plan_manifest",
    "samples_table",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value
