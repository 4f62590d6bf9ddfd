"""The record of a run."""

import json

from m4.run.metrics import truncate_metrics


def test_truncation_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3, 4)) + '\n{"kind": "tr')
    truncate_metrics(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    truncate_metrics(tmp_path / "new.jsonl", 5)
    assert (tmp_path / "new.jsonl").read_text() == ""
