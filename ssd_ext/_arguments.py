"""What to say of an argument that torch does not understand."""

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def is_plain(value: Any) -> bool:
    """Whether it is a tensor as the ops take them: dense, not nested, on the CPU or a CUDA GPU."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and not value.is_quantized
        and value.layout is torch.strided
        and value.device.type in ("cpu", "cuda", "meta")
    )


def described(value: Any) -> str:
    """What a value is, and if a plain tensor can be made of it, how."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return "a nested tensor (its unbind() gives plain ones)"
        if value.is_quantized:
            return "a quantized tensor (its dequantize() is plain)"
        if value.layout is not torch.strided:
            return f"one of layout {value.layout} (its to_dense() is plain)"
        return f"a tensor on {value.device}"
    kind = type(value).__name__
    if kind == "PriorSpec":
        return f"a {kind} (its priors() are one)"
    if isinstance(value, list | tuple) or hasattr(value, "__array__"):
        return f"{kind} (torch.as_tensor makes one)"
    return kind


def explained(function: Function) -> Function:
    """Decorate an op so that an argument of another type than its annotation is a ValueError of one sentence.

    The arguments are looked at only where the op has failed.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # which cannot break a graph within a try
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError):
            if sentence := _what_is_wrong(function, args, kwargs):
                raise ValueError(f"ssd_ext::{function.__name__}: {sentence}") from None
            raise

    return cast(Function, call)


def _what_is_wrong(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # names and numbers of arguments, of which Python speaks clearly
        return None
    for name, value in given.items():
        kind, *others = _alternatives(signature.parameters[name].annotation)
        if value is None and type(None) in others:
            continue
        if kind is Tensor and not is_plain(value):
            return f"{name} must be a plain tensor, got {described(value)}"
        if kind is bool and not isinstance(value, bool):
            return f"{name} must be True or False, got {value!r}"
        if kind is int and not _is_number(value, numbers.Integral):
            return f"{name} must be an integer, got {value!r}"
        if kind is int and abs(value) >= 2**63:
            return f"{name} must be an integer of 64 bits, got {value!r}"
        if kind is float and not _is_number(value, numbers.Real):
            return f"{name} must be a number, got {value!r}"
        if typing.get_origin(kind) is tuple and not _are_numbers(value):
            return f"{name} must be {len(typing.get_args(kind))} numbers, got {value!r}"
    return None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) or (isinstance(value, Tensor) and value.numel() == 1)


def _are_numbers(values: Any) -> bool:
    try:
        return all(_is_number(value, numbers.Real) for value in values)
    except TypeError:
        return False
