"""Calls the kernels of every op, those of the gradients too.

By default on each small case in float32 and float64, and on two of a detector's size: what gpu_check.sh runs under
compute-sanitizer. Whether the results are right is the tests' to ask. Every output is copied to the CPU, so that
initcheck sees an element that no kernel wrote.

With ``--compare``, a first look: op by op, one small case in each dtype and one of a detector's size are compared
with the CPU's to the bit, and a line says OK, BITS DIFFER or what was raised. An op that breaks CUDA for the rest of
the process ends it; ``--after`` goes on in another.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.base import difference
from benchmarks.cases import OPS
from benchmarks.cases.spec import EXACT, Case, Inputs, Op, convert, tensors_in

SEED = 20
LARGE = ("multibox_loss", "detect")  # whose case of a detector's size is called, not compared alone


def outputs(op: Op, inputs: Inputs, device: str) -> Any:
    """What the op gives on ``device``, and its gradients, on the CPU."""
    inputs = op.with_leaves(convert(inputs, device=device))
    call = partial(op.op, **inputs)
    return convert((op.with_gradients(call, inputs) if op.differentiable else call)(), device="cpu")


def calls() -> Iterator[tuple[Op, Case, torch.dtype]]:
    """All that there are; the most wanted first, should time run out."""
    for dtype in EXACT:
        for op in OPS:
            for case in op.cases:
                if not case.benchmark and dtype in case.dtypes:
                    yield op, case, dtype
        for op in OPS if dtype == torch.float32 else ():
            if op.name in LARGE:
                yield op, op.full_size_case, dtype


def call_all(device: str, seconds: float) -> tuple[int, int]:
    """How many calls were made until ``seconds`` had passed, and how many of them raised."""
    start = perf_counter()
    done = failed = 0
    for op, case, dtype in calls():
        if perf_counter() - start > seconds:
            break
        try:
            outputs(op, convert(case.make(torch.Generator().manual_seed(SEED)), dtype), device)
        except Exception:
            print(f"FAILED: {op.name}, {case.name}, {dtype}", flush=True)
            traceback.print_exc(limit=-3)
            failed += 1
        done += 1
    return done, failed


def compare(op: Op, device: str) -> str:
    """``OK``, or what is wrong."""
    for case in (op.cases[0], op.full_size_case):
        made = case.make(torch.Generator().manual_seed(SEED))
        for dtype in case.dtypes:
            inputs = convert(made, dtype)
            both = (tensors_in(outputs(op, inputs, where)) for where in ("cpu", device))
            for i, (expected, found) in enumerate(zip(*both, strict=True)):
                if text := difference(expected, found, names=("CPU's", "GPU's")):
                    return f"BITS DIFFER, {case.name}, {dtype}, output {i}: {text}"
    return "OK"


def compare_all(device: str, after: str | None) -> int:
    """A line for each op; 1 where CUDA is lost before the last."""
    names = [op.name for op in OPS]
    print("ops:", *names, flush=True)
    for op in OPS[names.index(after) + 1 if after else 0 :]:
        print(f"{op.name}: ", end="", flush=True)  # who reads this knows whom a crash is of
        try:
            print(compare(op, device), flush=True)
        except Exception as e:
            print(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}", flush=True)
            traceback.print_exc(limit=-3)
            try:
                torch.zeros(1, device=device).sum().item()
            except RuntimeError:
                return 1
    return 0


def plant(library: str, tool: str) -> int:
    """Launch the fault that ``tool`` must notice, on fresh memory of torch's; the CUDA error code."""
    function = getattr(ctypes.CDLL(library), f"plant_{tool}")
    memory = torch.empty(1000, device="cuda")
    return function(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.numel()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Call the kernels of every op, those of the gradients too.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no call after these")
    parser.add_argument("--plant", nargs=2, metavar=("LIBRARY", "TOOL"), help="then launch this fault")
    parser.add_argument("--compare", action="store_true", help="instead, compare a few results of each with the CPU's")
    parser.add_argument("--after", metavar="OP", help="leave out the ops up to this one")
    args = parser.parse_args()
    if args.compare:
        return compare_all(args.device, args.after)
    done, failed = call_all(args.device, args.seconds)
    print(f"{done} of {sum(1 for _ in calls())} calls, {failed} failed", flush=True)
    if args.plant:
        print(f"planted, CUDA error {plant(*args.plant)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
