"""A teacher that hangs, for processes that have to import it."""

import ctypes
from dataclasses import replace
from types import SimpleNamespace

from pipeline.teachers.flux import FluxTeacher

HUNG = "train-001-003"


class Hanging(FluxTeacher):
    """A FLUX that never comes back from a batch with one caption, and holds Python's lock meanwhile."""

    def encode_text(self, captions):
        text = super().encode_text(captions)
        return replace(text, pooled=text.pooled + (1e6 if "hang" in captions else 0))

    def features(self, noisy, context, sigma, text, taps):
        if (text.pooled > 1e5).any():
            ctypes.PyDLL(None).sleep(10**6)
        return super().features(noisy, context, sigma, text, taps)


def with_a_caption_that_hangs(dataset):
    """The data set with one sample whose caption the teacher hangs on."""
    samples = [replace(s, caption="hang") if s.id == HUNG else s for s in dataset.samples]
    return SimpleNamespace(
        name=dataset.name, protocol=dataset.protocol, superclass=dataset.superclass, samples=samples, read=dataset.read
    )
