"""What a session of `make gpu` found: the goals it reached, and its place among the results."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.gpu import goals
from benchmarks.gpu.folder import Folder, records_of
from benchmarks.gpu.session import collect, readme_rows
from benchmarks.results import Record


def of_a_gpu(tmp_path: Path) -> Folder:
    """A session on a GPU, made up."""
    folder = Folder(tmp_path / "out", "session")
    environment = {"gpu": "NVIDIA Some", "cpu": "Any", "commit": "abcdef0123", "threads": 2, "simd": None, "torch": "2"}
    folder.append("session", stamp="20300102-030405-6", time="2030-01-02", machine="any-some", environment=environment)
    folder.append("environment", simd="avx512", gpu=None)

    def took(op: str, case: str, provider: str, seconds: float, share: float = 0.5, memory: int = 100) -> None:
        folder.time(Record(op, case, provider, seconds, 5, "1 GB/s", "formula", share, memory))

    for case in (goals.ENCODER, goals.DECODER, goals.CROSS):
        for provider, seconds in (("triton", 5e-5), ("SDPA padded", 2e-4), ("varlen_attn", 6e-5), ("triton", 6e-5)):
            took("cross_modal_attention", case, provider, seconds)
    took("linear_cross_entropy", goals.LOSS, "triton", 4e-3, memory=100)
    took("linear_cross_entropy", goals.LOSS, "whole logits packed", 8e-3, memory=500)
    took("quantize_coords", "1,000,000 samples", "cuda", 1e-4, share=0.9)
    took("training_step", "M4, 96 samples", "captured", 0.03)
    took("training_step", "M4, 96 samples", "captured, compiled", 0.02)
    took("training_step", "M4, 96 samples", "reference", 0.12)
    folder.append(
        "step", case="M4, 96 samples", provider="captured, compiled", milliseconds=20.0, samples_a_second=4800.0,
        of_product_rate=0.51, recipe_minutes=40.7,
    )  # fmt: skip
    folder.append("speedup", name="a over b", value=2.0)
    return folder


def test_goals_are_read_from_the_records(tmp_path: Path) -> None:
    said = goals.lines(records_of(of_a_gpu(tmp_path).path))
    assert "NVIDIA Some" in said[0]
    assert [line.split()[0] for line in said[1:]] == [
        "reached",  # quantize_coords
        "not",  # mask_tokens, of which there is nothing
        "reached",  # 24 calls of 60 us: 1.44 ms
        "reached",  # 200 over 60 us
        "MISSED",  # 60 over 60 us
        "reached",
        "reached",  # 100 of 500 bytes
        "reached",  # the compiled one
        "MISSED",
    ]
    assert "1.44, wanted at most 1.95" in said[3]


def test_what_came_back_is_put_among_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder or from the tar alone, in a form that the plot reads; the README's rows follow from it."""
    matplotlib = pytest.importorskip("matplotlib")
    assert matplotlib
    from benchmarks import plot

    folder = of_a_gpu(tmp_path)
    tar = shutil.copy(folder.pack(), tmp_path / "back.tar")
    paths = [collect(path, tmp_path / "results") for path in (folder.path, tar)]
    assert paths == [tmp_path / "results/any-some/20300102-030405-6-abcdef0.json"] * 2
    body = json.loads(paths[0].read_text())
    assert body["environment"]["simd"] == "avx512"
    assert body["environment"]["gpu"] == "NVIDIA Some"  # what a stage does not know changes nothing
    assert body["speedups"] == {"a over b": 2.0}
    attention = {r["provider"]: r["seconds"] for r in body["records"] if r["case"] == goals.CROSS}
    assert attention["triton"] == 6e-5  # the last time
    assert plot.newest(tmp_path / "results/any-some") == paths[0]
    plot.draw(body, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    rows = "\n".join(readme_rows(records_of(folder.path)))
    assert "9,120 tokens, 65,536 classes: 4.00 ms | whole logits packed | 2.0 |" in rows
    assert "20.0 ms | 4,800 samples/s, 51% of the product rate | 6.0 times as fast as the padded reference |" in rows
