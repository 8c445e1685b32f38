"""Recipe of the demo teacher: `make demo-teacher`.

Trains a small FLUX (the real diffusers class), its VAE and its text encoders on procedural birds with random attribute
combinations. This stands in for web-scale pre-training: no class, label or split of the demo data set is used.
The result is a normal diffusers folder that `FluxKontextPipeline.from_pretrained` loads.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from tqdm import tqdm
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from pipeline.datasets.birds import describe, random_attributes, render_scene
from pipeline.inputs.views import object_view, resize_square
from pipeline.teachers.flux import image_ids
from pipeline.teachers.packing import pack_latents
from pipeline.teachers.pixels import to_signed

RESOLUTION = 48
TEXT_TOKENS = 40
# Scenes of the pre-training world have seeds of their own, so none is a scene of the demo data set.
PRETRAIN_WORLD = 7_000_001


def render_world(count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Render `count` birds: object views and context views (count, 3, 48, 48) uint8, and their captions."""
    objects, contexts, captions = [], [], []
    for i in tqdm(range(count), desc="render", unit="image"):
        rng = np.random.default_rng([PRETRAIN_WORLD, i])
        attributes = random_attributes(rng)
        image, box = render_scene(attributes, [PRETRAIN_WORLD, i, 1])
        objects.append(np.asarray(object_view(image, box, RESOLUTION)))
        contexts.append(np.asarray(resize_square(image, RESOLUTION)))
        captions.append(describe(attributes, rng))
    to_tensor = lambda arrays: torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()  # noqa: E731
    return to_tensor(objects), to_tensor(contexts), captions


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(vae: AutoencoderKL, images: Tensor, steps: int, batch: int) -> None:
    """L1 + small KL. Afterwards the latents are standardised through the VAE's own scaling and shift factors."""
    optimiser = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    vae.train().to(memory_format=torch.channels_last)
    bar = tqdm(range(steps), desc="VAE", unit="step")
    for _ in bar:
        x = to_signed(images[torch.randint(len(images), (batch,))]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.sample()).sample
        reconstruction = F.l1_loss(out.float(), x)
        loss = reconstruction + 3e-4 * posterior.kl().mean() / x[0].numel()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(l1=f"{reconstruction.item():.4f}")
    vae.eval()
    latents = encode(vae, images[:2048])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Raw latent modes (B, 8, 12, 12) in fp32."""
    return torch.cat(
        [vae.encode(to_signed(part)).latent_dist.mode() for part in tqdm(images.split(256), desc="encode")]
    )


def byte_level_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is single bytes: the real class, with no file to download."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=TEXT_TOKENS)


def build_text_encoders() -> tuple[CLIPTextModel, CLIPTokenizer, T5EncoderModel, ByT5Tokenizer]:
    clip_tokenizer = byte_level_clip_tokenizer()
    end = clip_tokenizer.eos_token_id
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=384,
            d_model=96,
            d_kv=24,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    return clip, clip_tokenizer, t5, ByT5Tokenizer(model_max_length=TEXT_TOKENS)


def build_transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=6,
        joint_attention_dim=96, pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    # adaLN-zero, as in DiT: every block starts as the identity.
    for name, parameter in model.named_parameters():
        if ((".norm" in name or name.startswith("norm_out")) and ".linear." in name) or name.startswith("proj_out."):
            torch.nn.init.zeros_(parameter)
    return model


def flow_batch(objects: Tensor, contexts: Tensor, rows: Tensor, with_context: bool) -> tuple[Tensor, ...]:
    """Noisy object tokens (+ clean context tokens), σ and the target ε − z_O (diffusers' sign)."""
    z = objects[rows]
    noise = torch.randn_like(z)
    sigma = torch.sigmoid(torch.randn(len(z)))
    noisy = (1 - sigma)[:, None, None] * z + sigma[:, None, None] * noise
    tokens = torch.cat([noisy, contexts[rows]], dim=1) if with_context else noisy
    return tokens, sigma, noise - z


def train_transformer(
    parts: dict, objects: Tensor, contexts: Tensor, captions: list[str], steps: int, batch: int, lr: float
) -> dict[str, float]:
    """Flow matching on object tokens; half of the batches see the context image; three captions in ten are empty."""
    model, clip, t5 = parts["transformer"], parts["clip"], parts["t5"]
    t5_ids = parts["t5_tokenizer"]([*captions, ""], padding="max_length", max_length=TEXT_TOKENS, truncation=True,
                                   return_tensors="pt").input_ids  # fmt: skip
    clip_ids = parts["clip_tokenizer"]([*captions, ""], padding="max_length", max_length=TEXT_TOKENS, truncation=True,
                                       return_tensors="pt").input_ids  # fmt: skip
    modules = torch.nn.ModuleList([model, clip, t5])
    optimiser = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.05)
    ema = torch.optim.swa_utils.AveragedModel(modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    ids = image_ids(RESOLUTION // 4 // 2, RESOLUTION // 4 // 2)
    context_ids = ids.clone()
    context_ids[:, 0] = 1
    txt_ids = torch.zeros(TEXT_TOKENS, 3)
    bar, running = tqdm(range(steps), desc="FLUX", unit="step"), math.nan
    for step in bar:
        rows = torch.randint(len(objects), (batch,))
        with_context = step % 2 == 0
        tokens, sigma, target = flow_batch(objects, contexts, rows, with_context)
        caption_rows = torch.where(torch.rand(batch) < 0.3, torch.tensor(len(captions)), rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = model(
                hidden_states=tokens,
                timestep=sigma,
                encoder_hidden_states=t5(t5_ids[caption_rows])[0],
                pooled_projections=clip(clip_ids[caption_rows]).pooler_output,
                txt_ids=txt_ids,
                img_ids=torch.cat([ids, context_ids]) if with_context else ids,
                return_dict=False,
            )[0][:, : objects.shape[1]]
        loss = F.mse_loss(velocity.float(), target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        ema.update_parameters(modules)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}")
    modules.load_state_dict(ema.module.state_dict())
    return {"flow_loss": running}


def save(output: Path, parts: dict, seconds: float, report: dict, arguments: dict) -> None:
    # The range of FLUX's resolution-dependent shift, moved down to token counts of this size.
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256)
    pipeline = FluxKontextPipeline(
        scheduler=scheduler,
        vae=parts["vae"],
        text_encoder=parts["clip"],
        tokenizer=parts["clip_tokenizer"],
        text_encoder_2=parts["t5"],
        tokenizer_2=parts["t5_tokenizer"],
        transformer=parts["transformer"],
    )
    pipeline.to(torch.bfloat16)  # half the bytes in the repository
    pipeline.save_pretrained(output, safe_serialization=True)
    # The wall-clock time is printed and not stored: the folder is the same whoever makes it.
    (output / "recipe.json").write_text(json.dumps({**arguments, **report}, indent=2, sort_keys=True) + "\n")
    print(f"demo teacher written to {output} in {seconds / 60:.1f} minutes: {report}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "teachers/demo_weights")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--vae-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=3_200)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.time()
    torch.manual_seed(args.seed)
    object_images, context_images, captions = render_world(args.images)
    vae = build_vae()
    train_vae(vae, torch.cat([object_images, context_images[::4]]), args.vae_steps, 64)
    scale = lambda z: pack_latents((z - vae.config.shift_factor) * vae.config.scaling_factor)  # noqa: E731
    objects, contexts = scale(encode(vae, object_images)), scale(encode(vae, context_images))
    clip, clip_tokenizer, t5, t5_tokenizer = build_text_encoders()
    parts = {"vae": vae, "clip": clip, "clip_tokenizer": clip_tokenizer, "t5": t5, "t5_tokenizer": t5_tokenizer,
             "transformer": build_transformer()}  # fmt: skip
    report = train_transformer(parts, objects, contexts, captions, args.steps, args.batch, args.lr)
    chosen = {k: v for k, v in vars(args).items() if k != "output"}
    save(args.output, parts, time.time() - started, report, chosen)


if __name__ == "__main__":
    main()
