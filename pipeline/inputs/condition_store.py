"""What the DiT is conditioned on, computed once and kept on disk: prompt embeddings and clean latents.

Stage I, the probe and the build share a store, and so may several processes: a file is named by everything that decides
its numbers, and is there wholly or not at all. Captions and images are encoded one at a time, so that what is stored
never depends on what was encoded beside it. Text encoders and VAE are in memory only while something is encoded. A
store can be deleted at any time: what is missing is computed again.
"""

import hashlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor
from tqdm import tqdm

from cache_schema.errors import DitDistillError
from cache_schema.format.identity import canonical_json
from cache_schema.read_ahead import ReadAhead
from cache_schema.storage.checksum import crc32c
from cache_schema.storage.files import sweep_aside_files, write_file
from pipeline.datasets.base import DataError, Dataset, Sample
from pipeline.inputs.conditions import WHOLE, Conditions, Pixels, captions_of, read_pixels
from pipeline.inputs.framing import Framing
from pipeline.teachers.base import Part, Teacher, TextEmbedding
from pipeline.teachers.passes import memory_errors
from pipeline.watchdog import watched

# Counts the changes of how pixels become latents or captions become embeddings.
_RECIPE = 1
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Prompt embeddings and latents of dit-cache; may be deleted.\n"
_NO_ROOM = "close what else uses the device, or use a smaller --resolution or --dtype bfloat16"


class DamagedConditions(DitDistillError):  # noqa: N818 - as the errors of cache_schema
    """A stored embedding or latent is not what was written; it was removed, to be computed again."""


def default_store(output: Path) -> Path:
    """Where the conditions are kept for a command that writes to `output`: beside it."""
    return output.absolute().parent / "conditions"


@dataclass(frozen=True)
class Encoded:
    """What was encoded, and how long that took once text encoders and VAE were loaded."""

    captions: int = 0
    images: int = 0
    seconds: float = 0.0


class ConditionStore:
    """The conditions of one data set for one teacher, under `root`; other data sets and teachers may share the folder.

    use_captions: without, the text is empty, as an unconditional prompt is. framing: how views are cut.
    """

    def __init__(
        self,
        root: Path,
        teacher: Teacher,
        dataset: Dataset,
        *,
        use_captions: bool = True,
        framing: Framing = WHOLE,
    ) -> None:
        self.root, self._teacher, self._dataset, self._use_captions = root, teacher, dataset, use_captions
        self._framing = framing
        self._digests: dict[str, str] = {}

    def prepare(
        self,
        samples: Sequence[Sample],
        views: Sequence[str] = ("canonical",),
        digests: Mapping[str, str] | None = None,
        check: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = tqdm.write,
        without_caption: bool = False,
    ) -> Encoded:
        """Encode what is missing for these samples under these views, then release text encoders and VAE.

        digests: SHA-256 of the image files by sample id, where they are known. check: called before every piece of
        work; may raise to end it. without_caption: encode the empty one as well. Raises DataError for an image that
        cannot be read, CacheStorageError where the disk refuses.
        """
        self._digests |= digests if digests is not None else self._digest(samples)
        wanted = captions_of(self._dataset, samples, self._use_captions) + [""] * without_caption
        captions = list(dict.fromkeys(wanted))
        captions = [caption for caption in captions if not self._text_file(caption).exists()]
        lacking = [(s, v) for s in samples if (v := [v for v in views if not self._latents_file(s, v).exists()])]
        if not captions and not lacking:
            return Encoded()
        self._begin()
        # Every process in an order of its own: several that share a store then share the work as well.
        random.SystemRandom().shuffle(captions)
        random.SystemRandom().shuffle(lacking)
        text_seconds = self._encode_captions(captions, check)
        image_seconds = self._encode_images(lacking, check)
        images = sum(len(views) for _, views in lacking)
        log(f"encoded {len(captions)} captions and {images} views into {self.root}")
        return Encoded(len(captions), images, text_seconds + image_seconds)

    def read(self, samples: Sequence[Sample], view: str) -> Conditions:
        """The conditions of a batch of prepared samples, in main memory.

        Raises DamagedConditions for a file that is not what was written, or no longer there.
        """
        latents = [_read(self._latents_file(sample, view)) for sample in samples]
        return Conditions(
            object=torch.stack([found["object"] for found in latents]),
            context=torch.stack([found["context"] for found in latents]),
            text=self.text(captions_of(self._dataset, samples, self._use_captions)),
        )

    def text(self, captions: Sequence[str]) -> TextEmbedding:
        """The embeddings of captions that were prepared. Raises as `read`."""
        found = [_read(self._text_file(caption)) for caption in captions]
        return TextEmbedding(torch.stack([f["tokens"] for f in found]), torch.stack([f["pooled"] for f in found]))

    def _encode_captions(self, captions: Sequence[str], check: Callable[[], None]) -> float:
        if not captions:
            return 0.0
        try:
            started = self._load("text")
            for caption in tqdm(captions, desc="captions", unit="caption"):
                check()
                file = self._text_file(caption)
                if not file.exists():
                    with (
                        watched("needed", f"encoding the caption {caption!r}", [], []),
                        memory_errors("while encoding a caption", _NO_ROOM),
                    ):
                        text = self._teacher.encode_text([caption])
                    _write(file, {"tokens": text.tokens[0], "pooled": text.pooled[0]})
            return time.monotonic() - started
        finally:
            self._teacher.release("text")

    def _encode_images(self, lacking: Sequence[tuple[Sample, list[str]]], check: Callable[[], None]) -> float:
        """Encode some views of each sample, whose pixels are read while those of the samples before are encoded."""
        if not lacking:
            return 0.0

        def pixels_of(needed: tuple[Sample, list[str]]) -> dict[str, Pixels]:
            sample, views = needed
            return read_pixels(self._dataset, [sample], self._teacher.resolution, views, self._framing)

        ahead = ReadAhead(pixels_of, threads=1)
        try:
            started = self._load("vae")
            coming = tqdm(ahead.over(lacking), desc="latents", unit="image", total=len(lacking))
            for (sample, views), pixels in zip(lacking, coming, strict=True):
                check()
                for view in views:
                    if self._latents_file(sample, view).exists():
                        continue
                    pair = torch.cat([pixels[view].object, pixels[view].context])
                    with (
                        watched("teacher", "encoding it", [sample.id], [sample.source]),
                        memory_errors("while encoding an image", _NO_ROOM),
                    ):
                        latents = self._teacher.encode_images(pair)
                    _write(self._latents_file(sample, view), {"object": latents[0], "context": latents[1]})
            return time.monotonic() - started
        finally:
            ahead.close()
            self._teacher.release("vae")

    def _load(self, part: Part) -> float:
        """Load a part of the teacher; returns the time when it was there, in seconds of `time.monotonic`."""
        with memory_errors("while loading the teacher's encoders", _NO_ROOM):
            self._teacher.load(part)
        return time.monotonic()

    def _begin(self) -> None:
        sweep_aside_files(self.root)
        # Tells backup programs that nothing is lost with this folder (bford.info/cachedir).
        if not (self.root / "CACHEDIR.TAG").exists():
            write_file(self.root / "CACHEDIR.TAG", _TAG)

    def _digest(self, samples: Sequence[Sample]) -> dict[str, str]:
        def digest(sample: Sample) -> tuple[str, str]:
            try:
                return sample.id, hashlib.sha256(self._dataset.read(sample)).hexdigest()
            except OSError as error:
                raise DataError(f"{sample.source} cannot be read: {error.strerror or error}") from error

        with ThreadPoolExecutor() as threads:
            return dict(threads.map(digest, [s for s in samples if s.id not in self._digests]))

    def _text_file(self, caption: str) -> Path:
        return self._file("text", {**self._teacher.encoder_identity("text"), "caption": caption})

    def _latents_file(self, sample: Sample, view: str) -> Path:
        image = {"image": self._digests[sample.id], "box": sample.box, "view": view}
        cut = self._framing.identity(sample.id, view)
        return self._file("latents", {**self._teacher.encoder_identity("vae"), **image, **cut})

    def _file(self, folder: str, identity: Mapping[str, object]) -> Path:
        name = hashlib.sha256(canonical_json({"recipe": _RECIPE, **identity}).encode()).hexdigest()
        return self.root / folder / name[:2] / f"{name}.safetensors"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with a checksum. Not flushed to the disk: what a power cut leaves torn is found by its checksum."""
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, to_safetensors(kept, {"crc32c": f"{_checksum(kept):08x}"}), durable=False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            written = (file.metadata() or {}).get("crc32c")
        if written == f"{_checksum(tensors):08x}":
            return tensors
        reason = "its checksum does not match"
    except FileNotFoundError:
        raise DamagedConditions(
            f"{path} is no longer there; run the same command again: it resumes, and what is missing is computed"
        ) from None
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
    path.unlink(missing_ok=True)
    raise DamagedConditions(
        f"{path} was damaged ({reason}) and has been removed; run the same command again: it resumes, and encodes that "
        "anew"
    )


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        if tensors[name].numel():
            checksum = crc32c(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
