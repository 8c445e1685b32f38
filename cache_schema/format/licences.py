"""The licence of a teacher's weights, by what a manifest says of it: features are made with them."""

from cache_schema.format.manifest import TeacherInfo

_UNKNOWN = "not known here; read the licence of its weights"
# From the name of a repository, as its owner spells it, to the licence that its model card states.
_BY_NAME = {
    "flux.1-dev": "FLUX.1 [dev] Non-Commercial License",
    "flux.1-kontext-dev": "FLUX.1 [dev] Non-Commercial License",
    "flux.1-schnell": "Apache-2.0",
    "flux.2-klein-4b": "Apache-2.0",
    "flux.2-klein-base-4b": "Apache-2.0",
    "flux.2-klein-9b": "FLUX Non-Commercial License",
    "flux.2-klein-base-9b": "FLUX Non-Commercial License",
    "flux.2-klein-9b-kv": "FLUX Non-Commercial License",
    "stable-diffusion-3.5-medium": "Stability AI Community License",
    "stable-diffusion-3.5-large": "Stability AI Community License",
    "demo": "Apache-2.0",
    "demo_weights": "Apache-2.0",
}


def licence_of(teacher: TeacherInfo) -> str:
    """Return the licence of a teacher's weights, as far as its name tells."""
    return _BY_NAME.get(teacher.source.rstrip("/").rpartition("/")[2].lower(), _UNKNOWN)
