"""`dit-cache build` against a straightforward diffusers script that makes the same features.

`python -m benchmarks.teacher_speed`. The script does, per image and timestep, what one would write first: embed the
caption, encode object and context, run the whole transformer, take the tokens of one block through a hook, save them.
Both run in turns in one process on the same images, of the demo data, and what they save is compared. Teachers are
small FLUX.1 models of the real classes: the demo teacher, and one whose text encoder, VAE and transformer share the
work about as FLUX.1's do. The share is counted with PyTorch's FLOP counter for both, and for FLUX.1 itself on the
`meta` device, with what follows for it: were the time per FLOP equal, the script would take so many times the build's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from benchmarks.measure import save, table
from cache_schema import open_cache
from pipeline.build.config import BuildConfig
from pipeline.build.run import build
from pipeline.build.source import wanted_of
from pipeline.curriculum import add_noise, sample_noise
from pipeline.datasets import open_dataset
from pipeline.datasets.base import Dataset, Sample
from pipeline.inputs.condition_store import ConditionStore
from pipeline.inputs.conditions import caption_of
from pipeline.inputs.decoding import decode_with_box
from pipeline.inputs.feature_source import teacher_features
from pipeline.inputs.views import object_view, resize_square
from pipeline.refine.demo_text import build_text_encoders
from pipeline.teachers import quiet_libraries
from pipeline.teachers.architecture import Place
from pipeline.teachers.capture import capture
from pipeline.teachers.flux import FluxTeacher, image_ids
from pipeline.teachers.pixels import to_signed

TIMESTEPS = (10, 16, 22, 28)
DEMO = Path(__file__).parents[1] / "pipeline/teachers/demo_weights"


def save_proportioned(folder: Path) -> Path:
    """A FLUX of 25 M parameters whose text encoder, VAE and transformer share the work about as FLUX.1's do."""
    torch.manual_seed(0)
    _, clip_tokenizer, _, t5_tokenizer = build_text_encoders()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=clip_tokenizer.model_max_length,
            bos_token_id=clip_tokenizer.bos_token_id, eos_token_id=clip_tokenizer.eos_token_id,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer), d_model=256, d_kv=64, d_ff=640, num_layers=6, num_heads=4,
                 feed_forward_proj="gated-gelu")
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, layers_per_block=1, norm_num_groups=8,
        mid_block_add_attention=False, scaling_factor=0.36, shift_factor=0.12,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=4, num_single_layers=8, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=256, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, text_encoder=clip,
        tokenizer=clip_tokenizer, text_encoder_2=t5, tokenizer_2=t5_tokenizer, transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@torch.no_grad()
def script(
    pipe: FluxKontextPipeline, teacher: FluxTeacher, dataset: Dataset, samples: Sequence[Sample], block: int, to: Path
) -> None:
    """What one would write first. teacher: only for the noise levels and the size of the views."""
    to.mkdir()
    rows, columns = teacher.grid
    ids = torch.cat([image_ids(rows, columns), image_ids(rows, columns, stream=1)])
    sigmas = teacher.sigmas(28)
    kept = {}
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    hook = blocks[block].register_forward_hook(lambda module, args, output: kept.update(tokens=output[1]))

    def latents(image) -> torch.Tensor:
        pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]
        z = pipe.vae.encode(to_signed(pixels)).latent_dist.mode()
        z = (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        return pipe._pack_latents(z, *z.shape)

    for sample in samples:
        for p in TIMESTEPS:
            image, box = decode_with_box(dataset.read(sample), sample.box)
            caption = caption_of(sample, dataset.superclass)
            text, pooled, text_ids = pipe.encode_prompt(
                caption, None, max_sequence_length=pipe.tokenizer_2.model_max_length
            )
            clean = latents(object_view(image, box, teacher.resolution))
            context = latents(resize_square(image, teacher.resolution))
            sigma = torch.tensor([sigmas[p - 1]])
            noisy = add_noise(clean, sample_noise(sample.id, "canonical", 0, tuple(clean.shape[1:]))[None], sigma)
            pipe.transformer(
                hidden_states=torch.cat([noisy, context], dim=1), timestep=sigma, pooled_projections=pooled,
                encoder_hidden_states=text, txt_ids=text_ids, img_ids=ids,
            )  # fmt: skip
            torch.save(kept["tokens"][0, : rows * columns].to(torch.bfloat16), to / f"{sample.id}-{p}.pt")
    hook.remove()


def forward_seconds(
    teacher: FluxTeacher, store: ConditionStore, samples: Sequence[Sample], config: BuildConfig
) -> float:
    """The teacher's forward passes alone, conditions in memory."""
    sigmas = [teacher.sigmas(28)[p - 1] for p in TIMESTEPS]
    batches = [samples[i : i + config.batch_images] for i in range(0, len(samples), config.batch_images)]
    conditions = [{"canonical": store.read(batch, "canonical")} for batch in batches]
    started = time.perf_counter()
    for batch, given in zip(batches, conditions, strict=True):
        teacher_features(teacher, batch, given, wanted_of(config, sigmas))
    return time.perf_counter() - started


def compare(saved: Path, cache: Path, tap: str) -> float:
    """The least cosine between what the two saved, over images and timesteps."""
    opened = open_cache(cache)
    ids = opened.samples["id"].to_pylist()
    least = 1.0
    for row in range(len(opened)):
        ours = opened.read([row], tap=tap).decode()[0].flatten(1)
        theirs = torch.stack([torch.load(saved / f"{ids[row]}-{p}.pt", weights_only=True) for p in TIMESTEPS])
        least = min(least, torch.cosine_similarity(ours, theirs.float().flatten(1)).min().item())
    return least


def measure(folder: Path, resolution: int, tap: str, images: int, rounds: int, place: Path) -> dict[str, float | str]:
    """Script and build in turns; seconds are medians of the rounds."""
    teacher = FluxTeacher(folder, resolution=resolution)
    dataset = open_dataset("demo", None, images)
    samples = [s for s in dataset.samples if s.split == "train"]
    pipe = FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32)
    config = BuildConfig(
        taps=(tap,), timesteps=TIMESTEPS, feature_splits=("train",), encoding="bfloat16", with_images=False
    )
    seconds: dict[str, list[float]] = {"script": [], "build": [], "build again": [], "forward": []}
    for turn in range(rounds + 1):
        root = place / f"{tap}-{turn}"
        root.mkdir()
        found = {}
        started = time.perf_counter()
        script(pipe, teacher, dataset, samples, teacher.architecture.block(tap, "demo"), root / "script")
        found["script"] = time.perf_counter() - started
        for name in ("build", "build again"):  # the second finds captions and latents on the disk
            started = time.perf_counter()
            build(teacher, dataset, config, root / name.replace(" ", "-"), log=lambda line: None)
            found[name] = time.perf_counter() - started
        store = ConditionStore(root / "conditions", teacher, dataset)
        store.prepare(samples)
        found["forward"] = forward_seconds(teacher, store, samples, config)
        cosine = compare(root / "script", root / "build", tap)
        if turn:  # the first pays for loading
            for name, value in found.items():
                seconds[name].append(value)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {"tap": tap, "images": len(samples), "least_cosine": cosine, **middle}


def flops(transformer, t5, vae, text: int, tokens: int, side: int) -> dict[str, float]:
    """FLOPs of one caption, of the two views of one image, and of one forward pass, whole and to half depth."""
    device = next(transformer.parameters()).device
    found = {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        t5(torch.zeros(1, text, dtype=torch.long, device=device))
    found["text"] = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encoder(torch.zeros(2, 3, side, side, device=device))
    found["latents"] = counter.get_total_flops()
    config = transformer.config
    inputs = {
        "hidden_states": torch.zeros(1, 2 * tokens, config.in_channels, device=device),
        "encoder_hidden_states": torch.zeros(1, text, config.joint_attention_dim, device=device),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim, device=device),
        "timestep": torch.zeros(1, device=device),
        "img_ids": torch.zeros(2 * tokens, 3, device=device),
        "txt_ids": torch.zeros(text, 3, device=device),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.zeros(1, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer(**inputs)
    found["forward"] = counter.get_total_flops()
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    middle = {"middle": Place(len(blocks) // 2 - 1)}
    with torch.no_grad(), FlopCounterMode(display=False) as counter, capture(blocks, middle, leave_early=True):
        transformer(**inputs)
    return {**found, "to the middle": counter.get_total_flops()}


def flux1_flops() -> dict[str, float]:
    """The same of FLUX.1 at 512 px, on the meta device."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        t5 = T5EncoderModel(
            T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                     feed_forward_proj="gated-gelu")
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, layers_per_block=2,
        )  # fmt: skip
    return flops(transformer, t5, vae, 512, 1024, 512)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--teachers", default="demo,proportioned", help="demo, proportioned or both")
    args = parser.parse_args(argv)
    quiet_libraries()
    results = []
    shares = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        teachers = {"demo": (DEMO, 48), "proportioned": (save_proportioned(place / "teacher"), 128)}
        for label, (folder, resolution) in teachers.items():
            if label not in args.teachers.split(","):
                continue
            loaded = FluxTeacher(folder, resolution=resolution)
            count = loaded.grid[0] * loaded.grid[1]
            text = loaded.text_pipe.tokenizer_2.model_max_length
            shares[label] = flops(
                loaded.transformer, loaded.text_pipe.text_encoder_2, loaded.vae, text, count, resolution
            )
            depth = len(loaded.architecture.taps())
            for tap in (loaded.architecture.taps()[depth // 2 - 1], "hidden"):
                (place / label).mkdir(exist_ok=True)
                found = measure(folder, resolution, tap, args.images, args.rounds, place / label)
                results.append({"teacher": label, "depth": depth, **found})
        shares["FLUX.1 at 512 px"] = flux1_flops()
    print(f"\n{args.images} images at {len(TIMESTEPS)} timesteps, features saved as bfloat16, one process\n")
    print(table(
        ["teacher", "tap", "script, s", "build, s", "script / build", "again / forward passes", "least cosine"],
        [(r["teacher"], f"{r['tap']} of {r['depth']} blocks", f"{r['script']:.1f}", f"{r['build']:.1f}",
          f"{r['script'] / r['build']:.2f}", f"{r['build again'] / r['forward']:.3f}", f"{r['least_cosine']:.5f}")
         for r in results],
    ))  # fmt: skip
    print("\nWhere the work is: FLOPs of one step of the script, and what they alone would give\n")
    rows = []
    for label, share in shares.items():
        step = share["text"] + share["latents"] + share["forward"]
        T = len(TIMESTEPS)
        encoders = share["text"] + share["latents"]
        gains = [T * step / (encoders + T * share[part]) for part in ("to the middle", "forward")]
        rows.append((label, f"{100 * share['text'] / step:.1f} %", f"{100 * share['latents'] / step:.1f} %",
                     f"{100 * share['forward'] / step:.1f} %", *(f"{gain:.2f}" for gain in gains)))  # fmt: skip
    print(table(["teacher", "text", "latents", "forward", "gain at half depth", "gain at hidden"], rows))
    save("teacher_speed", {"timesteps": TIMESTEPS, "runs": results, "flops": shares})


if __name__ == "__main__":
    main()
