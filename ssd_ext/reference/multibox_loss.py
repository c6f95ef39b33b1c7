"""The MultiBox loss in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_ext.reference.mining import hard_negatives


def multibox_loss(
    deltas: Tensor,
    logits: Tensor,
    target_deltas: Tensor,
    target_labels: Tensor,
    *,
    neg_to_pos_ratio: float = 3.0,
    min_negatives: int = 0,
    alpha: float = 1.0,
    beta: float = 1.0,
    normalize: str = "batch",
) -> tuple[Tensor, Tensor]:
    """``(loc, conf)``, two scalars; see :func:`ssd_ext.ops.multibox_loss`."""
    positive = target_labels > 0
    background_loss = -logits.detach().log_softmax(-1)[..., 0]
    negative = hard_negatives(
        background_loss, target_labels, neg_to_pos_ratio=neg_to_pos_ratio, min_negatives=min_negatives
    )
    selected = positive | negative

    counts = torch.stack([positive.sum(1), negative.sum(1)])  # of each image
    if normalize == "batch":
        counts = counts.sum(1, keepdim=True)
    divisor = torch.where(counts[0] > 0, counts[0], counts[1].clamp(min=1))
    if normalize == "image":
        divisor = divisor * len(target_labels)
    divisor = divisor[:, None].expand(target_labels.shape)

    conf = F.cross_entropy(logits[selected], target_labels[selected], reduction="none")
    loc = F.smooth_l1_loss(deltas[positive], target_deltas[positive], reduction="none", beta=beta).sum(-1)
    return alpha * (loc / divisor[positive]).sum(), (conf / divisor[selected]).sum()
