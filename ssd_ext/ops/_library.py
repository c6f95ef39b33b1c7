"""How an op of the extension is made known to autograd, autocast and the compiler."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_library = torch.library.Library("ssd_ext", "FRAGMENT")


def define(schema: str, *tags: torch.Tag) -> None:
    """Define an op in Python, for tags that the C++ library interface of torch 2.11 cannot give."""
    _library.define(schema, tags=tags)


def fake(op: str) -> Callable[[Function], Function]:
    """Decorate what tells the compiler the shapes and types of the op's outputs."""
    register: Callable[[Function], Function] = torch.library.register_fake(f"ssd_ext::{op}")
    return register


def autocast_to_float32(op: str) -> None:
    """Under autocast, cast every floating input to float32: boxes and scores lose too much in half."""
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"ssd_ext::{op}", device, torch.float32)


def no_gradient(op: str) -> None:
    """The op's outputs are indices or masks: autograd passes straight through to the kernel."""
    _library.impl(op, torch.library.fallthrough_kernel, "Autograd")


def refuse_gradient(op: str, reason: str) -> None:
    """The op has floating outputs but no derivative: asking for one is an error that says why."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"ssd_ext::{op} is not differentiable: {reason}")

    torch.library.register_autograd(f"ssd_ext::{op}", backward)


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op(*args)``, but past autograd where no gradient can be asked for.

    What ``register_autograd`` installs is a Python function that the dispatcher enters, only to be called again by it:
    15 to 30 microseconds, more than a small op takes.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
    ):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
