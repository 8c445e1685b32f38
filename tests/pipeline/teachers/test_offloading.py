"""Blocks that are fetched ahead, on a stream that copies when it is waited for and not before.

The hooks, the tracing and the order are diffusers' own; the device's memory is other memory of the CPU, which is filled
with NaN until a copy has arrived and again when it is released.
"""

import gc
from contextlib import nullcontext

import pytest
import torch
from diffusers.hooks import group_offloading as diffusers_offloading
from diffusers.hooks.group_offloading import GroupOffloadingConfig, GroupOffloadingType, ModuleGroup
from tiny_teachers import save_tiny_klein, save_tiny_sd3

from pipeline.teachers import load_teacher
from pipeline.teachers.loading import Loading
from pipeline.teachers.offloading import _lock_pages, offload_transformer, order_is_known

CPU = torch.device("cpu")


class LateStream:
    """Copies that were asked for are made when the stream is waited for."""

    def __init__(self) -> None:
        self.waiting = []

    def synchronize(self) -> None:
        for source, target in self.waiting:
            target.copy_(source)
        self.waiting.clear()


class Backend:
    """What diffusers asks of a device that has streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stream(self, stream: LateStream):
        return nullcontext()

    def current_stream(self) -> LateStream:
        return LateStream()


@pytest.fixture
def streamed(monkeypatch):
    """`streamed(teacher)`: its blocks are offloaded with such a stream; returns {block: is on the device}."""
    on_device: dict[int, torch.Tensor] = {}

    def to_device(group, tensor, source, _stream):
        if id(tensor) in on_device:
            on_device[id(tensor)].fill_(torch.nan)
        moved = torch.full_like(source, torch.nan)
        group.stream.waiting.append((source, moved))
        if not group.non_blocking:
            group.stream.synchronize()
        tensor.data = on_device[id(tensor)] = moved

    back = ModuleGroup._offload_to_memory
    here = ModuleGroup._transfer_tensor_to_device

    def to_host(group):
        back(group)
        for tensor in group.cpu_param_dict:
            if id(tensor) in on_device:
                on_device.pop(id(tensor)).fill_(torch.nan)

    def streams_alone(patched, plain):
        return lambda group, *given: (plain if group.stream is None else patched)(group, *given)

    monkeypatch.setattr(diffusers_offloading, "TorchDeviceBackend", Backend)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(ModuleGroup, "_transfer_tensor_to_device", streams_alone(to_device, here))
    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", streams_alone(to_host, back))

    def offload(teacher):
        config = GroupOffloadingConfig(
            CPU, CPU, GroupOffloadingType.BLOCK_LEVEL, False, False, True, num_blocks_per_group=1, stream=LateStream()
        )
        diffusers_offloading._apply_group_offloading(teacher.transformer, config)
        blocks = teacher._blocks()
        return lambda: {n for n, b in enumerate(blocks) if any(id(p) in on_device for p in b.parameters())}

    return offload


@pytest.fixture(scope="module")
def folders(flux_folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("families")
    return {"flux": flux_folder, "flux2": save_tiny_klein(base / "klein"), "sd3": save_tiny_sd3(base / "sd3")}


@pytest.fixture
def load(folders):
    def load(family, **options):
        side = 64 if family == "flux2" else 32
        return load_teacher(str(folders[family]), resolution=side, dtype=torch.float32, device="cpu", **options)

    return load


def inputs(teacher):
    shape = teacher.tap_shape("velocity")
    generator = torch.Generator().manual_seed(0)
    noisy, context = torch.randn(2, 2, shape.tokens, shape.channels, generator=generator)
    return noisy, context, torch.tensor([0.2, 0.8]), teacher.encode_text(["red crown", "blue"])


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3"])
def test_blocks_fetched_ahead_give_the_features_of_every_tap_and_leave_none_on_the_device(family, load, streamed):
    plain, teacher = load(family), load(family)
    given = inputs(plain)
    fetched = streamed(teacher)
    blocks, ran, most = teacher._blocks(), [], []
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        block.register_forward_hook(lambda *_: most.append(len(fetched())))
    taps = plain.taps()
    assert not order_is_known(blocks)
    for turn, tap in enumerate([*taps[::-1], *taps, "velocity"]):
        ran.clear()
        found = teacher.features(*given, [tap])[tap]
        assert torch.equal(found, plain.features(*given, [tap])[tap])
        assert not fetched()
        deepest = len(blocks) - 1 if tap == "velocity" or turn == 0 else plain.architecture.block(tap, "")
        assert ran == list(range(deepest + 1))
    assert max(most) == 1  # of a block that has run, the next one alone is there


def test_a_tap_inside_of_a_block_leaves_nothing_on_the_device(load, streamed):
    plain, teacher = load("flux"), load("flux")
    given, fetched = inputs(plain), streamed(teacher)
    for tap in ("double.1.modulated", "single.0.modulated", "double.0.modulated"):
        found = teacher.features(*given, [tap])[tap]
        assert torch.equal(found, plain.features(*given, [tap])[tap])
        assert not fetched()


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_pass_that_runs_out_of_memory_is_tried_again_whenever_that_is(load, streamed, fails):
    plain, teacher = load("flux"), load("flux")
    given, fetched = inputs(plain), streamed(teacher)
    broken = teacher._blocks()[2]
    for turn in range(4):
        if turn == fails:
            handle = broken.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("")))
            with pytest.raises(torch.OutOfMemoryError):
                teacher.features(*given, ["hidden"])
            handle.remove()
            assert not fetched()
        assert torch.equal(
            teacher.features(*given, ["double.1"])["double.1"], plain.features(*given, ["double.1"])["double.1"]
        )


class Runtime:
    """cudart, of which `room` bytes can be page-locked."""

    def __init__(self, room: int) -> None:
        self.room, self.locked = room, {}

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        if sum(self.locked.values()) + size > self.room:
            return 2
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.locked[address]


def test_weights_are_page_locked_where_they_are_and_let_go_of_with_them(load, monkeypatch):
    plain, teacher = load("flux"), load("flux")
    given, runtime = inputs(plain), Runtime(room=10**9)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    blocks = teacher._blocks()
    assert _lock_pages(blocks, torch.device("cuda"))
    assert len(runtime.locked) == len(blocks)
    for block in blocks:
        for tensor in [*block.parameters(), *block.buffers()]:
            assert any(at <= tensor.data_ptr() < at + size for at, size in runtime.locked.items())
    bytes_of = sum(p.nbytes for block in blocks for p in block.parameters())
    assert bytes_of <= sum(runtime.locked.values()) <= 1.05 * bytes_of + 64 * 40 * len(blocks)
    assert torch.equal(teacher.features(*given, ["hidden"])["hidden"], plain.features(*given, ["hidden"])["hidden"])
    del tensor, block, blocks
    teacher.release("transformer")
    gc.collect()
    assert not runtime.locked


@pytest.mark.parametrize("kind", [None, "int8"])
def test_where_weights_cannot_be_page_locked_blocks_are_offloaded_without_streams(load, monkeypatch, kind):
    if kind:
        pytest.importorskip("torchao", reason="torchao, of the extra pipeline, is not installed")
    plain, teacher = (load("flux", loading=Loading(kind)) for _ in range(2))
    given, runtime = inputs(plain), Runtime(room=10 if kind is None else 10**9)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    asked = []
    monkeypatch.setattr(type(teacher.transformer), "enable_group_offload", lambda _, **options: asked.append(options))
    offload_transformer(teacher.transformer, teacher._blocks(), torch.device("cuda"))
    assert [(one["use_stream"], one["low_cpu_mem_usage"]) for one in asked] == [(False, False)]
    assert torch.equal(teacher.features(*given, ["hidden"])["hidden"], plain.features(*given, ["hidden"])["hidden"])
    assert not runtime.locked
