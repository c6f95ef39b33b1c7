"""How results of match and assign_targets are compared."""

import torch

from opinfo.spec import close, convert
from ssd_ext import reference


def _own_arithmetic(inputs):
    """The inputs as the op computes with them: halves widened to float32."""
    return convert(inputs, torch.float64 if inputs["priors"].dtype == torch.float64 else torch.float32, "cpu")


def matches_agree(inputs, result, expected):
    """Equal to the float64 reference, or to the reference in the arithmetic that the op computes in.

    Priors lie on a grid, so two of them often have the same IoU with a ground truth but for rounding: which
    is the higher then depends on the precision. The reference follows the op's formula in every precision.
    """
    if result.dtype != torch.int64 or result.shape != expected.shape:
        return f"got {result.dtype} {list(result.shape)}, expected int64 {list(expected.shape)}"
    wrong = int((result.cpu() != expected.cpu()).sum())
    if wrong and not torch.equal(result.cpu(), reference.match(**_own_arithmetic(inputs))):
        return f"{wrong} of {expected.numel()} matches differ"
    return None


def targets_agree(inputs, result, expected):
    """As ``matches_agree``; then the deltas of those matches, within the tolerance of their dtype."""
    tolerance = {torch.float32: 5e-5, torch.float64: 1e-11, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    wrong = close(result, expected, tolerance)
    if wrong and close(result, reference.assign_targets(**_own_arithmetic(inputs)), tolerance):
        return wrong
    return None
