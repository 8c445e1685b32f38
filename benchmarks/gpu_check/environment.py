"""The machine: which driver and card, and which kernel attention runs on."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.scene import Failed, Scene


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
