"""Several processes: whether the library that joins their gradients starts."""

import torch
import torch.distributed as dist

from benchmarks.gpu_check.scene import Failed, Scene


def collective(scene: Scene) -> str:
    """A sum over one process, by NCCL on a GPU and by Gloo on a CPU."""
    backend = "nccl" if scene.real else "gloo"
    store = f"file://{scene.scratch / 'rendezvous'}"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    try:
        values = torch.arange(4.0, device=scene.device)
        dist.all_reduce(values)
        if values.tolist() != [0, 1, 2, 3]:
            raise Failed(f"a sum over one process gave {values.tolist()}")
    finally:
        dist.destroy_process_group()
    return backend if not scene.real else f"{backend} {'.'.join(map(str, torch.cuda.nccl.version()))}"
