"""Counts what each op does on the host, between Python and its last kernel, for one image of SSD300 (1,000 boxes for
NMS): ``python benchmarks/host_path.py`` in a build with the emulator prints a table in Markdown.

Nothing runs on a device: launches are only counted. The columns are

- calls: ops that the dispatcher is asked for, the op itself and what it calls of torch's (not what those call in turn);
- outputs and scratch: allocations that are kept, and those that are freed when the op returns. On a GPU each is
  one more call of the dispatcher;
- copies: of memory on the device, or between it and the host;
- launches: of our own kernels and memsets.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler misses a GPU

import torch
from torch.autograd.profiler import profile

from opinfo import OPS
from ssd_ext import _C

SEED = 20
COPIES = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::to")


@dataclass(frozen=True)
class Counts:
    """The columns of the table."""

    calls: int
    outputs: int
    scratch: int
    copies: int
    launches: int


def ops_to_count() -> dict[str, Callable[[], Any]]:
    """A call of each op for one image, by what it is called in the table."""
    by_name = {op.name: op for op in OPS}
    calls = {}
    for name, op in by_name.items():
        case = next((case for case in op.cases if case.benchmark), op.cases[0])
        inputs = op.scaling(1) if op.scaling else case.make(torch.Generator().manual_seed(SEED))
        calls[name] = partial(op.op, **inputs)

    inputs = by_name["assign_targets"].scaling(1)
    listed = inputs | {"ground_truth": inputs["ground_truth"].to_targets()}
    for name in ("match", "assign_targets"):
        calls[name] = partial(by_name[name].op, **inputs)
        calls[f"{name}, of dicts"] = partial(by_name[name].op, **listed)

    loss = by_name["multibox_loss"]
    inputs = loss.scaling(1)
    leaves = [inputs[name].requires_grad_() for name in loss.differentiable]
    losses = loss.op(**inputs)
    weights = [torch.ones_like(value) for value in losses]
    calls["multibox_loss, training"] = partial(loss.op, **inputs)
    calls["its backward"] = lambda: torch.autograd.grad(losses, leaves, weights, retain_graph=True)
    return calls


def count(call: Callable[[], Any]) -> Counts:
    """What ``call`` does, once it has been called before."""
    _C.emulator.start(0, dry_run=True)
    try:
        call()
        before = len(_C.emulator.launches())
        with profile(use_cpu=True, profile_memory=True) as found:
            result = call()
        launches = len(_C.emulator.launches()) - before
    finally:
        _C.emulator.stop()
    own = [event.name for event in found.function_events if _is_op(event) and not _is_of_torch(event.cpu_parent)]
    memory = [e.nbytes() for e in found.kineto_results.events() if e.name() == "[memory]"]
    scratch = sum(size < 0 for size in memory)
    # torch.tensor() calls aten::to on the host, before aten::lift_fresh
    copies = sum(name in COPIES for name in own) - own.count("aten::lift_fresh")
    del result
    return Counts(len(own), len(memory) - 2 * scratch, scratch, copies, launches)


def _is_op(event) -> bool:
    return event.name.startswith(("aten::", "ssd_ext::"))


def _is_of_torch(event) -> bool:
    return event is not None and event.name.startswith("aten::")


def table() -> str:
    names = [field.name for field in fields(Counts)]
    lines = [["op", *names], ["---"] * (1 + len(names))]
    lines += [[f"`{op}`", *map(str, astuple(count(call)))] for op, call in ops_to_count().items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    if "emulator" not in _C.build_info():
        sys.exit("host_path.py: needs a build with SSD_EXT_EMULATE (see CONTRIBUTING.md)")
    print(table())
