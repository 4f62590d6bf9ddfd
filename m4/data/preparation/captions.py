"""Captions of reference frames: from the label, or by BLIP."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from m4.data.penn_action import Label
from m4.device import DTYPES, default_device, default_dtype
from m4.errors import data_error

CAPTIONS = ("label", "blip", "none")
BLIP = "Salesforce/blip-image-captioning-base"
_log = logging.getLogger(__name__)

_DOING = {
    "baseball_pitch": "pitching a baseball",
    "baseball_swing": "swinging a baseball bat",
    "bench_press": "doing a bench press",
    "bowl": "bowling",
    "clean_and_jerk": "lifting a barbell overhead in a clean and jerk",
    "golf_swing": "swinging a golf club",
    "jump_rope": "jumping rope",
    "jumping_jacks": "doing jumping jacks",
    "pullup": "doing pull-ups",
    "pushup": "doing push-ups",
    "situp": "doing sit-ups",
    "squat": "doing squats",
    "strum_guitar": "strumming a guitar",
    "tennis_forehand": "hitting a tennis forehand",
    "tennis_serve": "serving in tennis",
    "walk": "walking",
}
_SEEN = {"front": "the front", "back": "behind", "left": "the left", "right": "the right"}


def label_caption(label: Label) -> str:
    """A sentence from the action and the view, such as "a person doing squats, seen from the left"."""
    doing = _DOING.get(label.action, f"doing {label.action.replace('_', ' ')}")
    return f"a person {doing}, seen from {_SEEN.get(label.view, label.view)}"


class BlipCaptioner:
    """Captions by BLIP through transformers; bfloat16 on a GPU, float32 on a CPU.

    model: a folder with the model and its processor, or the name of a Hugging Face repository, whose cached copy is
    used without asking the network; only what is not cached is downloaded. device: default this process's GPU, else
    the CPU. Raises DataError where the library or the weights are not at hand.
    """

    def __init__(self, model: str | os.PathLike | None = None, device: str | torch.device | None = None):
        model = BLIP if model is None else os.fspath(model)
        try:
            from transformers import BlipForConditionalGeneration, BlipProcessor
        except ImportError as error:
            raise data_error(
                "--captions blip",
                expected="the transformers library",
                actual=str(error),
                remedy="pip install 'm4kernels[blip]', or use --captions label.",
            ) from error
        self.device = default_device() if device is None else torch.device(device)
        self.dtype = DTYPES[default_dtype(self.device)]
        try:
            try:
                self._processor, network = _load(BlipProcessor, BlipForConditionalGeneration, model, offline=True)
            except OSError:
                if os.path.isdir(model):
                    raise
                _log.info("%s is not in the Hugging Face cache; downloading it", model)
                self._processor, network = _load(BlipProcessor, BlipForConditionalGeneration, model, offline=False)
        except (OSError, ValueError) as error:
            raise data_error(
                f"--captions blip ({model})",
                expected="BLIP's weights and processor",
                actual=(str(error).strip() or type(error).__name__).splitlines()[0],
                remedy=f"With network access, once: `huggingface-cli download {BLIP}` (or --local-dir DIR, and then "
                "--blip-dir DIR); or use --captions label.",
            ) from error
        self._network = network.eval().to(self.device, self.dtype)

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption an image (RGB), by greedy search; the images go through the model together."""
        if not images:
            return []
        inputs = self._processor(images=list(images), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        with torch.inference_mode():
            output = self._network.generate(pixel_values=pixels, max_new_tokens=30, num_beams=1, do_sample=False)
        return [text.strip() for text in self._processor.batch_decode(output, skip_special_tokens=True)]


def _load(processor: Any, network: Any, model: str, offline: bool) -> tuple[Any, Any]:
    options = {"local_files_only": True} if offline else {}
    return processor.from_pretrained(model, **options), network.from_pretrained(model, **options)
