"""Non-maximum suppression in plain PyTorch."""

import torch
from torch import Tensor

from ssd_ext.reference.boxes import box_iou


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the kept boxes by descending score; see :func:`ssd_ext.ops.nms`."""
    order = scores.argsort(descending=True, stable=True)
    order = order[~scores[order].isnan()]
    keep = []
    while len(order):
        best, rest = order[0], order[1:]
        keep.append(best)
        order = rest[box_iou(boxes[best][None], boxes[rest])[0] <= iou_threshold]
    return torch.stack(keep) if keep else order.new_empty(0)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the kept boxes of all classes by descending score; see :func:`ssd_ext.ops.batched_nms`."""
    keep = [idxs.new_empty(0, dtype=torch.int64)]
    for i in idxs.unique():
        members = (idxs == i).nonzero().flatten()
        keep.append(members[nms(boxes[members], scores[members], iou_threshold)])
    kept = torch.cat(keep).sort().values
    return kept[scores[kept].argsort(descending=True, stable=True)]


def nms_padded(boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """``(keep [N] padded with -1, count [])``; see :func:`ssd_ext.ops.nms_padded`."""
    return _padded(nms(boxes, scores, iou_threshold), boxes)


def batched_nms_padded(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """``(keep [N] padded with -1, count [])``; see :func:`ssd_ext.ops.batched_nms_padded`."""
    return _padded(batched_nms(boxes, scores, idxs, iou_threshold), boxes)


def _padded(kept: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    keep = torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
    keep[: len(kept)] = kept
    return keep, torch.tensor(len(kept), device=boxes.device)
