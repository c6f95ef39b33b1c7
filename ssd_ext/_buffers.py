"""Buffers that stay precise where the weights are in half precision: FloatBuffers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


class FloatBuffers(nn.Module):
    """A module whose own buffers never become halves by ``half()``, ``bfloat16()`` or ``to(dtype)``.

    They are float32 then: a half does not hold the position of a box or the size of an image. In every other respect,
    ``double()`` and moves to a device for example, they follow the module; so do the buffers of its submodules.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FloatBuffers":
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in HALVES:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self
