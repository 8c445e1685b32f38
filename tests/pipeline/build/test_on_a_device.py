"""A build on a device whose tensors mix with none in main memory: whole, and where memory runs out midway."""

from pathlib import Path

import pytest
import torch
from strict_device import StrictDevice, StrictTensor

from cache_schema import open_cache
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.teachers.host_features import HostFeatures, host_tensor

CONFIG = BuildConfig(
    batch="auto",
    timesteps=(22, 28),
    image_size=32,
    encoding="float32",
    views=("canonical", "hflip"),
    taps=("hidden", "velocity"),
)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "strict")
    with StrictDevice() as strict:
        yield strict


@pytest.fixture(scope="module")
def on_cpu(flux_folder, tiny_dataset, tmp_path_factory) -> Path:
    from pipeline.teachers.flux import FluxTeacher

    output = tmp_path_factory.mktemp("cpu") / "c"
    build(FluxTeacher(flux_folder, resolution=32), tiny_dataset, CONFIG, output, log=str)
    return output


def features_of(path: Path) -> dict[str, torch.Tensor]:
    cache = open_cache(path)
    rows = cache.feature_rows
    return {
        f"{tap} {view}": cache.read(rows, tap=tap, view=view).decode() for tap in CONFIG.taps for view in CONFIG.views
    }


@pytest.mark.parametrize("fails_at", [(), (2,)], ids=["uncut", "cut in the second view"])
def test_a_build_on_a_device_equals_one_on_the_cpu(on_cpu, load_teacher, tiny_dataset, tmp_path, device, fails_at):
    teacher = load_teacher(device="cuda:0")
    original, calls, said = teacher._forward, [], []

    def forward(*arguments):
        calls.append(len(arguments[0]))
        if len(calls) in fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(*arguments)

    teacher._forward = forward
    build(teacher, tiny_dataset, CONFIG, tmp_path / "c", log=said.append)
    assert len([line for line in said if line.startswith("out of memory")]) == len(fails_at)
    assert open_cache(tmp_path / "c").manifest.cache_id == open_cache(on_cpu).manifest.cache_id
    for name, tokens in features_of(on_cpu).items():
        torch.testing.assert_close(features_of(tmp_path / "c")[name], tokens, atol=1e-5, rtol=1e-5)
    assert device.copies["to host"] > 0


def test_features_of_a_device_wait_in_main_memory_whole_or_cut(device):
    whole, cut = HostFeatures(3, 2), HostFeatures(3, 2)
    tokens = torch.arange(6.0).view(6, 1, 1).to("cuda:0")
    whole.put(0, slice(0, 3), slice(0, 2), {"hidden": tokens})
    for row in range(6):
        cut.put(0, slice(row // 2, row // 2 + 1), slice(row % 2, row % 2 + 1), {"hidden": tokens[row : row + 1]})
    for features in (whole, cut):
        found = features.ready()["hidden"]
        assert not isinstance(found, StrictTensor)
        assert found.flatten().tolist() == list(range(6))


def test_copies_from_cuda_are_queued_into_page_locked_memory_and_waited_for(device, monkeypatch):
    locked, events = [], []

    class Locked(torch.Tensor):
        def is_pinned(self, device=None) -> bool:
            return True

    class Event:
        def synchronize(self) -> None:
            events.append("waited")

    class Stream:
        def record_event(self) -> Event:
            events.append("recorded")
            return Event()

    def empty(shape, dtype, pin_memory=False):
        locked.append(pin_memory)
        return torch.zeros(shape, dtype=dtype).as_subclass(Locked)

    monkeypatch.setattr("pipeline.teachers.host_features.torch.empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    features = HostFeatures(2, 1, views=2)
    tokens = torch.ones(2, 1, 1).to("cuda:0")
    for view in range(2):
        features.put(view, slice(0, 2), slice(0, 1), {"hidden": tokens * view})
    assert (locked, events) == ([True], ["recorded", "recorded"])
    assert features.ready()["hidden"].flatten().tolist() == [0, 1, 0, 1]
    assert events[2:] == ["waited"]


def test_where_no_memory_can_be_page_locked_other_memory_does():
    assert not torch.cuda.is_available() or pytest.skip("this machine page-locks")
    found = host_tensor((2, 3), torch.bfloat16, torch.device("cuda", 0))
    assert (found.shape, found.dtype, found.device.type) == ((2, 3), torch.bfloat16, "cpu")
