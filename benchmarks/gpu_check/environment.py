"""The machine: which driver and card, and which kernel attention runs on."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.scene import Failed, Scene
from cache_schema.devices import sound_gradients

MOST_ERROR = 0.02  # of a gradient, relative to float32's; bfloat16 has three digits


def device(scene: Scene) -> str:
    """The card, the versions, and that a product computed on it is right."""
    a = torch.randn(256, 256, device=scene.device)
    error = ((a @ a).double() - a.double() @ a.double()).abs().max().item()
    if error > 1e-3:
        raise Failed(f"a product of matrices is wrong by {error:.1e}")
    if not scene.real:
        return f"torch {torch.__version__}"
    major, minor = torch.cuda.get_device_capability(scene.device)
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Failed(f"compute capability {major}.{minor} has no bfloat16: use a card from Ampere on")
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, compute capability {major}.{minor}"


def attention(scene: Scene) -> str:
    """That one of the fused kernels takes what the DiT gives it; the plain one keeps every score of every pair."""
    heads, tokens, width = (24, 2560, 128) if scene.real else (2, 64, 16)
    q, k, v = torch.randn(3, 1, heads, tokens, width, device=scene.device, dtype=scene.dtype)
    usable = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v)
            usable.append(backend.name.removesuffix("_ATTENTION").lower())
        except RuntimeError:
            continue
    if not usable:
        raise Failed("no fused kernel takes the DiT's shapes")
    return f"{', '.join(usable)} for {heads} heads of {tokens} tokens of {width}"


def gradients(scene: Scene) -> str:
    """That attention's backward pass is right as Stage I and the student run it; cuDNN's, which they avoid, is told."""
    heads, tokens, width = (4, 2560, 128) if scene.real else (2, 64, 16)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, tokens, heads, width, generator=generator).to(scene.device) for _ in range(4)]
    with sdpa_kernel(SDPBackend.MATH):
        exact = _gradients(*given)
    rounded = [tensor.to(scene.dtype) for tensor in given]
    with sound_gradients():
        off = _furthest(exact, _gradients(*rounded))
    if not off < MOST_ERROR:
        raise Failed(f"gradients of attention are off by {off:.1%}")
    said = f"off by {off:.2%}"
    if scene.real:
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                said += (
                    f"; cuDNN's by {_furthest(exact, _gradients(*(tensor.to(scene.dtype) for tensor in given))):.2%}"
                )
        except RuntimeError as error:
            said += f"; cuDNN's: {str(error).splitlines()[0][:60]}"
    return said


def _gradients(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> list[Tensor]:
    """Of (B, L, heads, C), laid out as a transformer's projections are."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
    out = F.scaled_dot_product_attention(*(leaf.transpose(1, 2) for leaf in leaves)).transpose(1, 2)
    return list(torch.autograd.grad(out, leaves, upstream))


def _furthest(exact: list[Tensor], found: list[Tensor]) -> float:
    pairs = zip(exact, found, strict=True)
    return max(((a - b.float()).norm() / a.norm()).nan_to_num(float("inf")).item() for a, b in pairs)
