"""Fast, exact CPU and CUDA ops for SSD and other object detectors in PyTorch.

``ssd_ext.ops`` holds the ops, ``ssd_ext.reference`` the same in plain PyTorch, ``ssd_ext.priors``
the default boxes. ``python -m ssd_ext.env`` prints how this installation was built.
"""

from importlib.metadata import version as _version

import torch  # loads libtorch, which the extension module links to

__version__ = _version("ssd_ext")

_torch = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if _torch < (2, 11):
    raise ImportError(f"ssd_ext {__version__} needs torch 2.11 or newer, found {torch.__version__}")

from ssd_ext import _C  # noqa: E402  (registers torch.ops.ssd_ext.*)

_C.simd_level()  # a wrong SSD_EXT_SIMD is told here, not inside the first op

from ssd_ext import ops, priors, reference  # noqa: E402

__all__ = ["__version__", "ops", "priors", "reference"]
