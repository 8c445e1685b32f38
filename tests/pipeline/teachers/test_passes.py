"""However little memory there is, every image and timestep is computed, or the build says why not."""

import resource
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_building import some_examples
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import open_cache
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.teachers.passes import OutOfMemory, Passes, is_out_of_memory, memory_errors

EMPTY = {"hidden": torch.empty(0)}


def limited_forward(images: int, timesteps: int, most: int, asked: list[tuple[int, int]]):
    """A pass that fails above `most` rows as a GPU does; every row holds the number of its image and timestep."""

    def forward(rows: slice, steps: slice) -> dict[str, torch.Tensor]:
        count = (rows.stop - rows.start) * (steps.stop - steps.start)
        asked.append((rows.stop - rows.start, steps.stop - steps.start))
        if count > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        values = torch.arange(images * timesteps).reshape(images, timesteps)[rows, steps]
        return {"hidden": values.reshape(-1, 1, 1).clone()}

    return forward


@some_examples
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 40), st.integers(1, 60))
def test_every_image_and_timestep_is_computed_once_whatever_fits(images, timesteps, batch, most):
    asked: list[tuple[int, int]] = []
    passes = Passes(batch, timesteps, adaptive=True, log=str)
    for _ in range(2):
        found = passes.run(images, limited_forward(images, timesteps, most, asked))["hidden"]
        assert found.shape == (images, timesteps, 1, 1)
        assert found.flatten().tolist() == list(range(images * timesteps))
    fitting = [n * s for n, s in asked if n * s <= most]
    assert sum(fitting) == 2 * images * timesteps
    assert max(fitting) <= batch * timesteps
    # All timesteps of an image go together unless not even one image fits.
    assert all(s == timesteps or n == 1 for n, s in asked)


def test_what_fitted_once_is_kept_and_said():
    said: list[str] = []
    asked: list[tuple[int, int]] = []
    passes = Passes(8, 4, adaptive=True, log=said.append)
    for _ in range(2):
        passes.run(8, limited_forward(8, 4, 9, asked))
    assert asked == [(8, 4), (4, 4), (2, 4), (2, 4), (2, 4), (2, 4), (2, 4), (2, 4), (2, 4), (2, 4)]
    assert said == [
        "out of memory in a forward pass of 8 images at 4 timesteps: going on with 4 images at 4 timesteps",
        "out of memory in a forward pass of 4 images at 4 timesteps: going on with 2 images at 4 timesteps",
    ]


def test_below_one_image_the_timesteps_are_halved():
    said: list[str] = []
    asked: list[tuple[int, int]] = []
    Passes(1, 4, adaptive=True, log=said.append).run(2, limited_forward(2, 4, 2, asked))
    assert asked == [(1, 4), (1, 2), (1, 2), (1, 2), (1, 2)]
    assert said == ["out of memory in a forward pass of 1 image at 4 timesteps: going on with 1 image at 2 timesteps"]


@pytest.mark.parametrize(
    ("batch", "adaptive", "message"),
    [(2, False, "2 images at 4 timesteps; use --batch auto"), (8, True, "1 image at 1 timestep; use --quantize int8")],
)
def test_where_nothing_smaller_is_allowed_it_is_an_error_of_one_line(batch, adaptive, message):
    passes = Passes(batch, 4, adaptive=adaptive, log=str)
    with pytest.raises(OutOfMemory, match=message) as caught:
        passes.run(8, limited_forward(8, 4, 0, []))
    assert "\n" not in str(caught.value)


def test_other_errors_are_left_alone():
    def forward(images: slice, timesteps: slice) -> dict[str, torch.Tensor]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        Passes(8, 4, adaptive=True).run(8, forward)
    with pytest.raises(RuntimeError, match="mat1"), memory_errors("anywhere", "do this"):
        forward(slice(0), slice(0))
    assert not is_out_of_memory(ValueError("out of memory."))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
    ],
)
def test_whatever_the_words_running_out_of_memory_halves_the_pass(words):
    def forward(images: slice, timesteps: slice) -> dict[str, torch.Tensor]:
        if images.stop - images.start > 1:
            raise RuntimeError(words)
        return {"hidden": torch.ones(1, 1, 1)}

    assert Passes(2, 1, adaptive=True, log=str).run(2, forward)["hidden"].sum() == 2
    with pytest.raises(OutOfMemory, match="use --batch auto"):
        Passes(2, 1).run(2, forward)


@contextmanager
def little_memory(megabytes: int):
    """No more than this: a larger allocation really fails, whatever the allocator had kept of what was freed before."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, before[1]))
    taken = []
    try:
        with suppress(MemoryError):
            while True:
                taken.append(bytearray(2**20))
        del taken[-megabytes:]
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_build_that_really_runs_out_of_memory_halves_its_passes_and_leaves_no_hole(
    load_teacher, tiny_dataset, tmp_path
):
    """At 256 px a pass of twelve images takes more than 60 MB; half that, or half again, fits."""
    config = BuildConfig(timesteps=(22, 28), image_size=32, encoding="float32", batch=2)
    teacher = load_teacher(resolution=256)
    dataset = type("Few", (), {})()
    dataset.__dict__ |= {k: getattr(tiny_dataset, k) for k in ("name", "protocol", "superclass", "read")}
    dataset.samples = [s for s in tiny_dataset.samples if s.split == "train"][:12]
    build(teacher, dataset, config, tmp_path / "whole", log=str)

    original, said = teacher._forward, []

    def forward(*arguments):
        with little_memory(12):
            return original(*arguments)

    teacher._forward = forward
    build(teacher, dataset, replace(config, batch="auto"), tmp_path / "auto", log=said.append)
    assert any(line.startswith("out of memory in a forward pass of 12 images at 2 timesteps") for line in said)
    whole, auto = open_cache(tmp_path / "whole"), open_cache(tmp_path / "auto")
    assert whole.manifest.cache_id == auto.manifest.cache_id
    assert auto.manifest.failed_rows == []
    rows = list(range(12))
    one, other = (c.read(rows, tap="hidden").decode() for c in (whole, auto))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    with pytest.raises(OutOfMemory, match="use --batch auto"):
        build(teacher, dataset, replace(config, batch=12), tmp_path / "fixed", log=str)


def test_weights_that_do_not_fit_are_loaded_once_and_the_advice_is_about_them(load_teacher, tiny_dataset, tmp_path):
    teacher, tried = load_teacher(), []

    def too_large(transformer) -> None:
        tried.append(transformer)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.00 GiB")

    teacher._prepare_transformer = too_large
    config = BuildConfig(timesteps=(22, 28), image_size=32, encoding="float32", batch="auto")
    with pytest.raises(OutOfMemory, match="weights do not fit: use --quantize int8") as caught:
        build(teacher, tiny_dataset, config, tmp_path / "c", log=str)
    assert "\n" not in str(caught.value)
    assert len(tried) == 1
