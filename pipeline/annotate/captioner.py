"""What the object looks like: a vision-language model describes the crop, and is told not to name the class."""

from collections.abc import Sequence

import torch
from PIL import Image

from pipeline.annotate.config import AnnotateError
from pipeline.annotate.models import ModelFiles, load_model
from pipeline.inputs.views import Box

OPTION = "--captioner"
# Added when an answer named the class. It does not quote the name: that would tell the model what to look for.
STRICTER = (
    " Say only what can be seen. Never say or guess which species, breed, variety, make or model it is; call it "
    "only the {superclass}."
)
_MOST_ELONGATED = 100


def fill_in(instruction: str, superclass: str) -> str:
    """The instruction with the data set's word in it. Other braces are left alone."""
    return instruction.replace("{superclass}", superclass)


def crop_object(image: Image.Image, box: Box, longest_side: int) -> Image.Image:
    """The box of an RGB image, in whole pixels around it, made smaller if a side is longer than `longest_side`.

    Only the object is shown: what stands beside it must not get into its description.
    """
    x0, y0, x1, y1 = box
    whole = (int(x0), int(y0), min(image.width, -int(-x1 // 1)), min(image.height, -int(-y1 // 1)))
    crop = image.crop(whole)
    crop.thumbnail((longest_side, longest_side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    # Qwen2.5-VL's processor refuses what is more than 200 times as long as wide.
    least = -(-max(crop.size) // _MOST_ELONGATED)
    return crop.resize((max(crop.width, least), max(crop.height, least))) if min(crop.size) < least else crop


class Captioner:
    """A chat model of transformers' AutoModelForImageTextToText (Qwen2.5-VL, …)."""

    def __init__(self, files: ModelFiles, dtype: torch.dtype, device: str, max_new_tokens: int) -> None:
        from transformers import AutoModelForImageTextToText

        self._processor, self._model = load_model(AutoModelForImageTextToText, files, OPTION, dtype, device)
        if not getattr(self._processor, "chat_template", None):
            raise AnnotateError(f"{OPTION} {files.source}: has no chat template; choose a model tuned for instructions")
        self._max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def describe(self, crops: Sequence[Image.Image], instruction: str) -> list[str]:
        """An answer per crop, on one line. Greedy and without penalties: it does not depend on the other crops."""
        if not crops:
            return []
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": crop}, {"type": "text", "text": instruction}]}]
            for crop in crops
        ]
        inputs = self._processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            # On the left, so that every answer begins right after its own question.
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self._model.device, dtype=self._model.dtype)
        answers = self._model.generate(
            **inputs,
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            num_beams=1,
            # Only used for sampling; models that set them would warn. The penalty counts padding as a word said.
            temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
        )  # fmt: skip
        new = answers[:, inputs["input_ids"].shape[1] :]
        return [_one_line(text) for text in self._processor.batch_decode(new, skip_special_tokens=True)]


def _one_line(text: str) -> str:
    return "".join(c for c in " ".join(text.split()) if c.isprintable())
