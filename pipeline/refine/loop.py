"""The loop of Stage I, on one process or, started by torchrun or `accelerate launch`, on several."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from cache_schema.devices import sound_gradients
from cache_schema.errors import DitDistillError
from cache_schema.fields import fields_of
from cache_schema.interrupts import DeferredInterrupt
from cache_schema.storage.files import write_file
from pipeline.curriculum import DEFAULT_STEPS
from pipeline.datasets.base import Dataset, Sample
from pipeline.inputs.condition_store import ConditionStore, default_store
from pipeline.inputs.conditions import Conditions
from pipeline.inputs.framing import Framing
from pipeline.inputs.pictures import save_picture
from pipeline.refine.card import render_card
from pipeline.refine.checkpoint import (
    Progress,
    check_identity,
    load_checkpoint,
    newest_progress,
    remove_checkpoints,
    save_checkpoint,
)
from pipeline.refine.config import RefineConfig
from pipeline.refine.draws import chosen_of, noise_of, rows_of
from pipeline.refine.loss import HeldOut, cdr_loss, hold_out, read_held_out, validation_loss
from pipeline.refine.metrics import MetricsLog
from pipeline.refine.pictures import draw_reconstructions
from pipeline.teachers.base import Teacher, TextEmbedding
from pipeline.teachers.lora import RECORD_NAME, add_lora
from pipeline.teachers.passes import memory_errors
from pipeline.teachers.weights import file_digest

# Beside the settings that may change on resume: more steps continue a run. Of accumulate only the product with the
# number of processes counts, which stands apart.
_FREE = {"steps", "accumulate"} | {name for name, field in fields_of(RefineConfig).items() if field.setting.resumable}

_NO_ROOM = (
    "its weights do not fit: use --quantize int8 or fp8, --dtype bfloat16 or a larger device; Stage I does not "
    "offload, because gradients go through all of them"
)
_OUT_OF_MEMORY = (
    "use --gradient-checkpointing, a smaller --batch with a larger --accumulate, or --quantize int8; what was trained "
    "up to the last checkpoint is kept"
)


def refine(
    teacher: Teacher,
    dataset: Dataset,
    config: RefineConfig,
    output: Path,
    *,
    conditions: Path | None = None,
    recomputes: Callable[[], bool] | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train the LoRA on the training split and write it to `output`; returns the record also written as refine.json.

    A run that was interrupted goes on from its last checkpoint, exactly; one that is finished is left as it is. After
    Ctrl-C or SIGTERM the step in progress is finished and saved, on all processes, then KeyboardInterrupt is raised.
    Some training images are held out and their loss is measured at fixed noise. Only the training split is used:
    neither test images nor labels are looked at. conditions: folder of the `ConditionStore`, by default beside
    `output`. recomputes: whether activations are computed twice, asked before the transformer is loaded; by default as
    `config.gradient_checkpointing` says, and on a GPU where it says nothing.
    Raises DitDistillError if `output` holds a run with other settings.
    """
    framing = Framing(object_crop=teacher.crop)
    store = ConditionStore(conditions or default_store(output), teacher, dataset, framing=framing)
    run = _Run(teacher, dataset, store, config, output, log, recomputes)
    finished = run.finished()
    if finished is not None:
        log(f"{output} is refined already: held-out CDR loss {finished['validation'][-1]['validation_loss']:.4f}")
        return finished
    run.train()
    return run.finish()


class _Run:
    """One run: what it trains on, how far it is, and where it writes."""

    def __init__(
        self,
        teacher: Teacher,
        dataset: Dataset,
        store: ConditionStore,
        config: RefineConfig,
        output: Path,
        log: Callable[[str], None],
        recomputes: Callable[[], bool] | None,
    ) -> None:
        self.recomputes = recomputes or self._recomputes
        self.teacher, self.dataset, self.store = teacher, dataset, store
        self.config, self.output, self.log = config, output, log
        self.accelerator = Accelerator(cpu=teacher.device.type == "cpu")
        samples = [s for s in dataset.samples if s.split == "train"]
        self.train_samples, self.held_out = hold_out(samples, config.validation_images)
        self.slots = config.accumulate * self.accelerator.num_processes
        self.schedule = teacher.sigmas(DEFAULT_STEPS) if config.sigma == "shifted" else []
        self.progress = Progress(self._identity())
        self.parameters: dict[str, Tensor] = {}

    def finished(self) -> dict[str, Any] | None:
        """The record of a finished run in the output folder, None where there is none."""
        file = self.output / RECORD_NAME
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            identity, steps = record["identity"], record["config"]["steps"]
        except (ValueError, KeyError, TypeError):
            raise DitDistillError(f"{file}: not a record of dit-cache refine; use another --output") from None
        check_identity({**identity, "steps": steps}, {**self._identity(), "steps": self.config.steps}, file)
        return record

    def train(self) -> None:
        """All steps from the last checkpoint on."""
        config = self.config
        reached = newest_progress(self.output)
        if reached is not None and reached.step > config.steps:  # its LoRA would pass for one of fewer steps
            raise DitDistillError(
                f"{self.output} has come to step {reached.step} already: give --steps {reached.step} or more to go on, "
                "or another --output"
            )
        self._prepare()
        recompute = self.recomputes()
        # Not by the first step: where the weights do not fit, nothing that a step could do with less would help.
        with memory_errors("while loading the diffusion transformer", _NO_ROOM):
            self.teacher.load("transformer")
            add_lora(self.teacher.transformer, config.rank, config.seed, config.lora_targets)
        if recompute:
            self.teacher.transformer.enable_gradient_checkpointing()
        self.parameters = {n: p for n, p in self.teacher.transformer.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=config.lr)
        found = load_checkpoint(self.output, self.progress.identity, self.parameters, self.optimiser)
        if found is not None:
            self.progress = found
            self.log(f"going on from step {found.step} of {config.steps} in {self.output}")
        validation = self._held_out_batches()
        measured = [at["step"] for at in self.progress.validation]
        # Also at the end of a run that now ends at its checkpoint, where no measurement was due.
        if not measured or self.progress.step == config.steps != measured[-1]:
            self._validate(validation)
        earlier, started = self.progress.seconds, time.monotonic()
        main = self.accelerator.is_main_process
        with (
            sound_gradients(),
            MetricsLog(self.output, self.progress.step, enabled=main) as metrics,
            tqdm(total=config.steps, initial=self.progress.step, desc="refine", unit="step", disable=not main) as bar,
            DeferredInterrupt() as interrupt,
        ):
            running = math.nan
            for step in range(self.progress.step, config.steps):
                loss, stopping = self._optimise(step, interrupt)
                self.progress.step = step + 1
                self.progress.seconds = earlier + time.monotonic() - started
                running = loss if math.isnan(running) else 0.98 * running + 0.02 * loss
                bar.set_postfix(loss=f"{running:.4f}", refresh=False)
                bar.update()
                metrics.write(step + 1, loss=loss)
                self._now_and_then(step + 1, validation, metrics, stopping)
                if stopping and step + 1 < config.steps:
                    # Whoever left before the checkpoint is there would have the one that writes it ended too.
                    self.accelerator.wait_for_everyone()
                    raise KeyboardInterrupt

    def finish(self) -> dict[str, Any]:
        """Write LoRA, record and card; the checkpoints are no longer needed."""
        record = {
            "config": asdict(self.config),
            "identity": self.progress.identity,
            "dataset": self.dataset.name,
            "protocol": self.dataset.protocol,
            "train_images": len(self.train_samples),
            "held_out_images": len(self.held_out),
            "processes": self.accelerator.num_processes,
            "teacher": self.teacher.source,
            "transformer_digest": self.teacher.digests()["transformer"],
            "context": self.teacher.context,
            "quantization": self.teacher.quantization,
            "validation": self.progress.validation,
            "seconds": round(self.progress.seconds, 1),
        }
        if self.accelerator.is_main_process:
            file = self.teacher.save_lora(self.output)
            record["lora_digest"] = file_digest(file)
            record = json.loads(json.dumps(record))
            write_file(self.output / "README.md", render_card(record).encode())
            write_file(self.output / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())
            remove_checkpoints(self.output)
            first, last = (record["validation"][i]["validation_loss"] for i in (0, -1))
            self.log(
                f"refined {self.teacher.source} for {self.config.steps} steps: held-out CDR loss "
                f"{first:.4f} → {last:.4f}, LoRA in {file}"
            )
        self.accelerator.wait_for_everyone()
        return record

    def _recomputes(self) -> bool:
        asked = self.config.gradient_checkpointing
        return self.teacher.device.type == "cuda" if asked is None else asked

    def _prepare(self) -> None:
        """Encode all that will be drawn: mirrored images and the empty caption only where they can be."""
        config, drawn = self.config, self._drawn_samples()
        empty = config.caption_dropout > 0
        self.store.prepare([*drawn, *self.held_out], log=self.log, without_caption=empty)
        if config.flip:
            self.store.prepare(drawn, ("hflip",), log=self.log)

    def _read(self, step: int, slot: int) -> Conditions:
        """What the DiT is conditioned on in one micro-batch."""
        config = self.config
        rows = rows_of(config.seed, step, slot, self.slots, config.batch, len(self.train_samples))
        samples = [self.train_samples[row] for row in rows]
        share = 0.5 if config.flip else 0.0
        mirrored = chosen_of(config.seed, "flip", step, slot, len(samples), share)
        empty = chosen_of(config.seed, "caption", step, slot, len(samples), config.caption_dropout)
        if not any(mirrored + empty):
            return self.store.read(samples, "canonical")
        parts = [
            self.store.read([sample], "hflip" if flip else "canonical")
            for sample, flip in zip(samples, mirrored, strict=True)
        ]
        texts = [self.store.text([""]) if none else part.text for part, none in zip(parts, empty, strict=True)]
        return Conditions(
            object=torch.cat([part.object for part in parts]),
            context=torch.cat([part.context for part in parts]),
            text=TextEmbedding(torch.cat([t.tokens for t in texts]), torch.cat([t.pooled for t in texts])),
        )

    def _drawn_samples(self) -> Sequence[Sample]:
        """The training images that the run will see: all of them unless it is shorter than an epoch."""
        config, count = self.config, len(self.train_samples)
        if config.steps * self.slots * config.batch >= count:
            return self.train_samples
        draws = ((step, slot) for step in range(config.steps) for slot in range(self.slots))
        rows = {row for draw in draws for row in rows_of(config.seed, *draw, self.slots, config.batch, count)}
        return [self.train_samples[row] for row in sorted(rows)]

    def _optimise(self, step: int, interrupt: DeferredInterrupt) -> tuple[float, bool]:
        """One step of Adam over all micro-batches of all processes; returns the mean loss, and whether to stop."""
        config, teacher = self.config, self.teacher
        self.optimiser.zero_grad(set_to_none=True)
        total = torch.zeros((), device=teacher.device)
        for micro in range(config.accumulate):
            slot = micro * self.accelerator.num_processes + self.accelerator.process_index
            conditions = self._read(step, slot).to(teacher.device)
            shape = tuple(conditions.object.shape)
            noise, sigma = noise_of(config.seed, step, slot, shape, config.sigma, self.schedule)
            with memory_errors(f"in step {step + 1}", _OUT_OF_MEMORY):
                loss = cdr_loss(teacher, conditions, noise.to(conditions.object), sigma.to(teacher.device))
                (loss / config.accumulate).backward()
            total += loss.detach() / config.accumulate
        stopping = interrupt.requested
        if self.accelerator.num_processes > 1:
            total, stopping = self._share_gradients(total, stopping)
        if not torch.isfinite(total):
            raise DitDistillError(
                f"the loss of step {step + 1} is {total.item()}: the teacher failed; use --dtype bfloat16 or float32, "
                f"or a lower --lr; the last checkpoint in {self.output} is from before"
            )
        parameters = list(self.parameters.values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not torch.isfinite(norm):  # before Adam spreads it over the weights
            raise self._gradient_not_finite(step)
        if config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
        with memory_errors(f"in step {step + 1}", _OUT_OF_MEMORY):
            self.optimiser.step()
        return total.item(), stopping

    def _gradient_not_finite(self, step: int) -> DitDistillError:
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        where = f"{len(broken)} of {len(gradients)} tensors, first {broken[0]}" if broken else "their norm overflows"
        return DitDistillError(
            f"the loss of step {step + 1} is finite, its gradients are not ({where}): use --dtype bfloat16 or float32, "
            f"or a lower --lr; the last checkpoint in {self.output} is from before"
        )

    def _share_gradients(self, loss: Tensor, stopping: bool) -> tuple[Tensor, bool]:
        """Average gradients and loss over processes, in one message. Only the LoRA travels: the DiT is not wrapped.

        Whether one of them is to stop travels along: signals reach them at different steps, and they leave together.
        """
        # What the loss does not reach has no gradient, on every process alike: Adam must go on skipping it.
        reached = [(p, p.grad) for p in self.parameters.values() if p.grad is not None]
        own = torch.stack([loss, torch.full_like(loss, stopping)])
        flat = torch.cat([own, *(grad.reshape(-1) for _, grad in reached)])
        mean = self.accelerator.reduce(flat, "mean")
        for (parameter, _), grad in zip(reached, mean[2:].split([p.numel() for p, _ in reached]), strict=True):
            parameter.grad = grad.view_as(parameter)
        return mean[0], bool(mean[1])

    def _now_and_then(self, step: int, validation: Sequence[HeldOut], metrics: MetricsLog, stopping: bool) -> None:
        """What is not done at every step, on the main process."""
        config, last = self.config, step == self.config.steps
        if not self.accelerator.is_main_process:
            return
        if step % config.validate_every == 0 or last:
            metrics.write(step, validation_loss=self._validate(validation))
        if config.pictures_every and (step % config.pictures_every == 0 or last):
            self._draw(step)
        if config.checkpoint_every and (stopping or step % config.checkpoint_every == 0) and not last:
            save_checkpoint(self.output, self.progress, self.parameters, self.optimiser)
        if stopping and not last:
            kept = newest_progress(self.output)
            self.log(f"stopped after step {step} of {config.steps}; step {kept.step if kept else 0} is kept")

    def _held_out_batches(self) -> Sequence[HeldOut]:
        if not self.accelerator.is_main_process:
            return []
        return read_held_out(self.store, self.held_out, self.config.seed, self.teacher.device)

    def _validate(self, validation: Sequence[HeldOut]) -> float:
        if not self.accelerator.is_main_process:
            return math.nan
        with memory_errors("while measuring held-out images", _OUT_OF_MEMORY):
            loss = validation_loss(self.teacher, validation)
        self.progress.validation.append({"step": self.progress.step, "validation_loss": loss})
        return loss

    def _draw(self, step: int) -> None:
        config, samples = self.config, self.held_out[: self.config.picture_images]
        conditions = self.store.read(samples, "canonical").to(self.teacher.device)
        sheet = draw_reconstructions(self.teacher, conditions, samples, config.timesteps, config.num_steps, config.seed)
        save_picture(sheet, self.output / "pictures" / f"step-{step:06d}.png")

    def _identity(self) -> dict[str, Any]:
        """What two halves of one run must have in common."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in _FREE}
        # Left out of runs like those before there was a choice, which go on.
        square = {"crop": self.teacher.crop} if self.teacher.crop != "box" else {}
        theirs = {
            "micro-batches per step": self.slots,
            "resolution": self.teacher.resolution,
            "dtype": str(self.teacher.dtype).removeprefix("torch."),
            "guidance": self.teacher.guidance,
            "context": self.teacher.context,
            "quantization": self.teacher.quantization,
            "transformer": self.teacher.digests()["transformer"],
            "training images": _fingerprint(self.train_samples),
        }
        return settings | square | theirs


def _fingerprint(samples: Sequence[Sample]) -> str:
    text = json.dumps([[s.id, s.source, s.box, s.caption] for s in samples])
    return sha256(text.encode()).hexdigest()
