"""How a build encodes its features, as the manifest says it. No model library is imported here."""

from cache_schema.format.manifest import Encoding
from pipeline.build.config import BuildConfig


def encoding_of(config: BuildConfig) -> Encoding:
    """The encoding that a build asks for."""
    return Encoding(
        kind=config.encoding,
        pool=config.pool,
        pca=config.pca,
        compression=config.compression,
        massive=config.massive_channels,
        massive_factor=None if config.massive_channels == "keep" else config.massive_factor,
    )
