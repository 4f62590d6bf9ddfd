"""The prediction of the next moment as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m4.poses import PCK_SHARES

_NAMES = {
    "copy": "copying the reference",
    "marginal": "median of the training set",
    "displacement": "displacement histogram",
}


def next_lines(figures: Mapping[str, Any]) -> list[str]:
    """The section ``next`` of an evaluation: a table of poses, one of frames, and what was left out."""
    lines = []
    if "pose" in figures:
        pose = figures["pose"]
        lines += [
            f"next pose of {figures['samples']} samples, {pose['joints']} joints that are visible in both frames",
            _row("", ["error px", *(f"PCK@{share:g}" for share in PCK_SHARES), "visibility", "nats"]),
            *(_row(name, _pose(row)) for name, row in _rows(pose, ("copy", "marginal", "displacement"))),
        ]
        if "nearest" in pose:
            names = f"nearest of {pose['nearest']['samples']} drawn", "the same of the histogram"
            nearest = pose["nearest"], pose["displacement"]["nearest"]
            lines += [_row(name, _pose(row)) for name, row in zip(names, nearest, strict=True)]
    if "frame" in figures:
        lines += [
            f"next frame of {figures['samples']} samples",
            _row("", ["tokens", "PSNR dB", "person dB", "SSIM"]),
            *(_row(name, _frame(row)) for name, row in _rows(figures["frame"], ("copy",))),
        ]
    return lines + [f"left out, the next {what}: {why}" for what, why in figures["left_out"].items()]


def next_line(figures: Mapping[str, Any]) -> str:
    """The section ``next`` of an evaluation during training in a line, each figure beside that of copying."""
    parts = []
    if "pose" in figures:
        pose, copied = _pose(figures["pose"]), _pose(figures["pose"]["copy"])
        parts += [f"pose {pose[0]} px (copying {copied[0]})", f"PCK@0.2 {pose[3]} ({copied[3]})", f"{pose[-1]} nats"]
    if "frame" in figures:
        frame, copied = _frame(figures["frame"]), _frame(figures["frame"]["copy"])
        parts.append(f"frame tokens {frame[0]} (copying {copied[0]})")
    return f"next {', '.join(parts)}; {figures['samples']} samples"


def _rows(figures: Mapping[str, Any], others: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    return [("model", figures), *((_NAMES[name], figures[name]) for name in others)]


def _pose(row: Mapping[str, Any]) -> list[str]:
    pck = row.get("pck", {})
    return [
        _number(row.get("error_px"), ".2f"),
        *(_number(pck.get(f"{share:g}"), ".1%") for share in PCK_SHARES),
        _number(row.get("visibility_accuracy"), ".1%"),
        _number(row.get("nats"), ".4f"),
    ]


def _frame(row: Mapping[str, Any]) -> list[str]:
    return [
        _number(row.get("token_accuracy"), ".1%"),
        _number(row.get("psnr"), ".2f"),
        _number(row.get("psnr_person"), ".2f"),
        _number(row.get("ssim"), ".4f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<27}" + "".join(f" {cell:>10}" for cell in cells)
