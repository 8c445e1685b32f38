"""The JSON Schema of the manifest, generated from its models: `python -m cache_schema.format.schema` writes it."""

import json
from pathlib import Path

from cache_schema.format.manifest import Manifest
from cache_schema.storage.files import write_file

SCHEMA_PATH = Path(__file__).with_name("manifest.schema.json")


def render_schema() -> bytes:
    """Return the bytes of `manifest.schema.json`."""
    schema = Manifest.model_json_schema(mode="serialization")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return (json.dumps(schema, indent=2, sort_keys=True) + "\n").encode("ascii")


def write_schema(path: Path = SCHEMA_PATH) -> None:
    """Write the schema beside this module, or to another place."""
    write_file(path, render_schema())


if __name__ == "__main__":
    write_schema()
