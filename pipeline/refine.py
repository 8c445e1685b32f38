"""Stage I, condition difference refining (CDR): a LoRA teaches the frozen DiT to use the context image (§2)."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cache_schema.errors import DitDistillError
from pipeline.conditions import Conditions, encode_conditions
from pipeline.curriculum import add_noise, sample_noise
from pipeline.datasets.base import Dataset, Sample
from pipeline.teachers.base import Teacher
from pipeline.teachers.lora import RECORD_NAME, add_lora
from pipeline.teachers.weights import file_digest


@dataclass(frozen=True)
class RefineConfig:
    """The paper's setting: Adam 1e-4, batch 1, 30 000 steps, rank 16. σ is uniform on (0, 1), as in L_CDR."""

    steps: int = 30_000
    batch: int = 1
    lr: float = 1e-4
    rank: int = 16
    seed: int = 0
    validation_images: int = 32
    validate_every: int = 1_000

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "validation_images", "validate_every"):
            if getattr(self, name) < 1:
                raise DitDistillError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not self.lr > 0:
            raise DitDistillError(f"--lr must be positive, not {self.lr}")


def cdr_loss(teacher: Teacher, conditions: Conditions, noise: Tensor, sigma: Tensor) -> Tensor:
    """L_CDR = E‖(z_O − ε) − E_{O,t}‖², the mean over object tokens and channels; context tokens carry no loss.

    noise: (B, L, C_latent); sigma: (B,).
    """
    noisy = add_noise(conditions.object, noise, sigma)
    predicted = teacher.predict(noisy, conditions.context, sigma, conditions.text)
    return F.mse_loss(predicted.float(), (conditions.object - noise).float())


def refine(
    teacher: Teacher,
    dataset: Dataset,
    config: RefineConfig,
    output: Path,
    *,
    log: Callable[[str], None] = print,
) -> dict:
    """Train the LoRA on the training split and write it to `output`; returns the record also written as refine.json.

    Some training images are held out and their loss is measured at fixed noise, so that progress can be seen through
    the noise of the objective. Only the training split is used: neither test images nor labels are looked at.
    """
    train, held_out = hold_out([s for s in dataset.samples if s.split == "train"], config)
    output.mkdir(parents=True, exist_ok=True)
    parameters = add_lora(teacher.transformer, config.rank, config.seed)
    optimiser = torch.optim.Adam(parameters, lr=config.lr)
    generator = torch.Generator().manual_seed(config.seed)
    validation = _validation_set(teacher, dataset, held_out, config.seed)
    started = time.monotonic()
    history = [{"step": 0, "validation_loss": validation_loss(teacher, validation)}]
    with (output / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        running = math.nan
        bar = tqdm(range(1, config.steps + 1), desc="refine", unit="step")
        for step in bar:
            rows = torch.randint(len(train), (config.batch,), generator=generator).tolist()
            conditions = encode_conditions(teacher, dataset, [train[r] for r in rows], "canonical")
            noise = torch.randn(conditions.object.shape, generator=generator).to(conditions.object)
            sigma = torch.rand(config.batch, generator=generator).to(conditions.object)
            loss = cdr_loss(teacher, conditions, noise, sigma)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
            bar.set_postfix(loss=f"{running:.4f}")
            if step % config.validate_every == 0 or step == config.steps:
                history.append({"step": step, "validation_loss": validation_loss(teacher, validation)})
            metrics.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
    file = teacher.save_lora(output)
    record = {
        "config": asdict(config),
        "dataset": dataset.name,
        "teacher": teacher.source,
        "transformer_digest": teacher.digests()["transformer"],
        "lora_digest": file_digest(file),
        "validation": history,
        "seconds": round(time.monotonic() - started, 1),
    }
    (output / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    log(
        f"refined {teacher.source} for {config.steps} steps: held-out CDR loss "
        f"{history[0]['validation_loss']:.4f} → {history[-1]['validation_loss']:.4f}, LoRA in {file}"
    )
    return record


def hold_out(samples: list[Sample], config: RefineConfig) -> tuple[list[Sample], list[Sample]]:
    """Split evenly spaced images off for validation. Raises if too few are left to train on."""
    if len(samples) < 2:
        raise DitDistillError(f"refining needs at least 2 training images, the data set has {len(samples)}")
    count = min(config.validation_images, len(samples) // 2)
    chosen = {round(i * len(samples) / count) for i in range(count)}
    return [s for i, s in enumerate(samples) if i not in chosen], [samples[i] for i in sorted(chosen)]


def _validation_set(
    teacher: Teacher, dataset: Dataset, samples: list[Sample], seed: int
) -> list[tuple[Conditions, Tensor, Tensor]]:
    batches = []
    for start in range(0, len(samples), 8):
        part = samples[start : start + 8]
        conditions = encode_conditions(teacher, dataset, part, "canonical")
        shape = tuple(conditions.object.shape[1:])
        noise = torch.stack([sample_noise(s.id, "validation", seed, shape) for s in part]).to(conditions.object)
        sigma = torch.tensor([(start + i + 0.5) / len(samples) for i in range(len(part))]).to(conditions.object)
        batches.append((conditions, noise, sigma))
    return batches


@torch.no_grad()
def validation_loss(teacher: Teacher, batches: list[tuple[Conditions, Tensor, Tensor]]) -> float:
    """Mean L_CDR of held-out images, one fixed noise and σ each, σ evenly spread over (0, 1)."""
    losses = [(cdr_loss(teacher, c, noise, sigma).item(), len(sigma)) for c, noise, sigma in batches]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
