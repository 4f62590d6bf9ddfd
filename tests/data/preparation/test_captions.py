"""Captions from labels, and by BLIP: with a stand-in for transformers, and with a tiny real model where it is there."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from m4.data.preparation import captions
from m4.data.preparation.captions import BlipCaptioner, label_caption
from m4.data.preparation.options import PrepareOptions
from m4.data.preparation.prepare import prepare
from m4.data.preparation.tokenize_video import shared_captioner
from m4.errors import DataError


@pytest.fixture(autouse=True)
def fresh():
    """No captioner left from another test."""
    shared_captioner.cache_clear()
    yield
    shared_captioner.cache_clear()


def read_captions(root):
    paths = sorted(root.glob("*/captions/*/captions.json"), key=lambda path: path.parent.name)
    return [json.loads(path.read_text())["caption"] for path in paths]


def test_captions_read_as_english():
    class Label:
        action, view = "golf_swing", "back"

    assert label_caption(Label) == "a person swinging a golf club, seen from behind"
    Label.action, Label.view = "moon_walk", "above"
    assert label_caption(Label) == "a person doing moon walk, seen from above"
    assert captions.CAPTIONS == ("label", "blip", "none")


def test_without_transformers(videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"--captions blip: expected the transformers library.*m4kernels\[blip\]"):
        prepare(videos, tmp_path / "out", PrepareOptions(captions="blip"), progress=False)
    assert not (tmp_path / "out").exists()


def fake_transformers(cached=True, online=True):
    """A module with the two classes and calls of transformers that are used. ``asked``: every request for weights."""
    module = types.ModuleType("transformers")
    module.asked, module.batches = [], []

    class Part:
        @classmethod
        def from_pretrained(cls, name, local_files_only=False):
            module.asked.append((name, local_files_only))
            if not (cached if local_files_only else online):
                raise OSError("cannot find the weights\nsecond line")
            return cls()

    class Processor(Part):
        def __call__(self, images, return_tensors):
            assert return_tensors == "pt"
            return {"pixel_values": torch.tensor([float(image.size[0]) for image in images])}

        def batch_decode(self, output, skip_special_tokens):
            assert skip_special_tokens
            return [f"a frame {int(width)} wide " for width in output]

    class Model(Part):
        def eval(self):
            return self

        def to(self, device, dtype):
            return self

        def generate(self, pixel_values, **_):
            module.batches.append(len(pixel_values))
            return pixel_values

    module.BlipProcessor, module.BlipForConditionalGeneration = Processor, Model
    return module


def test_reference_frames_are_captioned_in_batches_from_the_cache(videos, tmp_path, monkeypatch):
    fake = fake_transformers(online=False)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    prepare(videos, tmp_path / "out", PrepareOptions(captions="blip"), progress=False)
    written = read_captions(tmp_path / "out")
    assert set(written) == {"a frame 161 wide"}
    assert set(fake.asked) == {("Salesforce/blip-image-captioning-base", True)}
    assert sum(fake.batches) == len(written)
    options = json.loads((tmp_path / "out/meta.json").read_text())["options"]
    assert (options["captions"], options["blip"]) == ("blip", "Salesforce/blip-image-captioning-base")
    assert len(fake.batches) <= 5  # one a video


def test_weights_are_downloaded_only_if_not_cached(monkeypatch, caplog):
    fake = fake_transformers(cached=False)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with caplog.at_level("INFO"):
        BlipCaptioner()
    assert "is not in the Hugging Face cache; downloading it" in caplog.text
    assert [local for _, local in fake.asked] == [True, False, False]


def test_without_weights(videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(cached=False, online=False))
    message = (
        r"expected BLIP's weights and processor, found cannot find the weights\. With network access, once: "
        r"`huggingface-cli download Salesforce/blip-image-captioning-base`"
    )
    with pytest.raises(DataError, match=message):
        prepare(videos, tmp_path / "out", PrepareOptions(captions="blip"), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tiny_blip(tmp_path_factory):
    """A folder with a randomly initialised BLIP of two layers and its processor, built from a configuration."""
    transformers = pytest.importorskip("transformers", reason="BLIP needs the extra: pip install 'm4kernels[blip]'")
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "[ENC]", *(f"word{number}" for number in range(58))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(bos_token_id=4, pad_token_id=0, eos_token_id=3, sep_token_id=3)
    config = transformers.BlipConfig(
        text_config=dict(sizes, vocab_size=len(words), encoder_hidden_size=32, max_position_embeddings=40, **ids),
        vision_config=dict(sizes, image_size=64, patch_size=16),
        projection_dim=32,
    )
    torch.manual_seed(0)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    image_processor = transformers.BlipImageProcessor(size={"height": 64, "width": 64})
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]", mask_token="[ENC]")
    transformers.BlipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def test_tiny_blip_captions_images(tiny_blip):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in range(3)]
    captioner = BlipCaptioner(tiny_blip, device="cpu")
    together = captioner(images)
    assert len(together) == 3
    assert all(text.startswith("word") for text in together), together
    assert together == [captioner([image])[0] for image in images]
    assert captioner([]) == []


def test_tiny_blip_in_prepare(tiny_blip, videos, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepare(videos, tmp_path / "out", PrepareOptions(captions="blip", blip_dir=str(tiny_blip)), progress=False)
    written = read_captions(tmp_path / "out")
    assert len(written) == len(list((tmp_path / "out").glob("*/coords/*")))
    assert all(written)
    assert "blip_dir" not in json.loads((tmp_path / "out/meta.json").read_text())["options"]


def test_a_blip_folder_with_damaged_weights(tiny_blip, tmp_path):
    shutil.copytree(tiny_blip, tmp_path / "blip")
    (tmp_path / "blip/model.safetensors").unlink()
    with pytest.raises(DataError, match=r"--captions blip \(.*blip\): expected BLIP's weights and processor"):
        BlipCaptioner(tmp_path / "blip")
