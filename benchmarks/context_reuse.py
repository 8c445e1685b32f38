"""What it saves to compute the context once per image instead of once per timestep.

`python -m benchmarks.context_reuse`. The forward passes of a build, text and latents at hand, with a small FLUX.2 of
the real class: klein's proportions of double to single blocks and of text to image tokens, random weights. The same
weights run with a joint and with a reused context, in turns, each in a process of its own with one thread.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.measure import Work, in_turns_apart, medians, save, table
from pipeline.teachers.base import ContextMode, TextEmbedding
from pipeline.teachers.flux2 import Flux2KleinTeacher

LATENT_CHANNELS, TEXT_CHANNELS = 16, 48
MODES: tuple[ContextMode, ...] = ("joint", "reused")
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


def prepare(folder: Path, context: ContextMode, side: int, images: int) -> dict[str, Work]:
    """Load the teacher with this kind of context; its ways of working are the cases, each counting images."""
    torch.set_num_threads(1)
    teacher = Flux2KleinTeacher(folder, resolution=side, context=context)
    tokens = teacher.tap_shape("hidden").tokens
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(images, tokens // 2, TEXT_CHANNELS, generator=generator)
    clean = torch.randn(images, tokens, LATENT_CHANNELS, generator=generator)

    def work(tap: str, steps: int) -> float:
        noisy = torch.randn(images * steps, tokens, LATENT_CHANNELS, generator=generator)
        sigma = torch.linspace(0.9, 0.1, steps).repeat(images)
        teacher.features(noisy, clean, sigma, TextEmbedding(text, torch.zeros(images, 0)), [tap])
        return images

    return {case_name(tap, steps): partial(work, tap, steps) for tap, steps in CASES}


def case_name(tap: str, steps: int) -> str:
    return f"{tap}, {steps} timesteps"


def tokens_per_image(context: ContextMode, tokens: int, steps: int) -> int:
    """How many tokens go through the blocks for one image; text has half as many as a view."""
    text = tokens // 2
    # Alone, the context has one token in place of its text.
    return steps * (text + 2 * tokens) if context == "joint" else 1 + tokens + steps * (text + tokens)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1, help="images per batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a tiny workload, to see that everything works")
    args = parser.parse_args(argv)
    side, heads = (64, 1) if args.small else (256, 3)
    with tempfile.TemporaryDirectory() as place:
        folder = save_teacher(Path(place), heads)
        contenders = {c: partial(prepare, folder, c, side, args.images) for c in MODES}
        rates = in_turns_apart(contenders, args.rounds, least_seconds=0.001 if args.small else 0.2)
    tokens, rows = (side // 16) ** 2, []
    for tap, steps in CASES:
        typical = {c: medians(rates[c])[case_name(tap, steps)] for c in MODES}
        joint, reused = (tokens_per_image(c, tokens, steps) for c in MODES)
        speed_up = f"{typical['reused'] / typical['joint']:.2f}"
        rows.append((tap, steps, joint, reused, joint / reused, *typical.values(), speed_up))
    print(f"{tokens} tokens x {128 * heads} channels, batches of {args.images}, medians of {args.rounds} rounds\n")
    print(table(
        ["tap", "timesteps", "tokens per image, joint", "reused", "ratio", "images/s, joint", "reused", "speed-up"],
        rows,
    ))  # fmt: skip
    if not args.small:
        save("context_reuse", {"tokens": tokens, "channels": 128 * heads, "images_per_second": rates})


if __name__ == "__main__":
    main()
