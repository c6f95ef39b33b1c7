"""Calls the kernels of every op, those of the gradients too.

By default on each small case in float32, float64 and the mixes of dtypes that it names, and on two of a detector's
size: what check.sh runs under compute-sanitizer. Whether the results are right is the tests' to ask. Every output is
copied to the CPU, so that initcheck sees an element that no kernel wrote.

With ``--compare``, a first look: op by op, one small case in each dtype and one of a detector's size are compared
with the CPU's to the bit, and a line says OK, BITS DIFFER or what was raised. An op that breaks CUDA for the rest of
the process, or hangs, ends it; ``--after`` goes on in another.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

if not __package__:  # run as a script
    sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])  # tests, the repository

import torch

from benchmarks.base import difference
from opinfo import OPS
from opinfo.spec import EXACT, Case, Inputs, Mix, OpInfo, convert, tensors_in

SEED = 20
HANGS = 10  # seconds without an answer of an op that takes one at most
LARGE = ("multibox_loss", "detect")  # whose case of a detector's size is called, not compared alone


def outputs(op: OpInfo, inputs: Inputs, device: str) -> Any:
    """What the op gives on ``device``, and its gradients, on the CPU."""
    inputs = op.with_leaves(convert(inputs, device=device))
    call = partial(op.op, **inputs)
    return convert((op.with_gradients(call, inputs) if op.differentiable else call)(), device="cpu")


def calls() -> Iterator[tuple[OpInfo, Case, torch.dtype | Mix]]:
    """All that there are; the most wanted first, should time run out."""
    for dtype in EXACT:
        for op in OPS:
            for case in op.cases:
                if not case.benchmark and dtype in case.dtypes:
                    yield op, case, dtype
        for op in OPS if dtype == torch.float32 else ():
            if op.name in LARGE:
                yield op, op.full_size_case, dtype
    for op in OPS:
        for case in op.cases:
            for mix in case.mixes:
                yield op, case, mix


def is_lost(device: str) -> bool:
    """Whether the process can do nothing more on ``device``."""
    try:
        torch.zeros(1, device=device).sum().item()
    except RuntimeError:
        return True
    return False


def call_all(device: str, seconds: float) -> tuple[int, int, int]:
    """How many calls were made until ``seconds`` had passed, how many there are, and how many raised. Each is named
    before it begins. After one that breaks CUDA for the rest of the process there is none.
    """
    start = perf_counter()
    done = failed = 0
    every = list(calls())
    for op, case, dtype in every:
        if perf_counter() - start > seconds:
            break
        done += 1
        print(f"call {done} of {len(every)}: {op.name}, {case.name}, {dtype}", flush=True)
        try:
            outputs(op, convert(case.make(torch.Generator().manual_seed(SEED)), dtype), device)
        except Exception:
            print(f"FAILED: {op.name}, {case.name}, {dtype}", flush=True)
            traceback.print_exc(limit=-3)
            failed += 1
            if is_lost(device):
                break
    return done, len(every), failed


def compare(op: OpInfo, device: str) -> str:
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
    """A line for each op; 1 where CUDA is lost, or an op hangs, before the last."""
    names = [op.name for op in OPS]
    print("ops:", *names, flush=True)
    torch.zeros(1, device=device)  # the first call of all takes longer
    for op in OPS[names.index(after) + 1 if after else 0 :]:
        print(f"{op.name}: ", end="", flush=True)  # who reads this knows whom a crash is of
        if device == "cuda":
            faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            print(compare(op, device), flush=True)
        except Exception as e:
            print(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}", flush=True)
            traceback.print_exc(limit=-3)
            if is_lost(device):
                return 1
    faulthandler.cancel_dump_traceback_later()
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
    done, total, failed = call_all(args.device, args.seconds)
    print(f"{done} of {total} calls, {failed} failed", flush=True)
    if args.plant:
        print(f"planted, CUDA error {plant(*args.plant)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
