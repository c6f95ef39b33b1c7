"""Checks and times every contender of an op on one case."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from benchmarks.peers import MissingPeerError, peers_of
from benchmarks.timing import Clock, Timing, alternate, replay
from opinfo.spec import Call, Case, Inputs, OpInfo, close, convert

OURS, GRAPH, REFERENCE, COMPILED = "ssd_ext", "CUDA graph", "reference", "torch.compile"
SEED = 20

Contenders = dict[str, Callable[[Inputs], Call]]  # name -> f(inputs) -> a call
Bind = Callable[[Call, Inputs], Call]  # what to do around a call of the op


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    seconds: float = 4.0  # a case, all contenders together
    rounds: int = 7  # of alternation at the least
    slow: float = 2.0  # a contender that takes longer is timed once, by the call that is checked
    compile_limit: float = 120.0  # seconds for torch.compile


class TooSlowError(BaseException):
    """Raised inside torch.compile, which would swallow an Exception."""


def contenders_of(op: OpInfo, case: Case, plan: Plan, compiled: bool = True, captured: bool = False) -> Contenders:
    """Everybody who can run ``op``: ours, in a CUDA graph too; the reference and the peers, some by torch.compile."""
    bind = _binder(op, case)
    contenders: Contenders = {OURS: lambda inputs: bind(partial(op.op, **inputs), inputs)}
    if captured and op.capturable:
        contenders[GRAPH] = partial(_capture, op, bind)
    contenders[REFERENCE] = lambda inputs: bind(partial(op.reference, **inputs), inputs)
    if compiled:
        contenders[COMPILED] = partial(_compile, op.reference, plan.compile_limit, bind)
    peers = peers_of(op)
    for name, make in peers.calls.items():
        contenders[name] = (lambda inputs, make=make: bind(make(inputs), inputs)) if case.peers else _refuse_case
    for name, function in peers.compiled.items() if compiled else ():
        contenders[name] = partial(_compile, function, plan.compile_limit, bind) if case.peers else _refuse_case
    return contenders


def _binder(op: OpInfo, case: Case) -> Bind:
    """The call alone, or with the gradients of its outputs' sum where the case has them timed."""
    return op.with_gradients if case.backward else lambda call, inputs: call


def _requiring_grad(op: OpInfo, case: Case, inputs: Inputs) -> Inputs:
    return op.with_leaves(inputs) if case.backward else inputs


def _mismatch(op: OpInfo, case: Case, made: Inputs, result: Any, expected: Any) -> str | None:
    if not case.backward:
        return op.mismatch(made, result, expected)
    (outputs, gradients), (expected_outputs, expected_gradients) = result, expected
    largest = [e.abs().max().clamp(min=1e-300) for e in expected_gradients]  # gradients may be small throughout
    scaled = [g.double().div(m).to(g.dtype) for g, m in zip(gradients, largest, strict=True)]
    expected_scaled = [e / m for e, m in zip(expected_gradients, largest, strict=True)]
    tolerance = {dtype: 10 * limit for dtype, limit in op.tolerance.items()}
    return op.mismatch(made, outputs, expected_outputs) or close(scaled, expected_scaled, tolerance)


def _refuse_case(inputs: Inputs) -> Call:
    raise MissingPeerError("has no such case (see its description)")


def _capture(op: OpInfo, bind: Bind, inputs: Inputs) -> Call:
    return replay(bind(partial(op.op, **inputs), inputs))


def _compile(function: Callable, limit: float, bind: Bind, inputs: Inputs) -> Call:
    torch.compiler.reset()  # each case is compiled for its own shapes
    call = bind(partial(torch.compile(function, dynamic=False), **inputs), inputs)
    try:
        with _time_limit(limit):
            for _ in range(2):  # graph breaks may compile the rest on the second call
                call()
    except TooSlowError:
        raise MissingPeerError(f"gave up compiling after {limit:.0f} s") from None
    return call


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlowError inside the block after ``seconds``; signals reach the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_):
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(
    op: OpInfo,
    case: Case,
    contenders: Contenders,
    clock: Clock,
    plan: Plan,
    memory_rate: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """One result as ``run.py --json`` writes it (see its docstring): check all, then time who is right."""
    say("reference in float64")
    made = case.make(torch.Generator().manual_seed(SEED))
    inputs = _requiring_grad(op, case, convert(made, device=clock.device))
    exact = _requiring_grad(op, case, convert(made, torch.float64))
    with torch.set_grad_enabled(case.backward):
        expected = _binder(op, case)(partial(op.reference, **exact), exact)()
        rows, calls = {}, {}
        for name, make in contenders.items():
            say(name)
            rows[name], call, result = _check(op, case, made, inputs, make, expected, clock, plan)
            if call:
                calls[name] = call
            if name == OURS and result is not None:
                least_bytes = op.traffic(inputs, result)
        say("timing")
        timings = alternate(calls, clock, plan.seconds, plan.rounds) if calls else {}
    for name, timing in timings.items():
        rows[name] |= figures(timing)
    result = {"op": op.name, "case": case.name, "contenders": [{"name": name} | row for name, row in rows.items()]}
    if "median_ms" in rows.get(OURS, {}):
        result |= _compare(rows, least_bytes, memory_rate)
    return result


def _check(op, case, made, inputs, make, expected, clock, plan) -> tuple[dict[str, Any], Call | None, Any]:
    """A contender's row, its call where it is to be timed, its result where that is right."""
    try:
        call = make(inputs)
        before = perf_counter()
        result = call()
        if clock.device == "cuda":
            torch.cuda.synchronize()
        took = perf_counter() - before
        wrong = _mismatch(op, case, made, convert(result, device="cpu"), expected)
    except (MissingPeerError, ImportError) as e:
        return {"status": "missing", "note": str(e)}, None, None
    except Exception as e:
        return {"status": "failed", "note": f"{type(e).__name__}: {e}"}, None, None
    if wrong:
        return {"status": "wrong", "note": wrong}, None, None
    if took > plan.slow:
        return {"status": "once"} | figures(Timing([took])), None, result
    return {"status": "timed"}, call, result


def figures(timing: Timing) -> dict[str, Any]:
    return {
        "median_ms": timing.median * 1e3,
        "spread": timing.spread,
        "samples": len(timing.seconds),
        "dropped": timing.dropped,
        "disturbed": timing.disturbed,
    }


def _compare(rows: dict[str, dict[str, Any]], least_bytes: int, memory_rate: float | None) -> dict[str, Any]:
    """Ours against the others; above 1 ours is faster."""
    medians = {name: row["median_ms"] for name, row in rows.items() if "median_ms" in row}
    ours = medians.pop(OURS)
    medians.pop(GRAPH, None)  # nobody else's
    rate = least_bytes / (ours * 1e-3)
    best = min(medians, key=medians.get, default=None)
    return {
        "bytes": least_bytes,
        "gb_per_s": rate * 1e-9,
        "memory_share": rate / memory_rate if memory_rate else None,
        "ratios": {name: median / ours for name, median in medians.items()},
        "best_peer": best,
    }


def measure_scaling(
    op: OpInfo, clock: Clock, plan: Plan, batches: list[int], say=lambda text: None
) -> list[dict[str, Any]]:
    """Ours over batch sizes, each checked against the float64 reference like any case."""
    results = []
    for batch in batches:
        case = Case(f"B={batch}", lambda g, batch=batch: op.scaling(batch))
        ours = {OURS: lambda inputs: partial(op.op, **inputs)}
        (row,) = measure(op, case, ours, clock, plan, say=lambda text, b=batch: say(f"B={b}: {text}"))["contenders"]
        results.append({"batch": batch} | row)
    return results
