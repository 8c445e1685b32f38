"""The model card: what a student was made from, how it was scored, how to use it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema.format.card import code, plain
from cache_schema.format.licences import licence_of
from trainer.config import ALONE
from trainer.data.images import CENTRE
from trainer.evaluation.tables import format_table

if TYPE_CHECKING:
    from cache_schema import Cache
    from trainer.models.student import Student


def describe(config: dict[str, Any], result: dict[str, Any], scores: dict[str, Any] | None, cache: Cache | None) -> Any:
    """What a card tells of a run, as plain values; of data and teacher only where the run's cache is at hand."""
    student = config.get("student", {})
    pretrained = "timm's pretrained weights" if student.get("pretrained") else "random weights"
    named = student.get("weights")
    about: dict[str, Any] = {
        "method": str(result.get("method", result["mode"])),
        "started_from": f"the weights of {Path(named).name}" if named else pretrained,
        "cache_id": result["cache_id"],
        "updates": result["student_updates"],
        "images_seen": result["images_seen"],
        "train_classes": result["train_classes"],
        "seed": result["seed"],
        "shuffled": bool(config.get("shuffle_features")),
        "data": None,
        "teacher": None,
        "scores": None,
        "onnx": None,
    }
    if cache is not None:
        data, teacher = cache.manifest.dataset, cache.manifest.teacher
        about["data"] = {"name": data.name, "protocol": data.protocol, "counts": dict(data.counts)}
        about["teacher"] = {"family": teacher.family, "source": teacher.source, "licence": licence_of(teacher)}
    if scores is not None:
        about["scores"] = {key: scores[key] for key in ("cache_id", "split", "queries", "classes", "student")}
    return about


def render_card(student: Student, about: dict[str, Any], onnx_difference: float | None, squashed: bool = False) -> str:
    """The README.md of an export, in Markdown; `squashed` as for `crop_settings`."""
    parts = [
        "---\nlibrary_name: timm\ntags:\n- image-feature-extraction\n- image-retrieval\n---",
        f"# {plain(student.name)} for retrieval, by {plain(about['method'])}",
        f"Turns an image into {student.dim} numbers; images of one class have a high cosine similarity. The student "
        "alone: no teacher, no GIM, no class proxies are in this folder or needed.",
        "## Made from\n\n" + "\n".join(f"- {name}: {value}" for name, value in _origins(about).items()),
        "## Scores\n\n" + _scores(about),
        "## Use\n\n" + _use(student, onnx_difference, squashed) + _reduced(about["onnx"]),
    ]
    return "\n\n".join(parts) + "\n"


def _origins(about: dict[str, Any]) -> dict[str, str]:
    unknown = "not known: its cache was not at hand when this was exported"
    data, teacher = about["data"], about["teacher"]
    counts = ", ".join(f"{count} {split}" for split, count in sorted(data["counts"].items())) if data else ""
    origins = {
        "data": f"{code(data['name'])} ({counts} images); it has a licence of its own" if data else unknown,
        "protocol": plain(data["protocol"]) if data else unknown,
        "cache": code(about["cache_id"]),
        "training": f"{about['updates']} updates, {about['images_seen']} images seen, "
        f"{about['train_classes']} classes, seed {about['seed']}, started from {plain(about['started_from'])}",
    }
    if about["method"] == ALONE:
        return {**origins, "teacher": "none, the features of the cache were not read"}
    if not teacher:
        return {**origins, "teacher": unknown, "licence of the teacher": unknown}
    named = f"{plain(teacher['family'])}, {code(teacher['source'])}"
    if about["shuffled"]:
        named += "; as a control, every image had the features of another"
    return {**origins, "teacher": named, "licence of the teacher": plain(teacher["licence"])}


def _scores(about: dict[str, Any]) -> str:
    scores = about["scores"]
    if scores is None:
        return "Not evaluated: `dit-train eval RUN` before the export adds them."
    elsewhere = "" if scores["cache_id"] == about["cache_id"] else f" of another cache, {code(scores['cache_id'])}"
    chosen = ", held out of the training classes to choose settings on" if scores["split"] == "validation" else ""
    table = format_table([("student", scores["student"])])
    return (
        f"{scores['queries']} queries of {scores['classes']} classes never trained on (split "
        f"{code(scores['split'])}{elsewhere}{chosen}), each against all the others, percent:\n\n```\n{table}\n```"
    )


def _use(student: Student, onnx_difference: float | None, squashed: bool) -> str:
    size = student.input_size
    text = f"""```python
import timm
from PIL import Image, ImageOps
from torch.nn.functional import normalize

network = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
embedding = normalize(network(transform(image)[None]), dim=-1)
```

{_preparation(student, squashed)}"""
    if onnx_difference is None:
        return text
    return (
        f"{text}\n\n`model.onnx`: `pixels` (batch, 3, {size}, {size}) uint8, RGB from 0 to 255, so prepared but not "
        f"normalised, to `embedding` (batch, {student.dim}) float32 of length 1; normalisation of the pixels is "
        f"inside. In onnxruntime it differed from PyTorch by at most {onnx_difference:.1e}."
    )


def _reduced(forms: list[dict[str, Any]] | None) -> str:
    """What the ONNX files in fewer bits score beside the whole one; nothing where there are none."""
    if not forms:
        return ""
    table = format_table([(f"{form['name']}, {form['megabytes']:.1f} MB", form["scores"]) for form in forms])
    return (
        "\n\nThe other ONNX files take and give the same in fewer bits. What they score in onnxruntime on the test "
        f"images, percent:\n\n```\n{table}\n```"
    )


def _preparation(student: Student, squashed: bool) -> str:
    """What timm's transform does with an image, in words."""
    size = student.input_size
    whole = f"The whole image is resized to {size} × {size} (bicubic), without keeping its proportions"
    if student.fit == "squash":
        return f"{whole}, as in the evaluation."
    large = math.floor(size / CENTRE)
    resized = (
        whole.replace(f"{size} × {size}", f"{large} × {large}")
        if squashed
        else f"The image is resized (bicubic) until its shorter side has {large} pixels"
    )
    return f"{resized}; the {size} × {size} in its middle are kept, within a pixel what the evaluation saw."
