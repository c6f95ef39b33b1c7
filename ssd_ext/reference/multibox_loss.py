"""The MultiBox loss in plain PyTorch."""

from torch import Tensor
from torch.nn import functional as F

from ssd_ext.reference.mining import hard_negatives


def multibox_loss(
    deltas: Tensor,
    logits: Tensor,
    target_deltas: Tensor,
    labels: Tensor,
    ratio: float = 3.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    normalize: str = "batch",
    *,
    min_negatives: int = 0,
) -> tuple[Tensor, Tensor]:
    """``(loc, conf)``, two scalars; see :func:`ssd_ext.ops.multibox_loss`."""
    positive = labels > 0
    background_loss = -logits.detach().log_softmax(-1)[..., 0]
    selected = positive | hard_negatives(background_loss, labels, ratio, min_negatives)

    if normalize == "batch":
        divisor = positive.sum().clamp(min=1).expand(labels.shape[:1])
    else:
        divisor = positive.sum(1).clamp(min=1) * len(labels)
    divisor = divisor[:, None].expand(labels.shape)

    conf = F.cross_entropy(logits[selected], labels[selected], reduction="none")
    loc = F.smooth_l1_loss(deltas[positive], target_deltas[positive], reduction="none", beta=beta).sum(-1)
    return alpha * (loc / divisor[positive]).sum(), (conf / divisor[selected]).sum()
