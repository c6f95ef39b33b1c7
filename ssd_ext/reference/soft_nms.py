"""Soft non-maximum suppression in plain PyTorch."""

import torch
from torch import Tensor

from ssd_ext.reference.boxes import box_iou


def decay(iou: Tensor, iou_threshold: float, sigma: float, method: str) -> Tensor:
    """The factor of a score, from the IoU with the box just taken."""
    if method == "linear":
        return torch.where(iou > iou_threshold, 1 - iou, 1)
    return torch.where(iou > 0, torch.exp(-(iou * iou) / sigma), 1)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    *,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: str = "linear",
) -> tuple[Tensor, Tensor]:
    """``[N, 4]`` corners and ``[N]`` scores to ``[K]`` indices and scores; see :func:`ssd_ext.ops.soft_nms`."""
    current = scores.clone()
    untaken = torch.ones_like(scores, dtype=torch.bool)
    keep, kept_scores = [], []
    while True:
        candidates = torch.where(untaken & (current > score_threshold), current, -torch.inf)
        if not bool((candidates > -torch.inf).any()):
            break
        best = int((candidates == candidates.max()).nonzero()[0])  # argmax promises no order among equals
        keep.append(best)
        kept_scores.append(current[best])
        untaken[best] = False
        iou = box_iou(boxes[best : best + 1], boxes)[0]
        current = current * decay(iou, iou_threshold, sigma, method)
    return (
        torch.tensor(keep, dtype=torch.int64, device=boxes.device),
        torch.stack(kept_scores) if kept_scores else scores[:0],
    )


def soft_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    *,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: str = "linear",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`soft_nms` in ``[N]`` indices and scores, padded with -1 and 0, and the count."""
    keep, kept_scores = soft_nms(
        boxes, scores, iou_threshold, sigma=sigma, score_threshold=score_threshold, method=method
    )
    padding = (0, len(boxes) - len(keep))
    return (
        torch.nn.functional.pad(keep, padding, value=-1),
        torch.nn.functional.pad(kept_scores, padding),
        torch.tensor(len(keep), device=boxes.device),
    )
