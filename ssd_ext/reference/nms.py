"""Non-maximum suppression in plain PyTorch."""

import torch
from torch import Tensor

from ssd_ext.reference.boxes import box_iou


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    """Indices of the kept boxes by falling score; see :func:`ssd_ext.ops.batched_nms`."""
    order = scores.argsort(descending=True, stable=True)
    order = order[~scores[order].isnan()]
    keep = []
    while len(order):
        best, rest = order[0], order[1:]
        keep.append(best)
        suppressed = box_iou(boxes[best][None], boxes[rest])[0] > iou_threshold
        if idxs is not None:
            suppressed &= idxs[rest] == idxs[best]
        order = rest[~suppressed]
    return torch.stack(keep) if keep else order.new_empty(0)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the kept boxes by falling score; see :func:`ssd_ext.ops.nms`."""
    return batched_nms(boxes, scores, None, iou_threshold)


def nms_padded(
    boxes: Tensor, scores: Tensor, iou_threshold: float, idxs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(keep [N] padded with -1, count [])``; see :func:`ssd_ext.ops.nms_padded`."""
    kept = batched_nms(boxes, scores, idxs, iou_threshold)
    keep = torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
    keep[: len(kept)] = kept
    return keep, torch.tensor(len(kept), device=boxes.device)
