"""`python -m benchmarks.gpu.once`: every kernel of ours once, for tools that watch a program's kernels.

Tiny inputs by default, as a memory checker is slow; `--large` runs a layer's attention and the loss at M4's shapes, for
hardware counters.
"""

import argparse

import torch

from benchmarks.device import DEVICE, ON_GPU, backends, moved
from benchmarks.gpu.ops import checks, ops

HOST = ("cpp", "reference")  # backends without kernels
COUNTED = ("cross_modal_attention", "linear_cross_entropy")


def run(*, large: bool) -> int:
    """How many checks were run."""
    known = checks(small=not (large and ON_GPU))
    done = 0
    for op in COUNTED if large else ops():
        for check in known.get(op, [])[: 1 if large else None]:
            dtype = check.dtypes[0] if check.dtypes else None
            inputs = moved(check.build(), DEVICE, dtype)
            for backend in backends(op)[: 1 if large else None]:
                if ON_GPU and backend in HOST:
                    continue
                check.run(inputs, backend)
                if ON_GPU:
                    torch.cuda.synchronize()
                print(f"{op}, {check.name}, {backend}", flush=True)
                done += 1
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="attention and the loss at M4's shapes")
    print(f"{run(large=parser.parse_args().large)} runs of kernels")
