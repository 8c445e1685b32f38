"""Whether the cache at a place is still the build that was opened there: a colleague may remove and replace it."""

from cache_schema.errors import CacheCorrupt, CacheNotFound
from cache_schema.format.manifest import Manifest
from cache_schema.format.manifest_file import MANIFEST_NAME, build_checksum, load_manifest
from cache_schema.storage.folder import Folder
from cache_schema.storage.remote import RemoteFolder


class SameBuild:
    """Watches the manifest of a cache, if that is sealed and elsewhere. For any number of threads.

    Records and calibration are read when they are needed. Each is right by its own checksum, and together they would be
    wrong where one of them is that of another build.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._tag: str | None = None  # of the manifest file, once it is known to be that manifest's

    def check(self) -> None:
        """Raise CacheCorrupt where it is another build, or none, by now: one small request, but for the first time."""
        if not isinstance(self._folder, RemoteFolder) or not self._manifest.sealed:
            return
        stat = self._folder.stat(MANIFEST_NAME)
        if stat is not None and stat.tag == self._tag:
            return
        try:
            found = load_manifest(self._folder)
        except CacheNotFound:
            raise CacheCorrupt(f"cache {self._folder} was removed while it was read") from None
        if build_checksum(found) != build_checksum(self._manifest):
            raise CacheCorrupt(
                f"cache {self._folder} was replaced by another build while it was read; run the same command again"
            )
        self._tag = None if stat is None else stat.tag
