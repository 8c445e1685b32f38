"""The generative injection module (GIM): lets the student's embedding read the teacher's features.

Shapes: B images, P curriculum timesteps, L teacher tokens of C_t channels, k queries, C student channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from trainer.errors import TrainError
from trainer.methods.gcd.config import GimConfig
from trainer.models.components import PrincipalComponents, by_kind, of_kinds
from trainer.models.discriminant import Discriminant
from trainer.models.weights import load_weights

GIM_FILE = "gim.safetensors"  # of a run's folder


class Attention(nn.Module):
    """Multi-head attention of `x` (N, X, C) over a context (N, L, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Keys and values (N, H, L, C/H), as `keys_and_values` gives them."""
        read = F.scaled_dot_product_attention(self._queries(x), keys, values)  # (N, H, X, C/H)
        return self.out(read.transpose(1, 2).flatten(2))  # (N, X, C)

    def weights(self, x: Tensor, keys: Tensor) -> Tensor:
        """How much of each token is read, mean over heads: (N, X, L), of which every row sums to 1."""
        logits = self._queries(x) @ keys.transpose(-1, -2)  # (N, H, X, L)
        return (logits / keys.shape[-1] ** 0.5).softmax(-1).mean(1)

    def _queries(self, x: Tensor) -> Tensor:
        return self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, H, X, C/H)


def keys_and_values(attentions: Sequence[Attention], context: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (N, H, L, C/H) of one context (N, L, C) for every one of several attentions that read it.

    Each has weights of its own, by design; they are laid side by side, so that the context, by far the largest
    tensor there is, goes through one matrix product whatever the number of layers, and its gradient comes from one.
    """
    first, *others = attentions
    weight: Tensor = first.key_value.weight
    bias: Tensor = first.key_value.bias
    if others:
        weight = torch.cat([attention.key_value.weight for attention in attentions])
        bias = torch.cat([attention.key_value.bias for attention in attentions])
    both = F.linear(context, weight, bias).unflatten(-1, (2 * len(attentions), first.heads, -1))  # (N, L, 2n, H, C/H)
    parts = both.permute(2, 0, 3, 1, 4).unbind(0)
    return list(zip(parts[::2], parts[1::2], strict=True))


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, ratio: float):
        hidden = int(dim * ratio)
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class BridgingLayer(nn.Module):
    """One layer of E_b: the queries read the teacher's tokens (pre-norm cross-attention, then a FFN)."""

    def __init__(self, dim: int, heads: int, ffn_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.ffn = FeedForward(dim, ffn_ratio)
        self.drop = DropPath(drop_path)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries = queries + self.drop(self.attention(self.norm(queries), keys, values))  # (N, k, C)
        return queries + self.drop(self.ffn(queries))


class InfusionLayer(nn.Module):
    """One layer of E_f: pre-norm self-attention, then a FFN."""

    def __init__(self, dim: int, heads: int, ffn_ratio: float, drop_path: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.ffn = FeedForward(dim, ffn_ratio)
        self.drop = DropPath(drop_path)

    def forward(self, sequence: Tensor, outputs: int | None = None) -> Tensor:
        """(N, 1+k, C) -> (N, outputs, C): the last layer need not compute tokens that nobody reads."""
        context = self.norm(sequence)
        ((keys, values),) = keys_and_values([self.attention], context)
        x = sequence[:, :outputs] + self.drop(self.attention(context[:, :outputs], keys, values))
        return x + self.drop(self.ffn(x))


class TokenEncoder(nn.Module):
    """Teacher tokens into the student's width, marked with where they sit and how noisy they were."""

    shift: Tensor
    scale: Tensor

    def __init__(self, tokens: int, channels: int, dim: int, timesteps: int, config: GimConfig):
        super().__init__()
        self.normalisation = config.token_norm
        self.dropout = config.token_dropout
        inputs = channels
        if config.token_norm == "whiten":
            inputs = min(config.token_components, channels)
            self.components = PrincipalComponents(timesteps, channels, inputs, power=0.5)
        elif self.normalisation == "standardize":
            self.register_buffer("shift", torch.zeros(timesteps, 1, channels))
            self.register_buffer("scale", torch.ones(timesteps, 1, channels))
        else:
            self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(inputs, dim)
        self.position = _embedding(config.position_embedding, tokens, dim)
        self.timestep = _embedding(config.timestep_embedding, timesteps, 1, dim)
        # The context of every bridging layer is the same, so it is normalised once, here.
        self.out_norm = nn.LayerNorm(dim)

    def fit(self, samples: Iterable[Tensor]) -> None:
        """Measure per-timestep channel statistics over samples (B, P, L, C_t), one image at a time.

        Not for "layer": a DiT's hidden states carry a few huge channels, which alone decide a LayerNorm's scale.
        Beside the batch itself, this takes memory for the float64 values of one image alone.
        """
        if self.normalisation == "whiten":
            self.components.fit(image.unsqueeze(0) for batch in samples for image in batch)
        if self.normalisation != "standardize":
            return
        count, mean, squares = 0, self.shift.new_zeros(self.shift.shape, dtype=torch.float64), None
        for batch in samples:
            for image in batch:  # Chan's update of mean and squared deviations: no sum of squares to cancel
                n = image.shape[1]  # L
                own_variance, own = torch.var_mean(image.double(), 1, correction=0, keepdim=True)  # (P, 1, C_t) each
                step, share = own - mean, n / (count + n)
                squares = own_variance * n if squares is None else squares + own_variance * n
                squares = squares + step.square() * (count * share)
                mean = mean + step * share
                count += n
        if squares is not None and count > 1:
            self.shift.copy_(mean)
            self.scale.copy_((squares / (count - 1)).sqrt().clamp_min(1e-6).reciprocal())

    def no_weight_decay(self) -> set[str]:
        """Where weight decay would do harm."""
        return {"position", "timestep"}

    def forward(self, tokens: Tensor, drawn: Tensor | None = None) -> Tensor:
        """(B, P, L, C_t) -> (B, P, L, C); with token dropout, in training, fewer of them.

        `drawn` (B, P): which timesteps the tokens are of, where they are not all, in order.
        """
        x = self.project(self._normalised(tokens, drawn))  # (B, P, L, C)
        if self.position is not None:
            x = x + self.position  # (L, C)
        if self.timestep is not None:
            x = x + of_kinds(self.timestep, drawn)  # (P, 1, C) or (B, P, 1, C)
        return self.out_norm(self._some(x))

    def _normalised(self, tokens: Tensor, drawn: Tensor | None) -> Tensor:
        if self.normalisation == "whiten":
            return self.components(tokens, drawn)
        if self.normalisation == "standardize":
            return (tokens - of_kinds(self.shift, drawn)) * of_kinds(self.scale, drawn)
        return _normalised_as_they_are(self.norm, tokens)

    def _some(self, x: Tensor) -> Tensor:
        """A random part of the tokens, another for each image and timestep: (B, P, L, C) -> (B, P, kept, C).

        Source: Liu et al., "PatchDropout", WACV 2023.
        """
        if not (self.training and self.dropout):
            return x
        kept = max(1, round(x.shape[2] * (1 - self.dropout)))
        chosen = torch.rand(x.shape[:3], device=x.device).argsort(2)[:, :, :kept]  # (B, P, kept)
        return x.gather(2, chosen.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def _normalised_as_they_are(norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
    """LayerNorm in the type of its input; its sums are float32 all the same.

    Autocast would have it write bfloat16 tokens as float32, the largest tensor of a step twice as large, which the
    projection then turns back.
    """
    if tokens.dtype == norm.weight.dtype:
        return norm(tokens)
    with torch.autocast(tokens.device.type, enabled=False):
        weight, bias = norm.weight.to(tokens.dtype), norm.bias.to(tokens.dtype)
        return F.layer_norm(tokens, norm.normalized_shape, weight, bias, norm.eps)


class Shortcut(nn.Module):
    """Pooled teacher tokens, linearly: principal components, trained from there on, or a discriminant, that stays.

    What the GIM makes of the tokens starts as nothing beside it and has to earn its place. Source of the gate: ReZero
    (Bachlechner et al., UAI 2021).
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, timesteps: int, channels: int, dim: int, stays: bool = False):
        super().__init__()
        self.stays = stays
        self.register_buffer("mean", torch.zeros(timesteps, 1, channels))
        weight = torch.zeros(timesteps, channels, dim)
        if stays:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)
        self.gate = nn.Parameter(torch.zeros(()))

    def no_weight_decay(self) -> set[str]:
        """Where weight decay would do harm."""
        return {"gate"}

    @torch.no_grad()
    def fit(self, samples: Iterable[Tensor], labelled: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start from samples (B, P, L, C_t), pooled over L; a discriminant from those with labels (B,)."""
        timesteps, channels, dim = self.weight.shape
        if self.stays:
            head = Discriminant(timesteps, channels, dim).to(self.weight.device)
            head.fit((tokens.float().mean(2), labels) for tokens, labels in labelled)
            self.mean.copy_(head.mean)
            self.weight.copy_(head.weight)
            return
        components = PrincipalComponents(timesteps, channels, dim, power=0.5).to(self.weight.device)
        components.fit(tokens.float().mean(2, keepdim=True) for tokens in samples)
        self.mean.copy_(components.mean)
        self.weight.copy_(components.directions)

    def forward(self, tokens: Tensor, drawn: Tensor | None = None) -> Tensor:
        """(B, P, L, C_t) -> (B, P, dim); `drawn` as of the tokens' encoder."""
        pooled = tokens.mean(2, keepdim=True, dtype=torch.float32) - of_kinds(self.mean, drawn)  # (B, P, 1, C_t)
        return by_kind(pooled, self.weight.to(pooled.dtype), drawn).squeeze(2)


class GenerativeInjectionModule(nn.Module):
    """E_D,t = first token of E_f([E_R ; E_b(E_Q, E_O,t)]), for all P timesteps in one call, or those drawn of them.

    Source: DiT-Distill, CVPR 2026, GIM.
    """

    def __init__(
        self, tokens: int, channels: int, dim: int, timesteps: int, config: GimConfig, out_dim: int | None = None
    ):
        """`tokens` L and `channels` C_t are the tap's, `dim` C the student's, `timesteps` their number P.

        Inside, the GIM is `config.width` wide, by default C; E_D is `out_dim` wide, by default C too.
        """
        super().__init__()
        student_dim, dim, out_dim = dim, config.width or dim, out_dim or dim
        heads = config.heads or _default_heads(dim)
        if dim % heads:
            whose = "the GIM's" if config.width else "the student's"
            raise TrainError(f"gim.heads: {heads} heads do not divide {whose} {dim} channels")
        self.config = config
        self.shape = (timesteps, tokens, channels)
        self.tokens = TokenEncoder(tokens, channels, dim, timesteps, config)
        self.queries = _embedding(config.bridge_layers > 0, config.queries, dim)
        self.mask_token = nn.Parameter(_small_random(dim))
        self.bridge_layers = nn.ModuleList(
            BridgingLayer(dim, heads, config.ffn_ratio, config.drop_path) for _ in range(config.bridge_layers)
        )
        self.infuse_layers = nn.ModuleList(
            InfusionLayer(dim, heads, config.ffn_ratio, config.drop_path) for _ in range(config.infuse_layers)
        )
        self.out_norm = nn.LayerNorm(dim) if config.final_norm else nn.Identity()
        # What is not always there comes last: what is draws the same numbers with it and without.
        self.read_student = nn.Linear(student_dim, dim) if student_dim != dim else nn.Identity()
        self.out = nn.Linear(dim, out_dim) if out_dim != dim else nn.Identity()
        stays = config.residual == "discriminant"
        self.shortcut = Shortcut(timesteps, channels, out_dim, stays) if config.residual != "none" else None
        self.drop = DropPath(config.drop_path)

    def fit(self, samples: Iterable[Tensor], labelled: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        """Measure what must be known of the teacher's tokens (B, P, L, C_t); samples may be gone through twice.

        labelled: the same with labels (B,), -1 where there is none; only `residual="discriminant"` asks for them.
        """
        self.tokens.fit(samples)
        if self.shortcut is not None:
            self.shortcut.fit(samples, labelled)

    def no_weight_decay(self) -> set[str]:
        """Where weight decay would do harm."""
        return {"queries", "mask_token"}

    def bridge(self, tokens: Tensor, drawn: Tensor | None = None) -> Tensor:
        """E_b: teacher tokens (B, P, L, C_t) -> Q̂_t (B, P, k, C). It does not depend on the student.

        `drawn` (B, P): which of the timesteps it was made for each image's tokens are of; None: all, in order.
        """
        expected = self.shape if drawn is None else (drawn.shape[1], *self.shape[1:])
        if tuple(tokens.shape[1:]) != expected:
            raise TrainError(
                f"the GIM was made for (timesteps, tokens, channels) {expected}, got {tuple(tokens.shape[1:])}"
            )
        context = self.tokens(tokens, drawn)  # (B, P, L, C)
        if self.queries is None:
            return context
        queries, layers = self._readers(context)
        for layer, keys, values in layers:
            queries = layer(queries, keys, values)
        return queries.unflatten(0, tokens.shape[:2])  # (B, P, k, C)

    def attention(self, tokens: Tensor) -> Tensor | None:
        """What the queries read of tokens (B, P, L, C_t), mean over layers and heads: (B, P, k, L)."""
        if self.queries is None:
            return None
        queries, layers = self._readers(self.tokens(tokens))
        found = []
        for layer, keys, values in layers:
            found.append(layer.attention.weights(layer.norm(queries), keys))
            queries = layer(queries, keys, values)
        return torch.stack(found).mean(0).unflatten(0, tokens.shape[:2])

    def _readers(self, context: Tensor) -> tuple[Tensor, list[tuple[BridgingLayer, Tensor, Tensor]]]:
        """The queries (B*P, k, C) that begin, and what each layer has them read of a context (B, P, L, C)."""
        assert self.queries is not None
        context = context.flatten(0, 1)  # (B*P, L, C)
        layers = cast(list[BridgingLayer], list(self.bridge_layers))
        read = keys_and_values([layer.attention for layer in layers], context)
        parts = [(layer, keys, values) for layer, (keys, values) in zip(layers, read, strict=True)]
        return self.queries.expand(len(context), -1, -1), parts

    def shortcut_of(self, tokens: Tensor, drawn: Tensor | None = None) -> Tensor | None:
        """What of E_D goes around E_b and E_f: (B, P, L, C_t) -> (B, P, C), None with `residual="none"`."""
        return None if self.shortcut is None else self.shortcut(tokens, drawn)

    def infuse(
        self, student: Tensor, bridged: Tensor, masked: bool | Tensor = False, shortcut: Tensor | None = None
    ) -> Tensor:
        """E_f: E_R (B, C) and Q̂_t (B, P, k, C) -> E_D (B, P, C).

        `masked` replaces E_R by the mask token: everywhere (True), nowhere (False), or where a (B, P) bool
        tensor says so. `shortcut` is what `shortcut_of` made of the same tokens.
        """
        B, P = bridged.shape[:2]
        if self.config.detach_student:
            student = student.detach()
        first = self.read_student(student).unsqueeze(1).expand(B, P, -1)  # (B, P, C)
        if isinstance(masked, Tensor):
            first = torch.where(masked.unsqueeze(-1), self.mask_token.to(first.dtype), first)
        elif masked:
            first = self.mask_token.to(first.dtype).expand(B, P, -1)
        sequence = torch.cat([first.unsqueeze(2), bridged.to(first.dtype)], dim=2)  # (B, P, 1+k, C)
        sequence = sequence.flatten(0, 1)  # (B*P, 1+k, C)
        for layer in self.infuse_layers[:-1]:
            sequence = layer(sequence)
        infused = self.infuse_layers[-1](sequence, outputs=1)  # (B*P, 1, C)
        embedding = self.out(self.out_norm(infused)).view(B, P, -1)  # (B, P, C)
        if self.shortcut is None or shortcut is None:
            return embedding
        return shortcut + self.shortcut.gate * self.drop(embedding)

    def draw_mask(self, per_timestep: Tensor) -> bool | Tensor:
        """Where E_R is masked in a training step: each of (B, P), the first axes given, by chance mask_student."""
        if self.config.mask_student in (0.0, 1.0):
            return self.config.mask_student == 1.0
        return torch.rand(per_timestep.shape[:2], device=per_timestep.device) < self.config.mask_student

    def forward(self, student: Tensor, tokens: Tensor, masked: bool | Tensor | None = None) -> Tensor:
        """E_R (B, C) and teacher tokens (B, P, L, C_t) -> E_D (B, P, C).

        `masked=None` draws the mask while training and masks nothing in evaluation.
        """
        if masked is None:
            masked = self.draw_mask(tokens) if self.training else False
        return self.infuse(student, self.bridge(tokens), masked, self.shortcut_of(tokens))


def load_gim(gim: GenerativeInjectionModule, run: Path, tap: str) -> None:
    """Read what a run kept of its GIM; raises TrainError when it does not fit the features of `tap` at hand."""
    weights = load_weights(run / GIM_FILE)
    try:
        gim.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise TrainError(f"the GIM of {run} does not fit tap {tap} of this cache: {reason}") from error


def _default_heads(dim: int) -> int:
    """One head per 64 channels, or the next lower number that divides the channels."""
    return next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)


def _embedding(wanted: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(_small_random(*shape)) if wanted else None


def _small_random(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=0.02)
