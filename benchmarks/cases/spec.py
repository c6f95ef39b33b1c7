"""The description of an op. The tests and the benchmark both run from it: a case is written once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
EXACT = (torch.float32, torch.float64)  # hold what cases make; rounded to halves, numbers may tie by chance
FLOATS = (*EXACT, *HALVES)

Inputs = dict[str, Any]  # keyword arguments of the op
Call = Callable[[], Any]  # a contender with its inputs bound


class MissingPeerError(Exception):
    """A peer that this machine or this input does not have; the text says why."""


@dataclass(frozen=True)
class Case:
    """One input of an op. ``make(generator)`` gives the arguments: float32, on the CPU."""

    name: str
    make: Callable[[torch.Generator], Inputs]
    benchmark: bool = False  # large, timed by benchmarks/run.py (and a slow test)
    quick: bool = False  # of those, part of `run.py --quick`
    dtypes: tuple[torch.dtype, ...] = FLOATS  # dtypes in which the input makes sense
    backward: bool = False  # the benchmark times the gradients of the outputs' sum with it
    smooth: bool = True  # False: at a kink or a jump of the op, where finite differences mean nothing
    peers: bool = True  # False: peers crash on it or give another answer (empty, NaN, a rule of ours)


@dataclass(frozen=True)
class ErrorCase:
    """A wrong call and what it must raise; ``match`` is a regular expression for the message."""

    name: str
    make: Callable[[], Inputs]
    match: str
    error: type[Exception] = ValueError


@dataclass(frozen=True)
class Op:
    """Everything that the tests and the benchmark know of one op."""

    name: str
    op: Callable  # ssd_ext.ops.<name>
    reference: Callable  # ssd_ext.reference.<name>
    schema: str  # name of the torch.ops.ssd_ext op beneath
    cases: list[Case]
    errors: list[ErrorCase]
    # Peers: name -> f(inputs) -> a call that gives what op gives (in the same form), or MissingPeerError.
    peers: dict[str, Callable[[Inputs], Call]] = field(default_factory=dict)
    # Functions of op's arguments that torch.compile makes peers of; `run.py --no-compile` leaves them out.
    compiled_peers: dict[str, Callable] = field(default_factory=dict)
    # Largest |result - reference| of a floating output, relative to max(1, |reference|). Outputs that
    # are indices or masks are compared by `agrees`.
    tolerance: dict[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}
    )
    # agrees(inputs, result, reference in float64) -> None or what is wrong; default: `close`.
    agrees: Callable[[Inputs, Any, Any], str | None] | None = None
    differentiable: tuple[str, ...] = ()  # arguments with a gradient
    twice_differentiable: bool = True  # False: a second derivative is refused with an error
    capturable: bool = True  # in a CUDA graph
    scaling: Callable[[int], Inputs] | None = None  # inputs for a batch of that size: `run.py --scaling`
    # An input as large as real ones that an emulated GPU can still bear, two images of SSD300; default: scaling(2).
    full_size: Callable[[torch.Generator], Inputs] | None = None

    def with_leaves(self, inputs: Inputs) -> Inputs:
        """The same arguments; those with a gradient require it."""
        return inputs | {name: inputs[name].detach().requires_grad_() for name in self.differentiable}

    def with_gradients(self, call: Call, inputs: Inputs) -> Call:
        """Give what ``call`` gives, and the gradients of its outputs' sum for the leaves among ``inputs``."""
        leaves, ones = [inputs[name] for name in self.differentiable], []

        def both():
            result = call()
            outputs = list(tensors_in(result))
            ones[:] = ones or map(torch.ones_like, outputs)
            return result, torch.autograd.grad(outputs, leaves, ones)

        return both

    @property
    def full_size_case(self) -> Case:
        """One as large as a detector's, of two images or so: an emulated GPU can bear it."""
        return Case("full size", self.full_size or (lambda g: self.scaling(2)), dtypes=(torch.float32,))

    def traffic(self, inputs: Inputs, result: Any) -> int:
        """Bytes that must be read and written at the least: inputs and outputs once."""
        return sum(t.numel() * t.element_size() for t in (*tensors_in(inputs), *tensors_in(result)))

    def mismatch(self, inputs: Inputs, result: Any, expected: Any) -> str | None:
        """None where ``result`` agrees with the float64 reference's, else what differs."""
        check = self.agrees or (lambda i, r, e: close(r, e, self.tolerance))
        return check(inputs, result, expected)


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Every tensor in a nest of dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def map_tensors(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with ``f`` applied to every tensor."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, f) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(v, f) for v in value)
    return value


def convert(value: Any, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Any:
    """The same nest with floating tensors in ``dtype`` and all tensors on ``device``."""
    return map_tensors(value, lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))


def close(result: Any, expected: Any, tolerance: dict[torch.dtype, float]) -> str | None:
    """Compare nests: floating tensors within the tolerance of their dtype, others exactly."""
    results, expecteds = list(tensors_in(result)), list(tensors_in(expected))
    if len(results) != len(expecteds):
        return f"{len(results)} outputs, expected {len(expecteds)}"
    for i, (r, e) in enumerate(zip(results, expecteds, strict=True)):
        if r.shape != e.shape:
            return f"output {i} has shape {list(r.shape)}, expected {list(e.shape)}"
        if not e.is_floating_point():
            if r.dtype != e.dtype:
                return f"output {i} is {r.dtype}, expected {e.dtype}"
            if not torch.equal(r.cpu(), e.cpu()):
                return f"output {i} differs in {int((r.cpu() != e.cpu()).sum())} of {e.numel()} elements"
            continue
        r64, e64 = r.cpu().double(), e.cpu().double()
        representable = e64.abs() <= torch.finfo(r.dtype).max
        same = (r64 == e64) | (r64.isnan() & e64.isnan()) | (~representable & ~r64.isfinite())
        error = torch.where(same, 0, (r64 - e64).abs() / e64.abs().clamp(min=1))
        if not bool((error <= tolerance[r.dtype]).all()):
            worst = error.nan_to_num(torch.inf).max().item() if error.numel() else 0.0
            return f"output {i} is off by {worst:.3g}, allowed {tolerance[r.dtype]:.3g}"
    return None
