"""Calls and times the ops of one build of ssd_ext, as base.py asks over a pipe: ``worker.py FOLDER``.

A message is the name of a method of ``Worker`` and its arguments; the reply is ``("done", value)``, or ``("refused",
why)`` where this build does not take such a call, or ``("raised", what)``. All are pickled. It ends when the pipe does.
"""

from __future__ import annotations

import gc
import inspect
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # ssd_ext of the folder named, the rest of this tree; the cases are never imported
    sys.path[:1] = [sys.argv[1], str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

from benchmarks.timing import CpuClock, CudaClock, Turn  # noqa: E402

Outputs = dict[str, Tensor]  # by what they are called in a report


class Worker:
    """The ops of ``ssd_ext``, on one device."""

    def __init__(self):
        self._call: Callable[[], object] | None = None

    def start(self, device: str, threads: int, flush_l2: bool) -> dict[str, str]:
        """Import the build; what it reports of itself."""
        import ssd_ext

        self._ops = ssd_ext.ops
        if device == "cpu" and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
        torch.set_num_threads(threads)
        if device == "emulated":
            ssd_ext._C.emulator.start(0)
        self._clock = CudaClock(flush_l2) if device == "cuda" else CpuClock()
        return ssd_ext._C.build_info() | {"simd": ssd_ext._C.simd_level(), "package": os.path.dirname(ssd_ext.__file__)}

    def outputs(self, op: str, inputs: dict[str, Any], differentiable: tuple[str, ...]) -> Outputs:
        """What the op gives, and its gradients in the arguments named, on the CPU."""
        values, gradients = self._bind(op, inputs, differentiable)()
        found = {f"output {i}": t for i, t in enumerate(tree_leaves(values))}
        found |= {f"gradient of {name}": t for name, t in zip(differentiable, gradients, strict=True)}
        return {name: t.detach().cpu() for name, t in found.items()}

    def prepare(self, op: str, inputs: dict[str, Any], differentiable: tuple[str, ...]) -> None:
        """The call that ``turn`` times."""
        self._call = None  # what the one before holds is freed
        gc.enable()
        gc.collect()
        self._call = self._bind(op, inputs, differentiable)
        self._call()
        gc.disable()

    def turn(self) -> Turn:
        """One turn of ``benchmarks.timing.alternate``."""
        return self._clock.turn(self._call)

    def _bind(self, op: str, inputs: dict[str, Any], differentiable: tuple[str, ...]) -> Callable[[], Any]:
        function = getattr(self._ops, op, None)
        if function is None:
            raise ValueError(f"there is no op {op}")
        try:
            inspect.signature(function).bind(**inputs)
        except TypeError as e:
            raise ValueError(f"{op}: {e}") from None
        given = tree_map_only(Tensor, lambda t: t.to(self._clock.device), inputs)
        leaves = [given[name].detach().requires_grad_() for name in differentiable]
        given |= dict(zip(differentiable, leaves, strict=True))
        weights: list[Tensor] = []

        def call():
            with torch.set_grad_enabled(bool(leaves)):
                values = function(**given)
            if not leaves:
                return values, ()
            smooth = [t for t in tree_leaves(values) if t.requires_grad]
            if not weights:  # as differ from element to element, made at the first call
                weights.extend(torch.linspace(0.5, 1.5, t.numel()).view(t.shape).to(t) for t in smooth)
            return values, torch.autograd.grad(smooth, leaves, weights)

        return call


def serve(worker: Worker, questions, answers) -> None:
    """Answer until the pipe ends."""
    while True:
        try:
            name, arguments = pickle.load(questions)
        except EOFError:
            return
        try:
            reply = "done", getattr(worker, name)(*arguments)
        except ValueError as e:  # as the ops themselves raise it
            reply = "refused", str(e)
        except Exception as e:
            reply = "raised", f"{type(e).__name__}: {e}"
        pickle.dump(reply, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to stderr and not among the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which closes the pipe
    serve(Worker(), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
