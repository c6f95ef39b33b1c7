"""The description of an op. The tests and the benchmark both run from it: a case is written once."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
EXACT = (torch.float32, torch.float64)  # hold what cases make; rounded to halves, numbers may tie by chance
FLOATS = (*EXACT, *HALVES)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FULL_SIZE = 8732  # priors of SSD300: many blocks of every kernel

Inputs = dict[str, Any]  # keyword arguments of the op
Mix = dict[str, torch.dtype]  # the dtypes of single arguments; the others stay as they were made
Call = Callable[[], Any]  # a contender with its inputs bound


@dataclass(frozen=True)
class Case:
    """One input of an op. ``make(generator)`` gives the arguments: float32, on the CPU."""

    name: str
    make: Callable[[torch.Generator], Inputs]
    oracle: torch.dtype = torch.float64  # in which the reference computes: float32 where its range is what is tested
    benchmark: bool = False  # large, timed by benchmarks/run.py (and a slow test)
    quick: bool = False  # of those, part of `run.py --quick`
    dtypes: tuple[torch.dtype | Mix, ...] = FLOATS  # those in which the input makes sense
    backward: bool = False  # the benchmark times the gradients of the outputs' sum with it
    # False: finite differences mean nothing, at a kink or a jump of the op, of numbers that are not finite, or of none.
    smooth: bool = True
    peers: bool = True  # False: peers crash on it or give another answer (empty, NaN, a rule of ours)

    @property
    def mixes(self) -> list[Mix]:
        """Those of ``dtypes`` that differ between arguments."""
        return [dtype for dtype in self.dtypes if isinstance(dtype, dict)]


@dataclass(frozen=True)
class ErrorCase:
    """A wrong call and what it must raise; ``match`` is a regular expression for the message."""

    name: str
    make: Callable[[], Inputs]
    match: str
    error: type[Exception] = ValueError


@dataclass(frozen=True)
class OpInfo:
    """Everything that the tests and the benchmark know of one op."""

    name: str
    op: Callable  # ssd_ext.ops.<name>
    reference: Callable  # ssd_ext.reference.<name>
    schema: str  # name of the one torch.ops.ssd_ext op that it calls
    # The first two are ordinary, of two sizes; the rows of one fill neither the vectors of a CPU nor the warps of a
    # GPU. Tests that change an input number by number take these.
    cases: list[Case]
    errors: list[ErrorCase]
    # Largest |result - reference| of a floating output, relative to max(1, |reference|). Outputs that
    # are indices or masks are compared by `agrees`.
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)
    # agrees(inputs, result, reference in float64) -> None or what is wrong; default: `close`.
    agrees: Callable[[Inputs, Any, Any], str | None] | None = None
    # Arguments that are thresholds -> f(inputs) -> numbers that the op compares with them, to the bit, in float32 and
    # float64.
    thresholds: dict[str, Callable[[Inputs], Tensor]] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()  # arguments with a gradient
    twice_differentiable: bool = True  # False: a second derivative is refused with an error
    capturable: bool = True  # in a CUDA graph
    scaling: Callable[[int], Inputs] | None = None  # inputs for a batch of that size: `run.py --scaling`
    # An input as large as real ones that an emulated GPU can still bear, two images of SSD300; default: scaling(2).
    full_size: Callable[[torch.Generator], Inputs] | None = None

    def __post_init__(self) -> None:
        if wrong := next(self._wrong(), None):
            raise ValueError(f"the description of {self.name}: {wrong}")

    def _wrong(self) -> Iterator[str]:
        if self.full_size is None and self.scaling is None:
            yield "needs full_size or scaling, which make an input as large as a detector's"
        if not hasattr(torch.ops.ssd_ext, self.schema):
            yield f"schema is the name of a torch.ops.ssd_ext op, and {self.schema!r} is none"
        for kind, named in (("cases", self.cases), ("errors", self.errors)):
            if twice := [name for name, n in Counter(case.name for case in named).items() if n > 1]:
                yield f"two {kind} are named {twice[0]!r}"
        for kind in ("thresholds", "differentiable"):
            if unknown := set(getattr(self, kind)) - set(inspect.signature(self.reference).parameters):
                yield f"{kind} names {', '.join(sorted(unknown))}, which the op does not have"

    def with_leaves(self, inputs: Inputs) -> Inputs:
        """The same arguments; those with a gradient require it."""
        return inputs | {name: inputs[name].detach().requires_grad_() for name in self.differentiable}

    def with_gradients(self, call: Call, inputs: Inputs) -> Call:
        """Give what ``call`` gives, and the gradients of its outputs' sum for the leaves among ``inputs``.

        The results are detached: a live graph would make a later backward wait for the stream of its forward, which a
        capture in a CUDA graph does not allow.
        """
        leaves, ones = [inputs[name] for name in self.differentiable], []

        def both():
            result = call()
            outputs = list(tensors_in(result))
            ones[:] = ones or map(torch.ones_like, outputs)
            return map_tensors(result, Tensor.detach), torch.autograd.grad(outputs, leaves, ones)

        return both

    @property
    def small_case(self) -> Case:
        """The first that is small and has float32 among its dtypes: for tests that need one case alone."""
        for case in self.cases:
            if not case.benchmark and torch.float32 in case.dtypes:
                return case
        raise ValueError(f"the description of {self.name}: needs a small case in float32")

    @property
    def full_size_case(self) -> Case:
        """One as large as a detector's, of two images or so: an emulated GPU can bear it."""

        def make(g: torch.Generator) -> Inputs:
            inputs = self.full_size(g) if self.full_size else self.scaling(2)
            largest = max(size for t in tensors_in(inputs) for size in t.shape)
            if largest < FULL_SIZE:
                source = "full_size" if self.full_size else "scaling(2)"
                raise ValueError(f"{source} of {self.name} must have a dimension of {FULL_SIZE} or more, got {largest}")
            return inputs

        return Case("full size", make, dtypes=(torch.float32,))

    def traffic(self, inputs: Inputs, result: Any) -> int:
        """Bytes that must be read and written at the least: inputs and outputs once."""
        return sum(t.numel() * t.element_size() for t in (*tensors_in(inputs), *tensors_in(result)))

    def mismatch(self, inputs: Inputs, result: Any, expected: Any) -> str | None:
        """None where ``result`` agrees with the float64 reference's, else what differs."""
        check = self.agrees or (lambda i, r, e: close(r, e, self.tolerance))
        return check(inputs, result, expected)


def arguments(op: Callable, inputs: Inputs) -> SimpleNamespace:
    """Every argument of ``op``: those given, the others at their defaults."""
    bound = inspect.signature(op).bind(**inputs)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


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
        mapped = [map_tensors(v, f) for v in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)  # a NamedTuple
    return value


def convert(value: Any, dtype: torch.dtype | Mix | None = None, device: str | torch.device | None = None) -> Any:
    """The same nest with floating tensors in ``dtype``, each argument in its own of a mix, and all on ``device``."""
    if isinstance(dtype, dict):
        return {name: convert(argument, dtype.get(name), device) for name, argument in value.items()}
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
