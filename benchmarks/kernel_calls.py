"""Calls every op on each of its small cases in every dtype, once: what gpu_check.sh runs under compute-sanitizer.

Whether the results are right is the tests' to ask. Every output is copied to the CPU, so that initcheck
sees an element that no kernel wrote.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from benchmarks.cases import OPS  # noqa: E402
from benchmarks.cases.spec import FLOATS, Case, Op, convert  # noqa: E402

SEED = 20


def calls() -> Iterator[tuple[Op, Case, torch.dtype]]:
    """All that there are; float32 first, should time run out."""
    for dtype in FLOATS:
        for op in OPS:
            for case in op.cases:
                if not case.benchmark and dtype in case.dtypes:
                    yield op, case, dtype


def call_all(device: str, seconds: float) -> tuple[int, int]:
    """How many calls were made until ``seconds`` had passed, and how many of them raised."""
    start = perf_counter()
    done = failed = 0
    for op, case, dtype in calls():
        if perf_counter() - start > seconds:
            break
        inputs = convert(convert(case.make(torch.Generator().manual_seed(SEED)), dtype), device=device)
        try:
            convert(op.op(**inputs), device="cpu")
        except Exception:
            print(f"FAILED: {op.name}, {case.name}, {dtype}", flush=True)
            traceback.print_exc()
            failed += 1
        done += 1
    return done, failed


def plant(library: str, tool: str) -> int:
    """Launch the fault that ``tool`` must notice, on fresh memory of torch's; the CUDA error code."""
    function = getattr(ctypes.CDLL(library), f"plant_{tool}")
    memory = torch.empty(1000, device="cuda")
    return function(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.numel()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Call every op once on each of its small cases.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no call after these")
    parser.add_argument("--plant", nargs=2, metavar=("LIBRARY", "TOOL"), help="then launch this fault")
    args = parser.parse_args()
    done, failed = call_all(args.device, args.seconds)
    print(f"{done} of {sum(1 for _ in calls())} calls, {failed} failed", flush=True)
    if args.plant:
        print(f"planted, CUDA error {plant(*args.plant)}", flush=True)


if __name__ == "__main__":
    main()
