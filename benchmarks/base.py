"""Compares this build of ssd_ext with that of another revision: bits on all cases, then times.

Two builds cannot share a process: each registers the torch library ``ssd_ext`` and the Python package of that
name. So each has a process of its own (worker.py), both alike, and this one only makes the inputs, once for both, and
asks one of them at a time while the other sleeps at its pipe. Turns alternate (A B A B) as those of ``run.py``'s
contenders, by the same code. What would make the comparison unfair:

- OpenMP's threads spin after a parallel region, for milliseconds by default. With ``SPIN_BRIEFLY`` they sleep before
  the first call of the other's turn is over, which is not counted. (``OMP_WAIT_POLICY=passive`` would do it too, but
  add the waking of threads, 0.1 ms, to every call.)
- On a GPU each process has a context, between which the device switches only while both have work. They never have:
  a turn ends with a synchronisation.
- CPUs differ by what else runs on them and beside them, so all processes have the same CPUs, as many as threads.
- Where memory happens to lie can make a process faster by a tenth than another of the same build, for as long as it
  lives. So there are ``PAIRS`` of processes, and the ratio is the median of theirs. Where their range holds 1, no
  difference has been measured.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.measure import SEED, Plan, figures
from benchmarks.record import ROOT
from benchmarks.timing import Turn, alternate, joined
from benchmarks.worker import Outputs
from opinfo.spec import Case, Inputs, OpInfo, convert

PAIRS = 3
SPIN_BRIEFLY = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}  # GNU's runtime; LLVM's and Intel's, milliseconds


class DiedError(Exception):
    """A side's process has ended by itself."""


class RaisedError(Exception):
    """What the other process raised; ``refused`` where that build does not take such a call."""

    def __init__(self, text: str, refused: bool = False):
        super().__init__(text)
        self.refused = refused


class Side:
    """One build of ssd_ext, imported from ``folder`` by a process of its own, which works only while it is asked."""

    def __init__(self, name: str, folder: Path, *start: Any):
        self.name = name
        self._package = (folder / "ssd_ext").resolve()
        command = [sys.executable, ROOT / "benchmarks" / "worker.py", folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=SPIN_BRIEFLY | os.environ, **pipes)
        self._send("start", *start)  # ready() waits for the answer: several start at the same time

    def ready(self) -> None:
        """Wait until the package has been imported."""
        self.info = self._receive()
        if Path(self.info["package"]) != self._package:
            raise RaisedError(f"imported {self.info['package']} in place of {self._package}")

    def close(self) -> None:
        self._process.kill()  # it holds nothing that must be saved
        self._process.communicate()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the other process's Worker returns."""
        self._send(method, *arguments)
        return self._receive()

    def _send(self, method: str, *arguments: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # _receive() finds that the process has ended
            pickle.dump((method, arguments), self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()

    def _receive(self) -> Any:
        try:
            status, value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise DiedError(f"the process of {self.name} ended with status {self._process.wait()}") from None
        if status != "done":
            raise RaisedError(value, refused=status == "refused")
        return value


Pair = tuple[Side, Side]  # the old build and the new one


@contextlib.contextmanager
def pairs_of(old: tuple[str, Path], new: tuple[str, Path], device: str, *more: Any) -> Iterator[list[Pair]]:
    """Processes of both builds, each a name and the folder of the package; they end with the block."""
    count = 1 if device == "emulated" else PAIRS  # nothing is timed there
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(count):
            sides = [Side(*build, device, *more) for build in (old, new)]
            for side in sides:
                stack.callback(side.close)
            pairs.append(tuple(sides))
        for side in itertools.chain(*pairs):
            side.ready()
        yield pairs


class TurnsOfSides:
    """A clock for ``alternate``, where the other process times its turn itself."""

    def turn(self, call: Callable[[], Turn]) -> Turn:
        return call()


@dataclass
class Found:
    """What the comparison of an op found, as ``run.py --json`` writes it (see its docstring)."""

    op: str
    comparisons: int = 0
    differences: list[dict[str, str]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def differing(self) -> int:
        """Comparisons with a difference, of which each may have several."""
        return len({(found["case"], found["dtype"]) for found in self.differences})


def cases_of(op: OpInfo, device: str, quick: bool) -> Iterator[tuple[Case, bool]]:
    """Cases to compare, and whether to time them too."""
    for case in op.cases:
        if not case.benchmark:
            yield case, False
        elif device != "emulated" and (case.quick or not quick):  # they are too large for the emulator
            yield case, True
    if device == "emulated" and not quick:
        yield op.full_size_case, False


def compare(op: OpInfo, case: Case, timed: bool, pairs: list[Pair], plan: Plan, found: Found) -> None:
    """Compare both builds on one case, in all its dtypes, then time them; the findings are added to ``found``."""
    made = case.make(torch.Generator().manual_seed(SEED))
    comparable = [compare_bits(op, case, dtype, convert(made, dtype), pairs[0], found) for dtype in case.dtypes]
    if timed and all(comparable):
        found.timings.append({"case": case.name, **time(op, case, made, pairs, plan)})


def time(op: OpInfo, case: Case, made: Inputs, pairs: list[Pair], plan: Plan) -> dict[str, Any]:
    """The figures of both builds over all pairs, and how many times faster the new is in each."""
    sides = dict(enumerate(itertools.chain(*pairs)))  # the old ones are even
    for side in sides.values():
        side.ask("prepare", op.name, made, op.differentiable if case.backward else ())
    turns = {i: partial(side.ask, "turn") for i, side in sides.items()}
    timings = list(alternate(turns, TurnsOfSides(), plan.seconds, plan.rounds).values())
    old, new = timings[::2], timings[1::2]
    ratios = [a.median / b.median for a, b in zip(old, new, strict=True)]
    rows = {"old": figures(joined(old)), "new": figures(joined(new))}
    return rows | {"ratio": statistics.median(ratios), "ratios": ratios}


def compare_bits(op: OpInfo, case: Case, dtype: torch.dtype, inputs: Inputs, pair: Pair, found: Found) -> bool:
    """One comparison, of all outputs and gradients; false where one of the builds does not give them."""
    where = {"case": case.name, "dtype": str(dtype).removeprefix("torch.")}
    gave: list[Outputs | RaisedError] = []
    for side in pair:
        try:
            gave.append(side.ask("outputs", op.name, inputs, op.differentiable))
        except RaisedError as raised:
            gave.append(raised)
        except DiedError as died:
            raise DiedError(f"{died} in {op.name}, {case.name}, {where['dtype']}") from None
    before, after = gave
    if isinstance(before, RaisedError) and before.refused and not isinstance(after, RaisedError):
        found.missing.append(where | {"note": str(before)})
        return False
    found.comparisons += 1
    raised = [
        f"the {name} raised {x}" for name, x in zip(("old", "new"), gave, strict=True) if isinstance(x, RaisedError)
    ]
    if raised:
        found.differences.append(where | {"output": "all", "note": "; ".join(raised)})
        return False
    found.differences += [where | {"output": name, "note": note} for name, note in unlike(before, after)]
    return True


def unlike(old: Outputs, new: Outputs) -> Iterator[tuple[str, str]]:
    """The outputs that differ, and how. NaNs are alike, 0 and -0 are not."""
    for name in old | new:
        if name not in old or name not in new:
            yield name, "only in the " + ("new" if name in new else "old")
        elif text := difference(old[name], new[name]):
            yield name, text


def difference(old: Tensor, new: Tensor, names: tuple[str, str] = ("old", "new")) -> str | None:
    """None where both are the same to the bit."""
    a, b = names
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        described = [f"{list(t.shape)} of {str(t.dtype).removeprefix('torch.')}" for t in (old, new)]
        return f"{described[0]} in the {a}, {described[1]} in the {b}"
    differs = old != new
    if old.is_floating_point():
        differs |= old.signbit() != new.signbit()
        differs &= ~(old.isnan() & new.isnan())
    places = differs.nonzero()
    if len(places) == 0:
        return None
    first = places[0].tolist()
    before, after = (t[tuple(first)].item() for t in (old, new))
    return f"{len(places)} of {old.numel()} elements, first at {first}: {before!r} in the {a}, {after!r} in the {b}"


def compare_builds(
    ops: list[OpInfo],
    pairs: list[Pair],
    device: str,
    quick: bool,
    plan: Plan,
    progress: Callable[[int], Any],
    save: Callable[[list[Found]], None],
) -> list[Found]:
    """Compare and print op by op; ``save(all findings)`` after each."""
    chosen = [(op, list(cases_of(op, device, quick))) for op in ops]
    done: list[Found] = []
    with progress(sum(len(cases) for _, cases in chosen)) as bar:
        for op, cases in chosen:
            found = Found(op.name)
            for case, timed in cases:
                bar.say(f"{op.name}, {case.name}")
                compare(op, case, timed, pairs, plan, found)
                bar.step()
            done.append(found)
            bar.print("\n" + report.base_table(found))
            save(done)
    return done
