"""Clocks, and contenders that take turns on them.

All contenders run in one process and alternate (A B C A B C ...), so that whatever else the machine
does hits them alike. A turn is a few calls; its first call brings caches and threads back from the
contender before and is not counted where there are more.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from time import perf_counter, sleep
from typing import TypeVar

import torch

Result = TypeVar("Result")
TURN_SECONDS = 0.003
WAITING = 0.05  # a turn whose threads waited for a CPU for more than this share of it is disturbed: dropped ...
LEAST_TURNS = 3  # ... while this many others remain


@dataclass(frozen=True)
class Turn:
    """Seconds of each call of one turn, and which share of the turn its threads waited for a CPU."""

    seconds: list[float]
    waited: float = 0.0

    @property
    def disturbed(self) -> bool:
        return self.waited > WAITING


@dataclass(frozen=True)
class Timing:
    """Seconds of the calls that count, and how many do not; ``disturbed`` where too few calls had a free CPU."""

    seconds: list[float]
    dropped: int = 0
    disturbed: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over median; 0 for a single call."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


class CpuClock:
    """Wall time."""

    device = "cpu"

    def turn(self, call: Callable[[], object], seconds: float = TURN_SECONDS) -> Turn:
        samples = []
        waited, start = _run_delay(), perf_counter()
        while True:
            before = perf_counter()
            call()
            after = perf_counter()
            samples.append(after - before)
            if after - start >= seconds:
                break
        return Turn(samples[1:] or samples, (_run_delay() - waited) / (after - start))


def _run_delay() -> float:
    """Seconds that this process's threads were ready to run and had no CPU; 0 where Linux does not tell."""
    nanoseconds = 0
    try:
        for thread in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{thread}/schedstat") as file:
                    nanoseconds += int(file.read().split()[1])
            except FileNotFoundError:  # the thread ended meanwhile
                continue
    except (OSError, IndexError):
        return 0.0
    return nanoseconds * 1e-9


@cache
def eviction() -> Callable[[], object]:
    """A call that leaves nothing else in L2. It reads: were it to write, the next kernel would wait for that to reach
    memory. It is one kernel: a reduction to many numbers needs no memset.
    """
    rows = torch.cuda.get_device_properties(0).L2_cache_size // 4096
    return partial(torch.ones(rows, 4096, dtype=torch.int32, device="cuda").amax, 1)  # four times as large as L2


class CudaClock:
    """CUDA events round each call. ``flush_l2`` evicts what the call before left in the cache, as other work would."""

    device = "cuda"

    def __init__(self, flush_l2: bool = True):
        self._evict = eviction() if flush_l2 else None

    def turn(self, call: Callable[[], object], seconds: float = TURN_SECONDS) -> Turn:
        events = []
        torch.cuda.synchronize()
        start = perf_counter()
        while not events or perf_counter() - start < seconds:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if self._evict is not None:
                self._evict()
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        samples = [a.elapsed_time(b) * 1e-3 for a, b in events]
        return Turn(samples[1:] or samples)


Clock = CpuClock | CudaClock


def alternate(calls: dict[str, Callable[[], object]], clock: Clock, seconds: float, rounds: int) -> dict[str, Timing]:
    """Time contenders in turn for about ``seconds``, at least ``rounds`` rounds after one of warm-up.

    On a busy machine it goes on, up to three times as long, for ``rounds`` undisturbed turns of each.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = perf_counter()
        for done in itertools.count():
            for name, call in calls.items():
                turn = clock.turn(call)
                if done:
                    turns[name].append(turn)
                if turn.disturbed:
                    sleep(TURN_SECONDS)  # let the others have their share now, not during the next turn
            elapsed = perf_counter() - start
            calm = all(sum(not turn.disturbed for turn in taken) >= rounds for taken in turns.values())
            if done >= rounds and (elapsed >= 3 * seconds or (calm and elapsed >= seconds)):
                break
    finally:
        if collecting:
            gc.enable()
    return {name: settle(taken) for name, taken in turns.items()}


def settle(turns: list[Turn]) -> Timing:
    """The calls of the undisturbed turns; of the least disturbed ones where there are too few."""
    turns = sorted(turns, key=lambda turn: turn.waited)
    calm = sum(not turn.disturbed for turn in turns)
    count = max(calm, LEAST_TURNS)
    kept, dropped = turns[:count], turns[count:]
    return Timing(
        [second for turn in kept for second in turn.seconds],
        sum(len(turn.seconds) for turn in dropped),
        disturbed=calm < LEAST_TURNS,
    )


def joined(timings: list[Timing]) -> Timing:
    """Of several processes, as one."""
    return Timing(
        [second for timing in timings for second in timing.seconds],
        sum(timing.dropped for timing in timings),
        disturbed=any(timing.disturbed for timing in timings),
    )


def replay(call: Callable[[], Result]) -> Callable[[], Result]:
    """``call`` captured in a CUDA graph: each replay gives the same tensors, written anew."""
    call()  # sets up what a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replayed():
        graph.replay()
        return result

    return replayed


def memory_rate(clock: Clock) -> float:
    """Bytes a second that a large copy reads and writes: the best of several."""
    source = torch.ones(64 << 20, device=clock.device)
    target = torch.empty_like(source)
    best = min(alternate({"copy": lambda: target.copy_(source)}, clock, 1.0, 10)["copy"].seconds)
    return 2 * source.numel() * source.element_size() / best
