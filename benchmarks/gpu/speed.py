"""The card as it is found, and how fast it copies and multiplies: what everything else is held against."""

import shutil
import subprocess
from typing import Any

import torch

from benchmarks.device import DEVICE, ON_GPU
from benchmarks.gpu.folder import Folder
from benchmarks.measure import copy_bandwidth, product_rate, product_rates

ASKED = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu", "memory.used", "memory.total",
)  # fmt: skip
WHY_SLOW = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # by the driver's age


def asked(*fields: str) -> list[str] | None:
    """What nvidia-smi answers; None where there is none, or it does not know a field. A question, never a setting."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [field.strip() for field in done.stdout.split("\n")[0].split(",")] if done.returncode == 0 else None


def card() -> dict[str, Any]:
    """What is known of the card now; {} where nothing is."""
    found = asked(*ASKED)
    values: dict[str, Any] = dict(zip(ASKED, found, strict=False)) if found else {}
    for field in WHY_SLOW:
        reasons = asked(field)
        if reasons is not None:
            values["slowed_by"] = reasons[0]
            break
    return values


def run(folder: Folder) -> None:
    """The stage "speed"."""
    with folder.part("the card as found"):
        folder.append("card", when="as found", **card())
    with folder.part("copying and multiplying"):
        rates = {name: rate / 1e9 for name, rate in product_rates().items()}
        folder.append(
            "environment",
            copy_gigabytes_per_second=copy_bandwidth() / 1e9,
            product_gigaflops=product_rate() / 1e9,
            products_gigaflops=rates,
        )
        print(f"copying {copy_bandwidth() / 1e9:.0f} GB/s; products: {rates} GFLOP/s", flush=True)
    with folder.part("the card at work"):
        a = torch.randn(8192 if ON_GPU else 64, 8192 if ON_GPU else 64, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(600 if ON_GPU else 1):  # about a second, while nvidia-smi is asked
            a @ a
        folder.append("card", when="at work", **card())
        if ON_GPU:
            torch.cuda.synchronize()
    if ON_GPU:
        properties = torch.cuda.get_device_properties(DEVICE)
        folder.append("device", properties=str(properties), free_and_total=torch.cuda.mem_get_info())
