"""Matching of priors with ground truth in plain PyTorch."""

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssd_ext.reference.boxes import area, box_iou, encode

if TYPE_CHECKING:
    from ssd_ext.ground_truth import GroundTruth


def _images(ground_truth: "GroundTruth") -> list[tuple[Tensor, Tensor]]:
    """Boxes and labels of each image."""
    bounds = ground_truth.offsets.tolist()
    return [(ground_truth.boxes[i:j], ground_truth.labels[i:j]) for i, j in pairwise(bounds)]


def _corners(priors: Tensor) -> Tensor:
    return torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1)


def _valid(boxes: Tensor) -> Tensor:
    a = area(boxes)
    return (boxes[:, 2:] > boxes[:, :2]).all(1) & (a > 0) & torch.isfinite(a)


def _claims(iou: Tensor, force: str, min_force_iou: float | None) -> list[tuple[int, int]]:
    """(prior, ground truth) pairs that override the thresholds, later ones last. iou: [G, P], -1 for invalid rows."""
    usable = iou >= 0 if min_force_iou is None else iou > min_force_iou
    if force == "none" or iou.numel() == 0:
        return []
    if force == "last":
        return [(int(iou[j].argmax()), j) for j in usable.any(1).nonzero().flatten().tolist()]
    priors, gts = usable.T.nonzero(as_tuple=True)  # by prior, then by ground truth: the order of equal IoUs
    best_first = iou[gts, priors].argsort(descending=True, stable=True)
    pairs: dict[int, int] = {}
    joined = set()
    for prior, j in zip(priors[best_first].tolist(), gts[best_first].tolist(), strict=True):
        if prior not in pairs and j not in joined:
            pairs[prior] = j
            joined.add(j)
    return list(pairs.items())


def match(
    ground_truth: "GroundTruth",
    priors: Tensor,
    *,
    iou_threshold: float = 0.5,
    low_threshold: float | None = None,
    force: str = "bipartite",
    min_force_iou: float | None = 0.0,
) -> Tensor:
    """Objects of B images and ``[P, 4]`` priors to ``[B, P]``; see :func:`ssd_ext.ops.match`."""
    low = iou_threshold if low_threshold is None else low_threshold
    corners = _corners(priors)
    rows = []
    for boxes, _ in _images(ground_truth):
        row = torch.full((len(priors),), -1, dtype=torch.int64, device=priors.device)
        if len(boxes) and len(priors):
            iou = torch.where(_valid(boxes)[:, None], box_iou(boxes, corners), -1)
            best, j = iou.max(0)
            row = torch.where(best >= iou_threshold, j, torch.where(best >= low, -2, -1))
            for prior, gt in _claims(iou, force, min_force_iou):
                row[prior] = gt
        rows.append(row)
    return torch.stack(rows) if rows else torch.empty(0, len(priors), dtype=torch.int64, device=priors.device)


def assign_targets(
    ground_truth: "GroundTruth",
    priors: Tensor,
    *,
    iou_threshold: float = 0.5,
    low_threshold: float | None = None,
    force: str = "bipartite",
    min_force_iou: float | None = 0.0,
    variances: tuple[float, float] = (0.1, 0.2),
) -> tuple[Tensor, Tensor]:
    """``(target_deltas [B, P, 4], target_labels [B, P])``; see :func:`ssd_ext.ops.assign_targets`."""
    matches = match(
        ground_truth,
        priors,
        iou_threshold=iou_threshold,
        low_threshold=low_threshold,
        force=force,
        min_force_iou=min_force_iou,
    )
    target_labels = torch.where(matches == -2, -1, 0)
    target_deltas = priors.new_zeros(*matches.shape, 4)
    for b, (boxes, labels) in enumerate(_images(ground_truth)):
        positive = (matches[b] >= 0).nonzero().flatten()
        matched = matches[b, positive]
        target_labels[b, positive] = labels[matched]
        target_deltas[b, positive] = encode(boxes[matched], priors[positive], variances=variances)
    return target_deltas, target_labels
