"""A nano4M project whose `_target_` lines name ours: by `m4.train`, and by hydra in a loop as nano4M's own."""

import json
from typing import Any

import pytest
import torch

from m4.compat import FourM
from m4.config import load_config
from m4.training.trainer import Trainer
from tests.compat import nano4m_project
from tests.compat.test_nano4m_config import NESTED

OmegaConf = pytest.importorskip("omegaconf").OmegaConf  # a machine with a GPU may lack it
pytestmark = pytest.mark.usefixtures("one_thread")

OURS = (
    NESTED.replace("_target_: somewhere.models.FourM", "_target_: m4.compat.FourM")
    .replace("somewhere.data.create_dataloader", "m4.compat.create_multimodal_masked_dataloader")
    .replace("  enc_tokens_read_key: enc_tokens\n", "  enc_tokens_read_key: enc_tokens\n  use_bias: false\n")
)
SMALLER = {
    "max_seq_lens: [256, 39, 256, 39]": "max_seq_lens: [12, 6, 12, 6]",
    "vocab_sizes: [65536, 65536, 65536, 65536]": "vocab_sizes: [64, 64, 64, 64]",
    "input_tokens_range: [96, 256]": "input_tokens_range: [6, 12]",
    "target_tokens_range: [39, 256]": "target_tokens_range: [4, 12]",
    "batch_size: 96": "batch_size: 4",
    "num_workers: 10": "num_workers: 0",
    "total_tokens: 3000": "total_tokens: 0.032",
    "warmup_tokens: 500": "warmup_tokens: 0.008",
    "num_tokens_per_sample: 256": "num_tokens_per_sample: 1000",
    "eval_freq: 25": "eval_freq: 0.032",
    "dim: 512": "dim: 16",
    "head_dim: 32": "head_dim: 8",
    "enc_depth: 6": "enc_depth: 1",
    "dec_depth: 7": "dec_depth: 1",
}


@pytest.fixture
def project(tmp_path, token_root):
    """The configuration of a project, of the tests' size."""
    text = OURS.replace("/data/poses", str(token_root)).replace("./outputs/auto", f"{tmp_path}/outputs/auto")
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "project.yaml"
    path.write_text(text)
    return path


def test_by_m4_train(project, tmp_path) -> None:
    config, notes = load_config(project, ["global_batch_size=4", "device=cpu", "log.tensorboard=false"])
    text = "\n".join(notes)
    assert "model_config._target_: ignored, because the model is always m4.model.M4" in text
    assert "model_config.use_bias: false, as it always is here" in text
    assert Trainer(config).run("command") == 0
    lines = [json.loads(line) for line in (tmp_path / "outputs/project/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 9))


@pytest.mark.parametrize("which", ["hydra", "tiny"])
def test_by_instantiate(project, which: str) -> None:
    """nano4M's training in short: it reads the file, instantiates, and trains with an AdamW of its own."""
    instantiate = nano4m_project.instantiate if which == "tiny" else pytest.importorskip("hydra.utils").instantiate
    file = OmegaConf.load(project)
    args: Any = OmegaConf.to_container(file, resolve=True)
    torch.manual_seed(0)
    model = instantiate(args["model_config"])
    loader, evaluation = (instantiate(args[f"{which}_loader_config"]) for which in ("train", "eval"))
    assert isinstance(model, FourM)
    if which == "hydra":  # OmegaConf's own lists and sections do too
        assert instantiate(file.model_config).state_dict().keys() == model.state_dict().keys()
    config = load_config(project)[0].model_config()
    assert (config.modalities, config.max_seq_lens) == (model.modalities, model.max_seq_lens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _, batch in zip(range(30), loader, strict=False):
        loss, metrics = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert list(metrics) == args["global_vars"]["modalities"]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    with torch.no_grad():
        assert all(torch.isfinite(model(batch)[0]) for batch in evaluation)
