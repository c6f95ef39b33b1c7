"""Fast, exact CPU and CUDA ops for SSD and other object detectors in PyTorch.

``ssd_ext.ops`` holds the ops, ``ssd_ext.reference`` the same in plain PyTorch, ``ssd_ext.priors`` the default boxes;
``ssd_ext.GroundTruth`` is the ground truth of a batch as the ops take it, ``ssd_ext.MultiBoxLoss`` the training loss.
The command ``ssd_ext`` (``python -m ssd_ext``) trains, evaluates, runs and exports detectors.
"""

from importlib import metadata as _metadata

import torch  # loads libtorch, which the extension module links to

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(f"ssd_ext needs torch 2.11 or newer, found {torch.__version__}", name=__name__)

try:
    from ssd_ext import _C  # registers torch.ops.ssd_ext.*
except ImportError as _error:
    from ssd_ext._loading import why_not_loaded

    raise ImportError(why_not_loaded(_error, __path__[0]), name=__name__) from _error

_C.simd_level()  # a wrong SSD_EXT_SIMD is told here, not inside the first op

from ssd_ext import ops, priors, reference  # noqa: E402
from ssd_ext.ground_truth import GroundTruth  # noqa: E402
from ssd_ext.loss import MultiBoxLoss  # noqa: E402

try:
    __version__ = _metadata.version("ssd_ext")
except _metadata.PackageNotFoundError:
    __version__ = "unknown"  # a tree in which CMake has built, not installed
__all__ = ["GroundTruth", "MultiBoxLoss", "__version__", "ops", "priors", "reference"]
