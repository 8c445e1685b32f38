"""Regression of the teacher's features by the student: each place of the image, and the image as a whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from trainer import processes
from trainer.config import RegressionConfig
from trainer.data.features import FeatureShape
from trainer.models.alignment import projector
from trainer.models.components import PrincipalComponents
from trainer.models.student import Student

MEASURED_TOKENS = 1024  # of a batch


class FeatureRegression(nn.Module):
    """How far the student's own tokens and embedding are from the teacher's features of the same part of the image.

    A student that sees a crop is compared with the part of the teacher's map that the crop shows: the cache holds
    the features of every crop, and no teacher is asked again. 2 − 2 cos per place and timestep, through a
    throw-away MLP each for tokens and embedding, so that neither has to take the teacher's orientation.

    Source: region features as in RoIAlign (He et al. 2017); a convolutional teacher's map for a small transformer as
    in Li et al., "Locality Guidance for Improving Vision Transformers on Tiny Datasets", ECCV 2022.
    """

    def __init__(self, config: RegressionConfig, student: Student, shape: FeatureShape):
        super().__init__()
        self.config, self.shape = config, shape
        self.kept = min(config.components, shape.channels)
        self.components = PrincipalComponents(len(shape.timesteps), shape.channels, self.kept, config.power)
        outputs = len(shape.timesteps) * self.kept
        self.rows, self.columns, channels = student.token_shape
        self.tokens = projector(channels, outputs) if config.tokens else None
        self.pooled = projector(student.dim, outputs) if config.pooled else None

    def fit(self, samples: Iterable[Tensor]) -> None:
        """Measure the teacher's features on a few batches (B, P, L, C_t)."""
        self.components.fit(_some_tokens(batch) for batch in samples)

    def forward(
        self,
        embedding: Tensor,
        tokens: Tensor,
        features: Tensor,
        boxes: Tensor | None,
        drawn: Tensor | None = None,
    ) -> Tensor:
        """E_R (B, C), student tokens (B, h, w, C_s), features (B, P, L, C_t), boxes (B, 4) or None: a scalar.

        boxes: what the student's image shows of the teacher's picture, in fractions of its sides; None: all of it.
        drawn (B, P): which timesteps each image's features are of; None: all, in order.
        """
        target, known = self.regions(features, boxes, drawn)  # (B, h·w, P, K), (B, h·w)
        loss = target.new_zeros(())
        if self.tokens is not None:
            predicted = self._predicted(self.tokens(tokens.flatten(1, 2)), drawn)
            loss = loss + self.config.tokens * _distance(predicted, target, known)
        if self.pooled is not None:
            predicted = self._predicted(self.pooled(embedding).unsqueeze(1), drawn).squeeze(1)
            count = known.sum(1)  # (B,)
            mean = (target * known[:, :, None, None]).sum(1) / count.clamp_min(1)[:, None, None]
            loss = loss + self.config.pooled * _distance(predicted, mean, (count > 0).float())
        return loss

    def _predicted(self, outputs: Tensor, drawn: Tensor | None) -> Tensor:
        """A head's outputs (B, N, T·K) for all T timesteps, of those drawn: (B, N, P, K)."""
        every = outputs.unflatten(-1, (-1, self.kept))  # (B, N, T, K)
        return every if drawn is None else every.take_along_dim(drawn[:, None, :, None], 2)

    @torch.no_grad()
    def regions(self, features: Tensor, boxes: Tensor | None, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The teacher's features where the student's tokens are: (B, P, L, C_t) -> (B, h·w, P, K).

        With them, 1 where the teacher saw the middle of that place at all and 0 elsewhere: (B, h·w).
        """
        with torch.autocast(features.device.type, enabled=False):
            rows, columns = self.shape.grid
            components = self.components(features.float(), drawn)  # (B, P, L, K)
            maps = components.unflatten(2, (rows, columns)).permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, P·K, H, W)
            if boxes is None:
                boxes = features.new_tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(features), 4)
            scaled = boxes * boxes.new_tensor([columns, rows, columns, rows])
            numbered = torch.cat([torch.arange(len(boxes), device=boxes.device).unsqueeze(1), scaled], 1)  # (B, 5)
            cut = roi_align(maps, numbered, (self.rows, self.columns), sampling_ratio=2, aligned=True)
            target = cut.flatten(2).transpose(1, 2).unflatten(-1, (-1, self.kept))
            return target, self._inside(boxes)

    def _inside(self, boxes: Tensor) -> Tensor:
        """Which places of the student's image lie in the teacher's picture, by their middles: (B, h·w) of 0 and 1."""
        along = []
        for first, last, count in ((1, 3, self.rows), (0, 2, self.columns)):
            steps = (torch.arange(count, device=boxes.device) + 0.5) / count
            middles = torch.lerp(boxes[:, first, None], boxes[:, last, None], steps)  # (B, count)
            along.append(((middles >= 0) & (middles <= 1)).float())
        return (along[0].unsqueeze(2) * along[1].unsqueeze(1)).flatten(1)


def _some_tokens(features: Tensor) -> Tensor:
    """Enough of the tokens of (B, P, L, C_t): their products are what measuring costs."""
    step = -(-features.shape[0] * features.shape[2] // MEASURED_TOKENS)
    return features[:, :, torch.randperm(features.shape[2], generator=torch.Generator().manual_seed(0))[::step]]


def _distance(predicted: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """2 − 2 cos over the last axis, averaged over what is known: (…, P, K) twice, (…)."""
    apart = (2 - 2 * F.cosine_similarity(predicted.float(), target, dim=-1)).mean(-1)
    return (apart * known).sum() / processes.share_of_sum(known.sum())
