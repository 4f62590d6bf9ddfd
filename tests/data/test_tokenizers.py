"""Image tokenizers: the embedded one's quality, stability and determinism; Cosmos' files and their faults."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from m4.data.framing import frame_for
from m4.data.preparation.options import PrepareOptions
from m4.data.preparation.prepare import prepare
from m4.data.preparation.tokenize_video import shared_tokenizer
from m4.data.tokenizers import make_tokenizer, mirrored_codes, tokenizer_of
from m4.data.tokenizers.base import BASIS, LEVELS, VOCAB_SIZE
from m4.data.tokenizers.cosmos import CosmosTokenizer
from m4.data.tokenizers.fsq import FSQTokenizer
from m4.errors import DataError
from m4.modalities import mirror_image

# Row 8 of the first real frame, centred.
GOLDEN = [
    32850,
    30866,
    31378,
    31890,
    31889,
    32401,
    32401,
    32401,
    32914,
    42141,
    46747,
    32922,
    32410,
    32410,
    32922,
    43738,
]
NOBODY = np.zeros(13), np.zeros(13), np.zeros(13, bool)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2, axis=(1, 2, 3)))


@pytest.fixture(scope="module")
def real_images(shared_dir):
    paths = sorted((shared_dir / "real_frames/swing").glob("*.jpg"))[::10]
    images = [Image.open(path).convert("RGB") for path in paths]
    return np.stack([np.asarray(frame_for(im.size[::-1], *NOBODY, "center").apply_image(im)) for im in images])


def test_levels_are_those_of_cosmos():
    assert np.prod(LEVELS) == VOCAB_SIZE == 64_000
    assert list(BASIS) == [int(np.prod(LEVELS[:index])) for index in range(6)]


def test_fsq_psnr_on_real_frames(real_images):
    tokenizer = FSQTokenizer()
    tokens = tokenizer.encode(real_images)
    assert tokens.shape == (len(real_images), 16, 16)
    assert tokens.dtype == np.int64
    assert tokens.min() >= 0
    assert tokens.max() < 64_000
    quality = psnr(real_images, tokenizer.decode(tokens))
    assert quality.mean() >= 25.5
    assert quality.min() >= 23


def _check_mirrored(images):
    """A mirrored picture has exactly the mirrored tokens."""
    tokenizer = FSQTokenizer()
    tokens, turned = (torch.from_numpy(tokenizer.encode(i)).flatten(1) for i in (images, images[:, :, ::-1]))
    codes = torch.from_numpy(mirrored_codes({"options": {"tokenizer": "fsq"}}))
    assert torch.equal(mirror_image(tokens, codes), turned)
    assert (tokens != turned).float().mean() > 0.5
    # What they decode to is mirrored too, up to the rounding of a level.
    decoded, mirrored = (tokenizer.decode(t.view(-1, 16, 16).numpy()).astype(int) for t in (tokens, turned))
    assert np.abs(decoded[:, :, ::-1] - mirrored).max() <= 1


def test_fsq_codes_of_mirrored_pictures():
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    ramps = (np.arange(256) * random.uniform(0, 40, (4, 16, 1))).repeat(16, 1)[..., None] % 256
    _check_mirrored(noise)
    _check_mirrored(np.broadcast_to(ramps, (4, 256, 256, 3)).astype(np.uint8))
    codes = mirrored_codes({"options": {"tokenizer": "fsq"}})
    assert np.array_equal(codes[codes], np.arange(64_000))


def test_fsq_codes_of_mirrored_real_frames(real_images):
    _check_mirrored(real_images)


def test_fsq_reaches_every_code_and_no_other():
    tokenizer = FSQTokenizer()
    everything = np.arange(64_000).reshape(-1, 16, 16)[::10]
    assert tokenizer.decode(everything).shape == (len(everything), 256, 256, 3)
    noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    for images in (noise, np.zeros_like(noise), np.full_like(noise, 255), (noise > 127).astype(np.uint8) * 255):
        tokens = tokenizer.encode(images)
        assert tokens.min() >= 0
        assert tokens.max() < 64_000


def test_fsq_is_stable_under_noise_and_constant_on_plain_areas():
    tokenizer = FSQTokenizer()
    plain = np.full((1, 256, 256, 3), (125, 95, 70), np.uint8)
    noisy = plain + np.random.default_rng(0).integers(-4, 5, plain.shape)
    assert len(np.unique(tokenizer.encode(plain))) == 1
    assert (tokenizer.encode(noisy.astype(np.uint8)) == tokenizer.encode(plain)).all()


def test_fsq_does_not_depend_on_the_batch(real_images):
    tokenizer = FSQTokenizer()
    whole = tokenizer.encode(real_images)
    single = np.concatenate([FSQTokenizer().encode(image[None]) for image in real_images])
    np.testing.assert_array_equal(whole, single)
    np.testing.assert_array_equal(tokenizer.decode(whole)[3], tokenizer.decode(whole[3:4])[0])
    # A permanent record: new code may not change what old token files mean.
    assert whole[0, 8].tolist() == GOLDEN


def test_fsq_colours_and_slopes_survive():
    tokenizer = FSQTokenizer()
    ramp = np.tile(np.linspace(40, 215, 256)[None, :, None], (256, 1, 3)).astype(np.uint8)[None]
    assert psnr(ramp, tokenizer.decode(tokenizer.encode(ramp)))[0] > 35
    for color in ((200, 60, 50), (60, 160, 70), (60, 90, 190), (230, 190, 160)):
        image = np.full((1, 256, 256, 3), color, np.uint8)
        error = np.abs(tokenizer.decode(tokenizer.encode(image)).astype(int) - image)
        assert error.max() <= 24, color


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 256, 256, 3), np.float32),
        np.zeros((256, 256, 3), np.uint8),
        np.zeros((1, 240, 256, 3), np.uint8),
        np.zeros((1, 3, 256, 256), np.uint8),
    ],
)
def test_bad_images(images):
    with pytest.raises(DataError, match=r"images: expected uint8 \(B, 256, 256, 3\)"):
        FSQTokenizer().encode(images)


def test_bad_tokens():
    with pytest.raises(DataError, match=r"ids in \[0, 64000\), found 64000"):
        FSQTokenizer().decode(np.full((1, 16, 16), 64_000))
    with pytest.raises(DataError, match=r"ids in \[0, 64000\), found -1"):
        FSQTokenizer().decode(np.full((1, 16, 16), -1))
    with pytest.raises(DataError, match=r"integers \(B, 16, 16\)"):
        FSQTokenizer().decode(np.zeros((1, 256), int))
    with pytest.raises(DataError, match="expected fsq or cosmos, found 'vqgan'"):
        make_tokenizer("vqgan")


class Encoder(torch.nn.Module):
    """Block means of the first channel, in the published encoder's form."""

    def __init__(self, top: float = 63_999.0):
        super().__init__()
        self.top = torch.nn.Parameter(torch.tensor(top))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.avg_pool2d(x[:, 0], 16)
        return ((mean + 1) / 2 * self.top).round().to(torch.int32), x


class Decoder(torch.nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        value = tokens.float() / 63_999 * 2 - 1
        value = value.repeat_interleave(16, 1).repeat_interleave(16, 2)
        return torch.stack([value, value, value], 1) * 1.01


class Half(torch.nn.Module):
    """Takes bfloat16 only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.bfloat16
        return x


class Unbounded(torch.nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.full([tokens.shape[0], 3, 256, 256], float("nan"))


class Floating(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def save(module, path):
    torch.jit.script(module).save(str(path))


@pytest.fixture
def cosmos_dir(tmp_path):
    save(Encoder(), tmp_path / "encoder.jit")
    save(Decoder(), tmp_path / "decoder.jit")
    return tmp_path


def test_cosmos_round_trip(cosmos_dir):
    tokenizer = make_tokenizer("cosmos", cosmos_dir)
    levels = np.linspace(0, 255, 256).round().astype(np.uint8).reshape(16, 16)
    images = np.repeat(levels.repeat(16, 0).repeat(16, 1)[None, :, :, None], 3, -1)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (1, 16, 16)
    assert tokens[0, 0, 0] == 0
    assert tokens[0, -1, -1] == 63_999
    assert np.abs(tokenizer.decode(tokens).astype(int) - images).max() <= 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cosmos_precision(cosmos_dir, dtype):
    """Both types, and any number of pictures: batches do not show."""
    images = np.random.default_rng(0).integers(0, 256, (35, 1, 1, 3), dtype=np.uint8).repeat(256, 1).repeat(256, 2)
    tokenizer = make_tokenizer("cosmos", cosmos_dir, dtype)
    tokens = tokenizer.encode(images)
    np.testing.assert_array_equal(tokens[34:], CosmosTokenizer(cosmos_dir, "cpu", dtype).encode(images[34:]))
    expected = images[:, 0, 0, 0] / 255 * 63_999
    assert np.abs(tokens - expected[:, None, None]).max() <= (1 if dtype == "fp32" else 64_000 / 128)
    assert tokenizer.decode(tokens[:33]).shape == (33, 256, 256, 3)
    assert tokenizer.encode(images[:0]).shape == (0, 16, 16)
    assert tokenizer.decode(tokens[:0]).shape == (0, 256, 256, 3)
    with pytest.raises(DataError, match="expected fp32 or bf16, found 'fp8'"):
        make_tokenizer("cosmos", cosmos_dir, "fp8")


def test_cosmos_is_lazy(cosmos_dir):
    """The decoder's file is read when something is decoded, and not before."""
    (cosmos_dir / "decoder.jit").write_bytes(b"broken")
    tokenizer = CosmosTokenizer(cosmos_dir)
    tokens = tokenizer.encode(np.zeros((1, 256, 256, 3), np.uint8))
    with pytest.raises(DataError, match=r"decoder\.jit: expected a TorchScript file"):
        tokenizer.decode(tokens)


def test_cosmos_refuses_ids_without_a_code(cosmos_dir):
    tokens = np.zeros((2, 16, 16), int)
    tokens[1, 3, 4] = 64_000
    with pytest.raises(DataError, match=r"tokens: expected ids in \[0, 64000\), found 64000\. .*mask those logits"):
        CosmosTokenizer(cosmos_dir).decode(tokens)


def test_cosmos_from_the_hugging_face_cache(cosmos_dir, tmp_path, monkeypatch):
    snapshots = tmp_path / "home/hub/models--nvidia--Cosmos-0.1-Tokenizer-DI16x16/snapshots"
    for revision in ("a1", "b2"):  # the first was only half downloaded
        (snapshots / revision).mkdir(parents=True)
        shutil.copy(cosmos_dir / "encoder.jit", snapshots / revision)
    shutil.copy(cosmos_dir / "decoder.jit", snapshots / "b2")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert make_tokenizer("cosmos").folder == snapshots / "b2"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"--cosmos-dir: .* no folder given, and no encoder\.jit and decoder\.jit in"):
        make_tokenizer("cosmos")


def test_cosmos_without_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"--cosmos-dir: .* nvidia/Cosmos-0\.1-Tokenizer-DI16x16"):
        make_tokenizer("cosmos")
    with pytest.raises(DataError, match=r"encoder\.jit: expected a file.*huggingface-cli download"):
        make_tokenizer("cosmos", tmp_path)


def test_cosmos_in_prepare(cosmos_dir, videos, tmp_path):
    """The weights are part of what a folder is made with."""
    out = tmp_path / "out"
    options = PrepareOptions(tokenizer="cosmos", cosmos_dir=str(cosmos_dir), cosmos_dtype="fp32")
    prepare(videos, out, options, progress=False)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["tokenizer"]["id"] == "cosmos-0.1-di16x16"
    assert meta["tokenizer"]["weights"] == hashlib.sha256((cosmos_dir / "encoder.jit").read_bytes()).hexdigest()
    assert meta["options"]["cosmos_dtype"] == "fp32"
    with pytest.raises(DataError, match="expected cosmos_dtype 'bf16', found data made with cosmos_dtype 'fp32'"):
        prepare(videos, out, dataclasses.replace(options, cosmos_dtype="bf16"), progress=False)
    save(Encoder(60_000.0), cosmos_dir / "encoder.jit")
    shared_tokenizer.cache_clear()
    with pytest.raises(DataError, match="found data made with weights"):
        prepare(videos, out, options, progress=False)


def test_cosmos_with_broken_files(cosmos_dir):
    (cosmos_dir / "encoder.jit").write_bytes(b"version https://git-lfs")
    with pytest.raises(DataError, match=r"encoder\.jit: expected a TorchScript file"):
        CosmosTokenizer(cosmos_dir).encode(np.zeros((1, 256, 256, 3), np.uint8))
    save(Encoder(70_000.0), cosmos_dir / "encoder.jit")
    with pytest.raises(DataError, match=r"ids in \[0, 64000\), found .* 70000"):
        CosmosTokenizer(cosmos_dir).encode(np.full((1, 256, 256, 3), 255, np.uint8))
    save(Floating(), cosmos_dir / "encoder.jit")
    with pytest.raises(DataError, match=r"expected integers \(1, 16, 16\)"):
        CosmosTokenizer(cosmos_dir).encode(np.zeros((1, 256, 256, 3), np.uint8))
    save(Floating(), cosmos_dir / "decoder.jit")
    with pytest.raises(DataError, match=r"decoder\.jit: expected \(1, 3, 256, 256\)"):
        CosmosTokenizer(cosmos_dir).decode(np.zeros((1, 16, 16), int))
    save(Unbounded(), cosmos_dir / "decoder.jit")
    with pytest.raises(DataError, match=r"decoder\.jit: expected finite pixels, found NaN"):
        CosmosTokenizer(cosmos_dir).decode(np.zeros((1, 16, 16), int))
    save(Half(), cosmos_dir / "encoder.jit")
    with pytest.raises(DataError, match=r"expected a module that takes torch\.float32 .* Try --cosmos-dtype bf16"):
        CosmosTokenizer(cosmos_dir, "cpu", "fp32").encode(np.zeros((1, 256, 256, 3), np.uint8))


def test_the_tokenizer_of_data_is_of_its_version():
    ours = make_tokenizer("fsq").id
    for meta in ({}, {"tokenizer": {"id": ours}}, {"tokenizer": {}}):
        assert tokenizer_of(meta).id == ours
    other = {"options": {"tokenizer": "fsq"}, "tokenizer": {"id": "fsq-block16-v0"}}
    with pytest.raises(DataError, match=f"expected images of the tokenizer {ours}.*found those of fsq-block16-v0"):
        tokenizer_of(other)
    assert tokenizer_of(other, "fsq").id == ours  # asked for by name
