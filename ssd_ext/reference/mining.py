"""Hard-negative mining in plain PyTorch."""

import torch
from torch import Tensor


def hard_negatives(
    loss: Tensor, target_labels: Tensor, *, neg_to_pos_ratio: float = 3.0, min_negatives: int = 0
) -> Tensor:
    """``[B, P]`` mask of the hardest negatives; see :func:`ssd_ext.ops.hard_negatives`."""
    negative = target_labels == 0
    asked = ((target_labels > 0).sum(1).double() * neg_to_pos_ratio).floor().clamp(min=min_negatives)
    order = loss.argsort(dim=1, descending=True, stable=True)  # NaN first
    ranked = negative.gather(1, order)
    marked = ranked & (ranked.cumsum(1) <= asked[:, None])
    return torch.zeros_like(negative).scatter(1, order, marked)
