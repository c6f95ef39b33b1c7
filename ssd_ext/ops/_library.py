"""How an op of the extension is made known to autograd, autocast and the compiler."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

_library = torch.library.Library("ssd_ext", "FRAGMENT")
_under_transforms: dict[torch._ops.OpOverload, type[torch.autograd.Function]] = {}


def define(schema: str, *tags: torch.Tag) -> None:
    """Define an op in Python, for tags that the C++ library interface of torch 2.11 cannot give."""
    _library.define(schema, tags=tags)


def implement(op: str) -> Callable[[Function], Function]:
    """Decorate what an op that is written in Python does, on every device. It has no derivative."""

    def register(function: Function) -> Function:
        _library.impl(op, function, "CompositeExplicitAutograd")
        return function

    return register


def fake(op: str) -> Callable[[Function], Function]:
    """Decorate what tells the compiler the shapes and types of the op's outputs."""
    register: Callable[[Function], Function] = torch.library.register_fake(f"ssd_ext::{op}")
    return register


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype to which those of floating tensors promote, whatever their number of dimensions."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors))


def autocast_to_float32(op: str) -> None:
    """Under autocast, cast every floating input to float32: boxes and scores lose too much in half."""
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"ssd_ext::{op}", device, torch.float32)


def no_gradient(op: str) -> None:
    """The op's outputs are indices or masks: autograd passes straight through to the kernel."""
    _library.impl(op, torch.library.fallthrough_kernel, "Autograd")


def differentiable(op: str, backward: Callable[..., Any], keep: Callable[..., None]) -> None:
    """Give the op a derivative, for autograd and for the transforms of ``torch.func``.

    ``keep(ctx, inputs, output)`` saves what ``backward(ctx, *grads)`` reads. torch.library's derivatives do not work
    under ``torch.func``, but those of an ``autograd.Function`` with a ``setup_context`` do.
    """
    overload: torch._ops.OpOverload = getattr(torch.ops.ssd_ext, op).default

    class Differentiable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return _call_untransformed(overload, *args)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(f"ssd_ext::{op} has no derivative in forward mode (jvp, jacfwd, hessian): use jacrev")

    Differentiable.setup_context = staticmethod(keep)  # type: ignore[method-assign]
    Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]
    _under_transforms[overload] = Differentiable
    torch.library.register_autograd(f"ssd_ext::{op}", backward, setup_context=keep)
    torch.library.register_vmap(f"ssd_ext::{op}", functools.partial(_one_after_another, overload))


def _one_after_another(op: torch._ops.OpOverload, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The op under ``torch.vmap``, one call for each element."""
    if info.batch_size == 0:
        raise ValueError(f"{op} cannot be batched by torch.vmap over a dimension of size 0")
    calls = [
        op(*[arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)])
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])


def refuse_gradient(op: str, reason: str) -> None:
    """The op has floating outputs but no derivative: asking for one is an error that says why."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"ssd_ext::{op} is not differentiable: {reason}")

    differentiable(op, backward, lambda ctx, inputs, output: None)


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op(*args)``, in the way that autograd, ``torch.func`` or the compiler needs here."""
    if torch._C._are_functorch_transforms_active():
        return _call_transformed(op, *args)  # also under torch.compile, which cannot trace it
    return _call_untransformed(op, *args)


@torch.compiler.disable(reason="torch.func over ops of ssd_ext runs eagerly")  # type: ignore[untyped-decorator]
def _call_transformed(op: torch._ops.OpOverload, *args: Any) -> Any:
    return _under_transforms[op].apply(*args)


def _call_untransformed(op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op(*args)``, but past autograd where no gradient can be asked for.

    What ``register_autograd`` installs is a Python function that the dispatcher enters, only to be called again by it:
    15 to 30 microseconds, more than a small op takes.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
