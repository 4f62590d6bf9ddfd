"""The record of a run."""

import json

import pytest

from m4.run.metrics import read_metrics, truncate_metrics


def test_truncation_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3, 4)) + '\n{"kind": "tr')
    truncate_metrics(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    truncate_metrics(tmp_path / "new.jsonl", 5)
    assert (tmp_path / "new.jsonl").read_text() == ""


@pytest.mark.parametrize("damage", [b"{\n", b"[1]\n", b"\xff\n", b'{"kind": "train"}\n', b"\n", b'{"step": "1"}\n'])
def test_a_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: expected a JSON object"):
        read_metrics(path)
