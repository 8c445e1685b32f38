"""Tiny models with random weights of the real classes, saved as the diffusers folders of the other families."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pipeline.build.source import wanted_of
from pipeline.inputs.conditions import Conditions, captions_of, read_pixels
from pipeline.inputs.feature_source import teacher_features
from pipeline.refine.demo_text import TEXT_TOKENS, build_text_encoders, byte_level_clip_tokenizer
from pipeline.teachers.base import TextEmbedding

# As Qwen3's own template behaves with enable_thinking=False: an empty thought opens the answer.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN_TOKENS = 64


def byte_level_qwen_tokenizer() -> Qwen2TokenizerFast:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocab = {token: i for i, token in enumerate([*bytes_to_unicode().values(), special[0]])}
    tokenizer = Qwen2TokenizerFast(vocab=vocab, merges=[], model_max_length=QWEN_TOKENS)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def spread(module: torch.nn.Module, std: float) -> None:
    """Larger weights than libraries start with, so that text, context and position all show in the output."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, std)


def save_tiny_klein(folder: Path, seed: int = 0, pipeline: type = Flux2KleinPipeline) -> Path:
    torch.manual_seed(seed)
    tokenizer = byte_level_qwen_tokenizer()
    qwen = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=28,  # the pipeline reads hidden states 9, 18 and 27
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.normal_(0, 0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    spread(qwen, 0.2)
    spread(transformer, 0.15)
    pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def build_projecting_clip(width: int, tokenizer) -> CLIPTextModelWithProjection:
    end = tokenizer.eos_token_id
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=TEXT_TOKENS, projection_dim=width,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip


def save_tiny_sd3(folder: Path, seed: int = 0, with_t5: bool = True, dynamic_shifting: bool = False) -> Path:
    torch.manual_seed(seed)
    clips = [byte_level_clip_tokenizer() for _ in range(2)]
    _, _, t5, t5_tokenizer = build_text_encoders()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5, shift_factor=0.06,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, caption_projection_dim=32, pooled_projection_dim=48, pos_embed_max_size=12,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    spread(transformer, 0.15)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shifting),
        vae=vae,
        text_encoder=build_projecting_clip(16, clips[0]),
        tokenizer=clips[0],
        text_encoder_2=build_projecting_clip(32, clips[1]),
        tokenizer_2=clips[1],
        text_encoder_3=t5 if with_t5 else None,
        tokenizer_3=t5_tokenizer if with_t5 else None,
    ).save_pretrained(folder)
    return folder


def encode_conditions(teacher, dataset, samples, view, use_captions=True) -> Conditions:
    """The conditions of a batch, without a store: each sample encoded alone."""
    parts = []
    for sample in samples:
        pixels = read_pixels(dataset, [sample], teacher.resolution, [view])[view]
        pair = teacher.encode_images(torch.cat([pixels.object, pixels.context]))
        parts.append((pair[:1], pair[1:], teacher.encode_text(captions_of(dataset, [sample], use_captions))))
    text = TextEmbedding(torch.cat([t.tokens for *_, t in parts]), torch.cat([t.pooled for *_, t in parts]))
    return Conditions(torch.cat([o for o, *_ in parts]), torch.cat([c for _, c, _ in parts]), text)


def direct_features(teacher, dataset, samples, config, sigmas) -> dict[str, torch.Tensor]:
    """What a build would cache of a batch, without a store."""
    conditions = {v: encode_conditions(teacher, dataset, samples, v, config.text == "caption") for v in config.views}
    return teacher_features(teacher, samples, conditions, wanted_of(config, sigmas))
