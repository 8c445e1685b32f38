"""Pictures for people."""

import io
from pathlib import Path

from PIL import Image

from cache_schema.storage.files import write_file


def save_picture(image: Image.Image, path: Path) -> None:
    """Write an image in the format that its name ends with, PNG where that is none, whole or not at all.

    Creates its folder. Raises CacheStorageError where the disk refuses.
    """
    data = io.BytesIO()
    image.save(data, Image.registered_extensions().get(path.suffix.lower(), "PNG"))
    write_file(path, data.getbuffer())
