"""The card of a LoRA: its README.md, for people."""

from typing import Any


def render_card(record: dict[str, Any]) -> str:
    """Markdown text of the card, from the record that is also written as refine.json."""
    config, validation = record["config"], record["validation"]
    images = config["batch"] * config["accumulate"] * record["processes"]
    losses = "\n".join(f"| {entry['step']} | {entry['validation_loss']:.4f} |" for entry in validation)
    return f"""---
library_name: diffusers
base_model: {record["teacher"]}
tags: [lora, condition-difference-refining]
---

# CDR LoRA of {record["teacher"]}, refined on {record["dataset"]}

A LoRA of rank {config["rank"]} on the {_targets(config)}, trained by condition difference refining (Stage I of
DiT-Distill): the diffusion transformer learns to predict the object view of an image from its noisy latent, the clean
context image in the same sequence, and the text.

| | |
| --- | --- |
| data set | {record["dataset"]}: {record["protocol"]} |
| images | {record["train_images"]} of the training split, {record["held_out_images"]} held out |
| steps | {config["steps"]} of {images} images, Adam {config["lr"]:g}, seed {config["seed"]} |
| drawn | {_draws(config)} |
| context | {record["context"]} |
| transformer | `{record["transformer_digest"][:12]}` |
| LoRA | `{record["lora_digest"][:12]}` |

Held-out CDR loss, at fixed noise:

| step | loss |
| ---: | ---: |
{losses}

## Use

```python
pipe.load_lora_weights("path/to/this/folder")  # a diffusers pipeline of the same base model
```

`dit-cache build --lora path/to/this/folder` caches the features of the refined transformer.
"""


def _targets(config: dict[str, Any]) -> str:
    both = config.get("lora_targets") == "attention+ff"
    return "attention projections and feed-forward layers" if both else "attention projections"


def _draws(config: dict[str, Any]) -> str:
    parts = [f"noise levels {config['sigma']}"]
    parts += [f"gradients clipped at {config['grad_clip']:g}"] if config["grad_clip"] is not None else []
    parts += [f"{config['caption_dropout']:.0%} without caption"] if config["caption_dropout"] else []
    parts += ["half of the images mirrored"] if config["flip"] else []
    return ", ".join(parts)
