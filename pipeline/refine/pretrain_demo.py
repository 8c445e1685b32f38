"""Recipe of the demo teacher: `make demo-teacher`.

Trains a small FLUX (the real diffusers class), its VAE and its text encoders on procedural birds with random attribute
combinations. This stands in for web-scale pre-training: no class, label or split of the demo data set is used. First
the transformer learns to paint a bird by what a few words say of it, by other photographs of it, by both or by neither,
as one that edits by reference (FLUX.1 Kontext); it never sees as context the photograph that it paints. Then it goes on
with new text encoders, and its tokens are also made to tell what bird it is (`Teller`): of a few thousand birds it
learns so what a large model learns of billions of captioned pictures, and painting alone does not teach in an hour.
The result is a normal diffusers folder that `FluxKontextPipeline.from_pretrained` loads.
"""

import argparse
import json
import math
import socket
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cache_schema.devices import multiplies_bfloat16
from pipeline.datasets.birds import ATTRIBUTES, COLOURS
from pipeline.refine.demo_text import build_text_encoders
from pipeline.refine.demo_world import (
    PAINTING,
    READING,
    READING_BY_NOISE,
    RESOLUTION,
    Draw,
    Latents,
    Stage,
    World,
    render_world,
)
from pipeline.teachers.flux import image_ids
from pipeline.teachers.packing import pack_latents
from pipeline.teachers.pixels import to_signed

# Whose tokens tell what the bird is like; blocks behind it have painting alone to do.
_TELLING_BLOCK = 2


def mixed_precision() -> torch.autocast:
    """bf16 where this CPU multiplies it; emulated it takes twelve times as long as float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=multiplies_bfloat16())


def average_gradients(module: torch.nn.Module) -> None:
    """Over the processes that train together."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    parts = (together / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


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
    bar = tqdm(range(steps), desc="VAE", unit="step", disable=dist.get_rank() > 0)
    for _ in bar:
        x = to_signed(images[torch.randint(len(images), (batch,))]).contiguous(memory_format=torch.channels_last)
        with mixed_precision():
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.sample()).sample
        reconstruction = F.l1_loss(out.float(), x)
        loss = reconstruction + 3e-4 * posterior.kl().mean() / x[0].numel()
        optimiser.zero_grad()
        loss.backward()
        average_gradients(vae)
        optimiser.step()
        schedule.step()
        bar.set_postfix(l1=f"{reconstruction.item():.4f}")
    vae.eval()
    latents = encode(vae, images[:2048])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Raw latent modes (B, 8, 12, 12) in fp32."""
    modes = []
    for part in tqdm(images.split(128), desc="encode", disable=dist.get_rank() > 0):
        with mixed_precision():
            seen = to_signed(part).contiguous(memory_format=torch.channels_last)
            modes.append(vae.encode(seen).latent_dist.mode().float())
    return torch.cat(modes)


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


class Teller(torch.nn.Module):
    """Reads from a block's tokens of the object what bird it is, and is thrown away afterwards.

    Tokens that are trained so know what they paint, as those aligned with an image encoder do (REPA, Yu et al., ICLR
    2025). Here the description stands in for the encoder, as the many captions of a large model's pictures would.
    """

    def __init__(self, width: int, levels: tuple[float, float]):
        """levels: of `Stage`."""
        super().__init__()
        self.counts = [len(values) for values in ATTRIBUTES.values()]
        self.colours = torch.tensor([values == tuple(COLOURS) for values in ATTRIBUTES.values()])
        self.levels = levels
        self.layers = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, 128),
            torch.nn.SiLU(),
            torch.nn.Linear(128, sum(self.counts)),
        )

    def forward(self, tokens: Tensor, attributes: Tensor, sigma: Tensor) -> Tensor:
        """tokens: (B, L, C); attributes: (B, 7); sigma: (B,). Returns the mean cross-entropy of what is to be told."""
        guesses = self.layers(tokens.mean(dim=1)).split(self.counts, dim=1)
        losses = [F.cross_entropy(g, a, reduction="none") for g, a in zip(guesses, attributes.T, strict=True)]
        clear, noisy = (sigma <= self.levels[0])[:, None], (sigma >= self.levels[1])[:, None]
        due = torch.where(self.colours, noisy, clear)
        return (torch.stack(losses, dim=1) * due).sum() / due.sum().clamp(min=1)


class Course:
    """Flow matching on the close-ups' tokens; transformer and text encoders learn together, their mean is kept."""

    def __init__(self, parts: dict, latents: Latents, world: World, stage: Stage):
        self.parts, self.latents, self.stage, self.attributes = parts, latents, stage, world.attributes
        self.teller = Teller(parts["transformer"].inner_dim, stage.levels)
        block = parts["transformer"].single_transformer_blocks[_TELLING_BLOCK]
        self.told = torch.empty(0)  # that block's tokens of the last pass
        block.register_forward_hook(lambda _module, _inputs, output: setattr(self, "told", output[1]))
        tokenise = partial(_tokenise, captions=[*world.captions, ""])
        self.clip_ids, self.t5_ids = tokenise(parts["clip_tokenizer"]), tokenise(parts["t5_tokenizer"])
        self.modules = torch.nn.ModuleList([parts["transformer"], parts["clip"], parts["t5"], self.teller])
        self.optimiser = torch.optim.AdamW(self.modules.parameters(), lr=stage.lr, weight_decay=0.01, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, stage.lr, total_steps=stage.steps, pct_start=0.05
        )
        mean = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
        self.ema = torch.optim.swa_utils.AveragedModel(self.modules, multi_avg_fn=mean)
        self.ids = image_ids(RESOLUTION // 4 // 2, RESOLUTION // 4 // 2)
        self.context_ids = self.ids.clone()
        self.context_ids[:, 0] = 1

    def losses(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Of the flow and of the teller."""
        length, tokens, ids = draw.noisy.shape[1], draw.noisy, self.ids
        t5_ids = self.t5_ids[draw.caption_rows]
        if draw.context is not None:
            tokens, ids = torch.cat([tokens, draw.context], dim=1), torch.cat([ids, self.context_ids])
        with mixed_precision():
            velocity = self.parts["transformer"](
                hidden_states=tokens,
                timestep=draw.sigma,
                encoder_hidden_states=self.parts["t5"](t5_ids)[0],
                pooled_projections=self.parts["clip"](self.clip_ids[draw.caption_rows]).pooler_output,
                txt_ids=torch.zeros(t5_ids.shape[1], 3),
                img_ids=ids,
                return_dict=False,
            )[0][:, :length]
            telling = self.teller(self.told[:, :length], self.attributes[draw.bird], draw.sigma)
        return F.mse_loss(velocity.float(), draw.target), telling.float()

    def run(self, batch: int, keep: Callable[[dict], None], every: int) -> None:
        """Train; hand the report to `keep` every so many steps, with the mean's weights in the parts meanwhile."""
        steps, running = range(1, self.stage.steps + 1), torch.full((2,), math.nan)
        bar = tqdm(steps, desc="FLUX", unit="step", disable=dist.get_rank() > 0)
        for step in bar:
            # Of one kind in all processes, so that none waits for another.
            with_context = step % 10 >= 10 * self.stage.no_context
            flow, telling = self.losses(self.latents.draw(batch, with_context, self.stage))
            loss = flow + self.stage.telling * telling
            self.optimiser.zero_grad()
            loss.backward()
            average_gradients(self.modules)
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimiser.step()
            self.schedule.step()
            self.ema.update_parameters(self.modules)
            now = torch.stack([flow, telling]).detach()
            running = now if step == 1 else torch.lerp(running, now, 0.02)
            bar.set_postfix(flow=f"{running[0]:.4f}", telling=f"{running[1]:.3f}")
            if step == self.stage.steps or (every and step % every == 0):
                learnt = deepcopy(self.modules.state_dict())
                self.modules.load_state_dict(self.ema.module.state_dict())
                keep({"flow_loss": running[0].item(), "telling_loss": running[1].item(), "steps_done": step})
                self.modules.load_state_dict(learnt)


def _tokenise(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def save(output: Path, parts: dict, report: dict) -> None:
    """Write a diffusers folder in bfloat16, half the bytes in the repository, and what made it as recipe.json."""
    # The range of FLUX's resolution-dependent shift, moved down to token counts of this size.
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256)
    # Copies, since the originals may go on training.
    halved = {name: deepcopy(parts[name]).to(torch.bfloat16) for name in ("vae", "clip", "t5", "transformer")}
    pipeline = FluxKontextPipeline(
        scheduler=scheduler,
        vae=halved["vae"],
        text_encoder=halved["clip"],
        tokenizer=parts["clip_tokenizer"],
        text_encoder_2=halved["t5"],
        tokenizer_2=parts["t5_tokenizer"],
        transformer=halved["transformer"],
    )
    pipeline.save_pretrained(output, safe_serialization=True)
    # The wall-clock time is printed and not stored: the folder is the same whoever makes it.
    (output / "recipe.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def as_latents(vae: AutoencoderKL, world: World) -> Latents:
    """A world through the VAE, standardised and packed into tokens."""

    def tokens(images: Tensor) -> Tensor:
        raw = encode(vae, images.flatten(0, 1))
        packed = pack_latents((raw - vae.config.shift_factor) * vae.config.scaling_factor)
        return packed.unflatten(0, images.shape[:2])

    return Latents(tokens(world.objects), tokens(world.scenes))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def first_parts(seed: int) -> dict:
    """Of a teacher that has learnt nothing."""
    torch.manual_seed(seed)  # the same weights in all processes
    return {"vae": build_vae(), **text_parts(PAINTING), "transformer": build_transformer()}


def parts_of(folder: Path, seed: int) -> dict:
    """Of a teacher that can paint, with text encoders that have learnt nothing."""
    torch.manual_seed(seed)
    painter = FluxKontextPipeline.from_pretrained(str(folder), torch_dtype=torch.float32)
    # Built anew, since models that were read say in their config where from.
    vae, transformer = build_vae().eval(), build_transformer()
    vae.load_state_dict(painter.vae.state_dict())
    vae.register_to_config(**{name: painter.vae.config[name] for name in ("shift_factor", "scaling_factor")})
    transformer.load_state_dict(painter.transformer.state_dict())
    return {"vae": vae, **text_parts(READING), "transformer": transformer}


def text_parts(stage: Stage) -> dict:
    return dict(zip(("clip", "clip_tokenizer", "t5", "t5_tokenizer"), build_text_encoders(stage.words), strict=True))


def pretrain(rank: int, args: argparse.Namespace, first: Path | None, output: Path, port: int) -> None:
    """What each of the processes does in a stage; they see the same world, draw differently and learn the same.

    first: what the stage before left, if there was one.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.processes)
    batch, stage = args.batch // args.processes, PAINTING
    if first:
        stage = READING_BY_NOISE if args.by_noise else READING
    stage = replace(stage, steps=args.steps or stage.steps)
    parts = parts_of(first, args.seed) if first else first_parts(args.seed)
    torch.manual_seed(1000 * args.seed + rank)  # other draws in each
    world = render_world(args.birds, stage, quiet=rank > 0)
    if not first:
        seen = torch.cat([world.objects.flatten(0, 1), world.scenes[::4].flatten(0, 1)])
        train_vae(parts["vae"], seen, args.vae_steps, batch)
    course = Course(parts, as_latents(parts["vae"], world), world, stage)
    chosen = {"birds": args.birds, "batch": args.batch, "processes": args.processes, "seed": args.seed,
              **({} if first else {"vae_steps": args.vae_steps}), **asdict(stage)}  # fmt: skip
    before = json.loads((first / "recipe.json").read_text())["stages"] if first else []

    def keep(report: dict) -> None:
        if rank == 0:
            save(output, parts, {"stages": [*before, {**chosen, **report}]})

    course.run(batch, keep, args.save_every)
    dist.destroy_process_group()


def is_finished(painter: Path) -> bool:
    """Whether the first stage left here what it ends with, and not a copy on the way."""
    recipe = painter / "recipe.json"
    if not recipe.exists():
        return False
    stage = json.loads(recipe.read_text())["stages"][0]
    return stage["steps_done"] == stage["steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "teachers/demo_weights")
    parser.add_argument("--painter", type=Path, help="folder to keep what the first stage leaves, or to take it from")
    parser.add_argument("--by-noise", action="store_true", help="have it tell colours in noise and shapes without")
    parser.add_argument("--birds", type=int, default=6_000)
    parser.add_argument("--vae-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, help="of each stage (default: as many as it has)")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=400, help="steps between copies of what is learnt so far")
    parser.add_argument("--processes", type=int, default=2, help="that share a batch, one thread each")
    args = parser.parse_args()
    started = time.time()
    with TemporaryDirectory() as folder:
        painter = args.painter or Path(folder)
        if not is_finished(painter):
            torch.multiprocessing.spawn(pretrain, (args, None, painter, free_port()), args.processes)
        torch.multiprocessing.spawn(pretrain, (args, painter, args.output, free_port()), args.processes)
    print(f"demo teacher written to {args.output} in {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
