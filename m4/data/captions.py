"""Captions of reference frames: from the label, or by BLIP."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from m4.data.errors import data_error
from m4.data.penn_action import Label

CAPTIONS = ("label", "blip", "none")
BLIP = "Salesforce/blip-image-captioning-base"

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
    """Captions by BLIP through transformers. Raises DataError where the library or the weights are not at hand."""

    def __init__(self, model: str = BLIP):
        try:
            from transformers import BlipForConditionalGeneration, BlipProcessor
        except ImportError as error:
            raise data_error(
                "--captions blip",
                expected="the transformers library",
                actual=str(error),
                remedy="pip install 'm4kernels[blip]', or use --captions label.",
            ) from error
        try:
            self._processor = BlipProcessor.from_pretrained(model)
            self._model = BlipForConditionalGeneration.from_pretrained(model).eval()
        except (OSError, ValueError) as error:
            raise data_error(
                f"--captions blip ({model})",
                expected="BLIP's weights",
                actual=str(error).splitlines()[0],
                remedy="Download them once with network access (huggingface-cli download), or use --captions label.",
            ) from error

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption an image (RGB), by greedy search."""
        import torch

        inputs = self._processor(images=list(images), return_tensors="pt")
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=30)
        return [text.strip() for text in self._processor.batch_decode(output, skip_special_tokens=True)]
