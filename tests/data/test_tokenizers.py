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
from m4.data.synthetic.synth import SynthOptions, synthesize
from m4.data.tokenizers import code_levels, code_values, make_tokenizer, mirrored_codes, tokenizer_of
from m4.data.tokenizers.base import VOCAB_SIZE
from m4.data.tokenizers.cosmos import CosmosTokenizer
from m4.data.tokenizers.fsq import LEVELS, NEWEST, NUMBERINGS, FSQTokenizer, numbering_of
from m4.errors import DataError
from m4.modalities import BINS, IMAGE_LEVELS, mirror_image

# Row 8 of the first real frame, centred, by the first numbering.
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
    assert LEVELS == IMAGE_LEVELS == code_levels({}) == code_levels({"options": {"tokenizer": "cosmos"}})


@pytest.mark.parametrize("name", NUMBERINGS)
def test_every_code_has_one_id(name):
    numbering, ids = numbering_of(name), np.arange(64_000)
    levels = numbering.levels(ids)
    for level, count in zip(levels, LEVELS, strict=True):
        assert level.min() == 0
        assert np.array_equal(np.bincount(level), np.full(count, 64_000 // count))
    assert np.array_equal(numbering.ids(tuple(levels)), ids)
    # The id's digits, of which the model's initial values know: a step of each changes one level by one.
    step = 1
    for count in numbering.digits():
        changed = [level[step] - level[0] for level in levels]
        assert sorted(map(abs, changed)) == [0] * 5 + [1]
        step *= count
    assert step == 64_000
    assert code_levels({"options": {"tokenizer": "fsq"}, "tokenizer": {"id": name}}) == numbering.digits()


def test_numberings_are_of_the_same_codes(real_images):
    """What was prepared by the first numbering decodes as it did."""
    old, new = (FSQTokenizer(name) for name in NUMBERINGS)
    assert new.id == NEWEST == FSQTokenizer().id
    before, now = old.encode(real_images), new.encode(real_images)
    np.testing.assert_array_equal(old.decode(before), new.decode(now))
    meta = {"options": {"tokenizer": "fsq"}, "tokenizer": {"id": old.id}}
    np.testing.assert_array_equal(tokenizer_of(meta).decode(before), old.decode(before))
    np.testing.assert_array_equal(code_values(meta)[before], code_values({"options": {"tokenizer": "fsq"}})[now])


def test_hardly_any_block_shares_its_id_with_a_coordinate(real_images, tmp_path):
    assert (FSQTokenizer().encode(real_images) < BINS).mean() < 0.001
    synthesize(tmp_path, SynthOptions(videos=4, frames=(3, 3), seed=1), progress=False)
    frames = [Image.open(path) for path in sorted(tmp_path.glob("frames/*/*.jpg"))]
    drawn = np.stack([np.asarray(frame_for(im.size[::-1], *NOBODY, "center").apply_image(im)) for im in frames])
    assert (FSQTokenizer().encode(drawn) < BINS).mean() < 0.001
    assert (FSQTokenizer("fsq-block16-v1").encode(drawn) < BINS).mean() > 0.01  # what the numbering is for


def test_a_numbering_of_another_version():
    meta = {"options": {"tokenizer": "fsq"}, "tokenizer": {"id": "fsq-block16-v9"}}
    for of in (tokenizer_of, code_levels, code_values, mirrored_codes):
        with pytest.raises(DataError, match=r"tokenizer id: expected fsq-block16-v1 or .*'fsq-block16-v9'"):
            of(meta)


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
    assert FSQTokenizer("fsq-block16-v1").encode(real_images[:1])[0, 8].tolist() == GOLDEN
    first = numbering_of("fsq-block16-v1").levels(np.array(GOLDEN))
    assert whole[0, 8].tolist() == [
        dn + 5 * across + 25 * fine + 125 * coarse + 1000 * cr + 8000 * (7 - cb)
        for cb, cr, coarse, fine, across, dn in zip(*first, strict=True)
    ]


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
    unsaid = {"tokenizer": {"id": "cosmos-0.1-di16x16"}}  # and its options do not name it
    with pytest.raises(DataError, match=f"expected images of the tokenizer {ours}.*those of cosmos-0.1-di16x16"):
        tokenizer_of(unsaid)
    assert tokenizer_of(unsaid, "fsq").id == ours  # asked for by name
