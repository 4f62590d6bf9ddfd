"""`python -m benchmarks.moving`, of a tiny model: what it compares does the same work; the table follows from it."""

import json
import sys

import pytest
import torch

from benchmarks import moving
from m4.config import load_config

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_form_takes_the_same_steps(tiny_config) -> None:
    config, _ = load_config(tiny_config)
    batch = moving.masking_of(config).collate(moving.random_samples(config, 3), sample_ids=[0, 1, 2])
    weights = {}
    for form in moving.FORMS:
        torch.manual_seed(0)
        steps = moving.Steps(config, torch.float32)
        for _ in range(3):
            steps.step(form, batch)
        assert steps.model.config.kernels == form
        weights[form] = [p.detach().clone() for p in steps.model.parameters()]
    # AdamW's first steps are as long for the smallest gradient as for the largest, and roundings decide their signs.
    for form in ("reference", "reference-matmul"):
        for ours, theirs in zip(weights["auto"], weights[form], strict=True):
            assert float((ours - theirs).abs().max()) <= 2 * 3 * 1e-5
            assert float(((ours - theirs).abs() > 1e-6).float().mean()) < 0.05


def test_figures_and_table(tiny_config, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "moving.json"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "moving",
            "--config",
            str(tiny_config),
            "--samples",
            "2",
            "--masked",
            "3",
            "--seconds",
            "0",
            "--out",
            str(out),
        ],
    )
    assert moving.main() == 0
    lines = capsys.readouterr().out.strip().splitlines()
    found = json.loads(out.read_text())
    assert set(found["steps"]["2"]) == set(moving.FORMS)
    assert all(figure > 0 for form in found["steps"]["2"].values() for figure in form.values())
    found["steps"]["2"] = {"auto": {"s": 1.0, "bytes": 1e9}, "reference": {"s": 2.5, "bytes": 3e9},
                           "reference-matmul": {"s": 4.0, "bytes": 5e9}}  # fmt: skip
    found["masking"] = {"nano4M's rule": 0.08, "transform": 0.01, "collate": 0.0005}
    table = moving.table(found).splitlines()
    assert [len(line.split("|")) for line in table] == [7] * 6
    assert table[0] == lines[0]
    assert table[2] == "| a step of 2 samples | 4 s | 2.5 s | 1 s | 4.0, 2.5 |"
    assert table[3] == "| its memory, GB | 5 | 3 | 1 | 5.0, 3.0 |"
    assert table[4] == "| masking 3 samples, one after the other | 80.0 ms | | 10.0 ms | 8.0 |"
    assert table[5] == "| the same, together by `collate` | | | 0.50 ms | 160 |"
