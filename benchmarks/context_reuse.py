"""What it saves to compute the context once per image instead of once per timestep.

`python -m benchmarks.context_reuse`. The forward passes of a build, text and latents at hand, with a small FLUX.2 of
the real class: klein's proportions of double to single blocks and of text to image tokens, random weights. The same
weights run with a joint and with a reused context, in turns, in one thread.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.measure import in_turns, medians, save, table
from pipeline.teachers.base import TextEmbedding
from pipeline.teachers.flux2 import Flux2KleinTeacher

LATENT_CHANNELS, TEXT_CHANNELS = 16, 48
# Tap and number of timesteps; klein has 5 double and 20 single blocks.
CASES = (("hidden", 1), ("hidden", 4), ("hidden", 8), ("single.2", 4))


def save_teacher(folder: Path, heads: int) -> Path:
    """Write a diffusers folder of the FLUX.2 klein family whose text encoder and VAE are as small as they can be."""
    torch.manual_seed(0)
    qwen = Qwen3Config(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), latent_channels=LATENT_CHANNELS // 4, layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=LATENT_CHANNELS, num_layers=2, num_single_layers=8, attention_head_dim=128,
        num_attention_heads=heads, joint_attention_dim=TEXT_CHANNELS, guidance_embeds=False,
    )  # fmt: skip
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(qwen),
        tokenizer=Qwen2TokenizerFast(vocab={"<|endoftext|>": 0}, merges=[]),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def measure(teachers: dict[str, Flux2KleinTeacher], tap: str, steps: int, images: int, rounds: int) -> dict[str, Any]:
    """Time the passes of a batch; *_tokens: how many tokens go through the blocks for one image."""
    tokens = teachers["joint"].tap_shape(tap).tokens
    text_tokens = tokens // 2
    generator = torch.Generator().manual_seed(0)
    text = TextEmbedding(
        torch.randn(images, text_tokens, TEXT_CHANNELS, generator=generator), torch.zeros(images, 0)
    )
    context = torch.randn(images, tokens, LATENT_CHANNELS, generator=generator)
    noisy = torch.randn(images * steps, tokens, LATENT_CHANNELS, generator=generator)
    sigma = torch.linspace(0.9, 0.1, steps).repeat(images)
    seconds = in_turns(
        {name: partial(t.features, noisy, context, sigma, text, [tap]) for name, t in teachers.items()}, rounds
    )
    return {
        "tap": tap,
        "timesteps": steps,
        "images": images,
        "joint_tokens": steps * (text_tokens + 2 * tokens),
        "reused_tokens": 1 + tokens + steps * (text_tokens + tokens),
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2, help="images per batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a tiny workload, to see that everything works")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    side, heads = (64, 1) if args.small else (256, 3)
    with tempfile.TemporaryDirectory() as place:
        folder = save_teacher(Path(place), heads)
        teachers = {c: Flux2KleinTeacher(folder, resolution=side, context=c) for c in ("joint", "reused")}
    results = [measure(teachers, tap, steps, args.images, args.rounds) for tap, steps in CASES]
    shape = teachers["joint"].tap_shape("hidden")
    print(f"{shape.tokens} tokens x {shape.channels} channels, {args.images} images per batch, {args.rounds} rounds\n")
    rows = []
    for found in results:
        typical = {name: value / found["images"] for name, value in medians(found["seconds"]).items()}
        rows.append(
            (found["tap"], found["timesteps"], found["joint_tokens"], found["reused_tokens"],
             found["joint_tokens"] / found["reused_tokens"], typical["joint"], typical["reused"],
             f"{typical['joint'] / typical['reused']:.2f}")
        )  # fmt: skip
    print(table(
        ["tap", "timesteps", "tokens per image, joint", "reused", "ratio", "s per image, joint", "reused", "speed-up"],
        rows,
    ))  # fmt: skip
    if not args.small:
        save("context_reuse", {"tokens": shape.tokens, "channels": shape.channels, "cases": results})


if __name__ == "__main__":
    main()
