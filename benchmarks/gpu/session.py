"""What is kept of a session: a JSON file as `pytest benchmarks/ --save-results` writes it, and rows for the README."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.gpu import goals
from benchmarks.gpu.folder import records_of
from benchmarks.gpu.goals import Records
from benchmarks.results import RESULTS, Record, readable

FIELDS = [field.name for field in fields(Record)]
ELSEWHERE = ("time", "environment", "session", "speedup")  # kinds that have places of their own


def name_of(records: Records) -> str:
    """Of the session's file: its time and commit."""
    about = about_session(records)
    return f"{about['stamp']}-{about['environment']['commit'][:7]}.json"


def about_session(records: Records) -> dict[str, Any]:
    """What the session said of itself at its start.

    Raises:
        SystemExit: it said nothing.
    """
    found = next((record for record in records if record["kind"] == "session"), None)
    if found is None:
        raise SystemExit("these records do not begin with a session: they are none of `make gpu`")
    return found


def body_of(records: Records) -> dict[str, Any]:
    """As `benchmarks.plot` reads it; what has no place there is under "gpu", by its kind."""
    about = about_session(records)
    environment = dict(about["environment"])
    for record in records:
        if record["kind"] == "environment":
            environment |= {k: v for k, v in record.items() if k not in ("kind", "stage") and v is not None}
    others: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] not in ELSEWHERE:
            others.setdefault(record["kind"], []).append({k: v for k, v in record.items() if k != "kind"})
    # What was measured twice counts as it was the last time.
    times = {(r["op"], r["case"], r["provider"]): r for r in records if r["kind"] == "time"}
    return {
        "time": about["time"],
        "environment": environment,
        "records": [{name: record[name] for name in FIELDS} for record in times.values()],
        "speedups": {r["name"]: r["value"] for r in records if r["kind"] == "speedup"},
        "goals": goals.lines(records)[1:],
        "gpu": others,
    }


def text_of(records: Records) -> str:
    return json.dumps(body_of(records), indent=1) + "\n"


def collect(path: Path, results: Path = RESULTS) -> Path:
    """Put a session's file where results are committed, from its folder or its tar; it may have been cut off.

    Raises:
        SystemExit: the session is a rehearsal, or none.
    """
    records = records_of(path)
    about = about_session(records)
    if about["environment"]["gpu"] is None:
        raise SystemExit(f"{path} is a rehearsal on {about['environment']['cpu']}: there are no results of a GPU in it")
    target = results / about["machine"] / name_of(records)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text_of(records))
    return target


def readme_rows(records: Records) -> list[str]:
    """The README's table for this GPU, in Markdown: what was not measured is left out."""
    environment = about_session(records)["environment"]
    rows = [f"| on one {environment['gpu']}, bfloat16 | | |", "| --- | --- | --- |"]

    def row(what: str, against: str, value: float | None, shown: str = "{:.1f}") -> None:
        if value is not None:
            rows.append(f"| {what} | {against} | {shown.format(value)} |")

    def compared(op: str, case: str, title: str, peers: Sequence[str]) -> None:
        seconds = goals.own(records, op, case)
        if seconds is not None:
            for peer in peers:
                row(f"{title}: {readable(seconds)}", peer, goals.ratio(records, op, case, peer))

    for kind in ("encoder", "decoder", "cross"):
        compared(
            "cross_modal_attention", f"{kind}, batch 96", f"`cross_modal_attention` with backward, {kind}, 96 samples",
            ("SDPA padded", "varlen_attn", "FlexAttention"),
        )  # fmt: skip
    compared(
        "linear_cross_entropy", goals.LOSS, "`linear_cross_entropy` with backward, 9,120 tokens, 65,536 classes",
        ("whole logits packed", "whole logits compiled", "F.linear_cross_entropy"),
    )  # fmt: skip
    compared("mask_tokens", "M4 batch 96", "`mask_tokens`, batch 96", ("reference",))
    compared("quantize_coords", "1,000,000 samples", "`quantize_coords`, 1,000,000 samples", ("reference",))
    for record in records:
        if record["kind"] == "step":
            shape = f"one M4 training step, {record['case'].removeprefix('M4, ')}, {record['provider']}"
            rows.append(
                f"| {shape}: {record['milliseconds']:.1f} ms | {record['samples_a_second']:,.0f} samples/s, "
                f"{record['of_product_rate']:.0%} of the product rate | {padded_over(records, record)} |"
            )
    return rows


def padded_over(records: Records, step: dict[str, Any]) -> str:
    """How many times as long the padded reference took, where it was measured on the same step."""
    reference = goals.times(records, "training_step", step["case"]).get("reference")
    if reference is None or step["provider"] == "reference":
        return ""
    return f"{reference['seconds'] * 1e3 / step['milliseconds']:.1f} times as fast as the padded reference"
