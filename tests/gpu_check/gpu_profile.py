"""Where an op's time goes on a GPU: its kernels, the gaps between them, the host.

    python tests/gpu_check/gpu_profile.py [--device cpu] [--seconds 55] [--cases TEXT] [--json FILE]

Prints the rates at which the device copies and fills memory, and how long a CUDA graph of next to nothing takes; then
for each case the median time of every kernel and of a CUDA graph's replay, both with an L2 that holds nothing of its
data, and of the host, all in microseconds; of the cases that have gradients, again with these. The most wanted cases
come first. ``--once`` only calls each, for another profiler.

``--json FILE`` writes, anew after each case::

    {"rates": {"copy": 3000.0, "fill": 2900.0},       # GB/s; {} on the CPU, as are kernels; replay_us is null
     "least_replay_us": 3.5,                          # null on the CPU
     "cases": [
       {"op": "detect", "case": "trained, C=81 B=1", "gradients": false, "host_us": 31.0, "replay_us": 25.1,
        "kernels": {"detect::finish_kernel<float, 1>": {"us": 12.0, "launches": 1.0}, ...}}, ...]}   # launches a call
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

if not __package__:  # run as a script
    sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])  # tests, the repository

import torch

from benchmarks.record import write_json
from benchmarks.timing import CudaClock, eviction, memory_rate, replay
from gpu_check.ncu import short
from opinfo import OPS
from opinfo.spec import Case, OpInfo, convert
from ssd_ext import ops

CASES = (  # the most wanted first
    ("multibox_loss", "SSD300 B=32"),
    ("detect", "trained, C=81 B=32"),
    ("assign_targets", "SSD300 synthetic B=32, last"),
    ("hard_negatives", "SSD300 B=32"),
    ("multibox_loss", "SSD300 B=1"),
    ("detect", "trained, C=81 B=1"),
    ("nms", "random N=1000"),
    ("multibox_loss", "SSD300 B=8"),
    ("detect", "trained, C=81 B=8"),
    ("nms", "random N=20000"),
    ("batched_nms", "random N=20000, 80 classes"),
    ("soft_nms_padded", "clustered N=1000 linear"),
    ("detect", "untrained, C=81 B=8"),
    ("assign_targets", "SSD300 60 gts B=32"),
    ("hard_negatives", "SSD300 B=1"),
    ("multibox_loss", "SSD300 B=32 C=21"),
    ("encode", "SSD300 B=32"),
    ("decode", "SSD300 B=32"),
    ("box_iou", "N=100 M=8732"),
)
# In these the length of the output depends on the data, which a graph cannot have; the kernels are the same.
PADDED = {"nms": ops.nms_padded, "batched_nms": ops.batched_nms_padded}
CALLS = 10  # profiled


def find(op_name: str, case_name: str) -> tuple[OpInfo, Case]:
    op = next(op for op in OPS if op.name == op_name)
    return op, next(case for case in op.cases if case.name == case_name and not case.backward)


def kernel_times(events: Iterable[tuple[str, float]], calls: int) -> dict[str, dict[str, float]]:
    """Median, and launches a call, of each kernel among ``(name, microseconds)``."""
    times = defaultdict(list)
    for name, us in events:
        times[short(name)].append(us)
    return {name: {"us": median(taken), "launches": len(taken) / calls} for name, taken in times.items()}


def gpu_events(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """``(name, microseconds)`` of all that runs on the GPU in ``CALLS`` calls."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.name, event.time_range.elapsed_us()) for event in on_gpu]


def profile(call: Callable[[], Any]) -> dict[str, dict[str, float]]:
    evict = eviction()
    known = {name for name, _ in gpu_events(evict)}
    events = gpu_events(lambda: (evict(), call()))
    return kernel_times([event for event in events if event[0] not in known], CALLS)


def replay_microseconds(call: Callable[[], Any]) -> float:
    clock, graph = CudaClock(), replay(call)
    clock.turn(graph, 0.03)  # the GPU lowers its clocks while the host makes inputs
    return median(clock.turn(graph, 0.01).seconds) * 1e6


def host_microseconds(call: Callable[[], Any], calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) * 1e6 / calls


def measure(call: Callable[[], Any], cuda: bool) -> dict[str, Any]:
    for _ in range(3 if cuda else 1):
        call()
    if not cuda:
        return {"host_us": host_microseconds(call, 1), "replay_us": None, "kernels": {}}
    found = {"kernels": profile(call), "replay_us": replay_microseconds(call)}
    torch.cuda.synchronize()
    return found | {"host_us": host_microseconds(call, 20)}


def lines(row: dict[str, Any], known: Iterable[str]) -> list[str]:
    """A row as text; kernels that are ``known`` are left out."""
    kernels = row["kernels"]
    total = sum(k["us"] * k["launches"] for k in kernels.values())
    what = f"{row['op']}, {row['case']}" + (", and gradients" if row["gradients"] else "")
    replayed = "" if row["replay_us"] is None else f"kernels {total:.1f}, replay {row['replay_us']:.1f}, "
    new = sorted(kernels.keys() - known, key=lambda name: -kernels[name]["us"] * kernels[name]["launches"])
    return [f"{what}: {replayed}host {row['host_us']:.0f} us"] + [
        f"{kernels[name]['us']:9.1f} x {kernels[name]['launches']:<4g} {name[:70]}" for name in new
    ]


def rates() -> dict[str, float]:
    clock, target = CudaClock(flush_l2=False), torch.empty(64 << 20, device="cuda")
    fill = target.nbytes / min(clock.turn(target.zero_, 0.02).seconds)
    return {"copy": memory_rate(clock) * 1e-9, "fill": fill * 1e-9}


def main() -> int:
    parser = argparse.ArgumentParser(description="Where an op's time goes on a GPU.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after these")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only those in whose name it stands")
    parser.add_argument("--once", action="store_true", help="call each case once and measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    cuda, start, failed = args.device == "cuda", perf_counter(), 0
    made: dict[str, Any] = {"rates": {}, "least_replay_us": None, "cases": []}
    if cuda and not args.once:
        one = torch.zeros(1, device="cuda")
        made |= {"rates": rates(), "least_replay_us": replay_microseconds(lambda: one.add_(1))}
        print(*(f"{name}: {rate:.0f} GB/s" for name, rate in made["rates"].items()), sep="\n", flush=True)
        print(f"replay of one addition: {made['least_replay_us']:.1f} us", flush=True)
    for op, case in [find(*names) for names in CASES if args.cases in names[1]]:
        if perf_counter() - start > args.seconds:
            print(f"no time for {op.name}, {case.name} and what follows", flush=True)
            break
        inputs = convert(case.make(torch.Generator().manual_seed(20)), device=args.device)
        inputs = op.with_leaves(inputs)
        known: set[str] = set()
        for gradients in (False, True) if op.differentiable else (False,):
            call = partial(PADDED.get(op.name, op.op), **inputs)
            call = op.with_gradients(call, inputs) if gradients else torch.no_grad()(call)
            if args.once:
                if gradients or not op.differentiable:
                    call()
                continue
            row = {"op": op.name, "case": case.name, "gradients": gradients}
            try:
                row |= measure(call, cuda)
            except Exception as e:
                failed += 1
                print(f"FAILED: {op.name}, {case.name}: {type(e).__name__}: {e}", flush=True)
                continue
            print("\n".join(lines(row, known)), flush=True)
            known |= row["kernels"].keys()
            made["cases"].append(row)
            if args.json:
                write_json(args.json, made)
    if cuda:
        torch.cuda.synchronize()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
