"""Matching of priors with ground truth in plain PyTorch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssd_ext.reference.boxes import area, box_iou, encode

if TYPE_CHECKING:
    from ssd_ext.ops.matching import Ragged


def _images(gt_boxes: "Ragged") -> list[Tensor]:
    """``[G, 4]`` of each image, from either form of ragged ground truth."""
    if isinstance(gt_boxes, tuple) and len(gt_boxes) == 2 and not gt_boxes[1].is_floating_point():
        rows, offsets = gt_boxes
        gt_boxes = rows.split(offsets.diff().tolist())
    return [boxes.reshape(-1, 4) for boxes in gt_boxes]


def _corners(priors: Tensor) -> Tensor:
    return torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1)


def _valid(boxes: Tensor) -> Tensor:
    a = area(boxes)
    return (boxes[:, 2:] > boxes[:, :2]).all(1) & (a > 0) & torch.isfinite(a)


def _claims(iou: Tensor, force: str) -> list[tuple[int, int]]:
    """(prior, ground truth) pairs that override the thresholds, later ones last. iou: [G, P], -1 for invalid rows."""
    usable = (iou >= 0).any(1)
    if force == "none" or iou.numel() == 0:
        return []
    if force == "last":
        return [(int(iou[j].argmax()), j) for j in usable.nonzero().flatten().tolist()]
    pairs = []
    left = iou.T.clone()  # [P, G], so that the first maximum is the lowest prior, then the lowest ground truth
    while bool((left >= 0).any()):
        prior, j = divmod(int(left.argmax()), left.shape[1])
        pairs.append((prior, j))
        left[prior] = -1
        left[:, j] = -1
    return pairs


def match(
    gt_boxes: "Ragged",
    priors: Tensor,
    iou_threshold: float = 0.5,
    low_threshold: float | None = None,
    force: str = "bipartite",
) -> Tensor:
    """Ragged ``[G, 4]`` corners and ``[P, 4]`` priors to ``[B, P]``; see :func:`ssd_ext.ops.match`."""
    low = iou_threshold if low_threshold is None else low_threshold
    corners = _corners(priors)
    rows = []
    for boxes in _images(gt_boxes):
        row = torch.full((len(priors),), -1, dtype=torch.int64, device=priors.device)
        if len(boxes) and len(priors):
            iou = torch.where(_valid(boxes)[:, None], box_iou(boxes, corners), -1)
            best, j = iou.max(0)
            row = torch.where(best >= iou_threshold, j, torch.where(best >= low, -2, -1))
            for prior, gt in _claims(iou, force):
                row[prior] = gt
        rows.append(row)
    return torch.stack(rows) if rows else torch.empty(0, len(priors), dtype=torch.int64, device=priors.device)


def assign_targets(
    gt_boxes: "Ragged",
    gt_labels: Sequence[Tensor] | Tensor,
    priors: Tensor,
    iou_threshold: float = 0.5,
    low_threshold: float | None = None,
    force: str = "bipartite",
    variances: tuple[float, float] = (0.1, 0.2),
) -> tuple[Tensor, Tensor]:
    """``(labels [B, P], deltas [B, P, 4])``; see :func:`ssd_ext.ops.assign_targets`."""
    matches = match(gt_boxes, priors, iou_threshold, low_threshold, force)
    labels = torch.where(matches == -2, -1, 0)
    deltas = priors.new_zeros(*matches.shape, 4)
    images = _images(gt_boxes)
    of_images = gt_labels.split([len(boxes) for boxes in images]) if isinstance(gt_labels, Tensor) else gt_labels
    for b, (boxes, classes) in enumerate(zip(images, of_images, strict=True)):
        positive = (matches[b] >= 0).nonzero().flatten()
        matched = matches[b, positive]
        labels[b, positive] = classes[matched]
        deltas[b, positive] = encode(boxes[matched], priors[positive], variances)
    return labels, deltas
