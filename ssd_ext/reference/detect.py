"""Logits and deltas to detections in plain PyTorch."""

import math

import torch
from torch import Tensor

from ssd_ext.reference.boxes import decode, promoted
from ssd_ext.reference.nms import batched_nms, nms


def detect(
    deltas: Tensor,
    logits: Tensor,
    priors: Tensor,
    *,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.45,
    topk_per_class: int = 400,
    max_detections: int = 200,
    activation: str = "softmax",
    variances: tuple[float, float] = (0.1, 0.2),
    bbox_xform_clip: float = math.log(1000 / 16),
    class_agnostic: bool = False,
    window: tuple[float, float, float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(boxes [B, K, 4], scores [B, K], labels [B, K], counts [B])``; see :func:`ssd_ext.ops.detect`."""
    deltas, logits, priors = promoted(deltas, logits, priors)
    all_scores = logits.softmax(-1) if activation == "softmax" else logits.sigmoid()
    all_boxes = decode(deltas, priors, variances=variances, bbox_xform_clip=bbox_xform_clip)
    if window is not None:
        low, high = all_boxes.new_tensor(window).view(2, 2)
        all_boxes = all_boxes.unflatten(-1, (2, 2)).clamp(low, high).flatten(-2)
    images = len(logits)
    boxes, scores = all_boxes.new_zeros(images, max_detections, 4), all_scores.new_zeros(images, max_detections)
    labels = torch.full((images, max_detections), -1, dtype=torch.int64, device=logits.device)
    counts = labels.new_zeros(images)
    for b in range(images):
        found = [labels.new_empty(2, 0)]
        first = 1 if activation == "softmax" else 0  # class 0 is background, for which sigmoid has no column
        for column in range(first, logits.shape[2]):
            score = all_scores[b, :, column]
            order = score.argsort(descending=True, stable=True)
            order = order[score[order] > score_threshold][:topk_per_class]
            found.append(torch.stack([order, torch.full_like(order, column)]))
        prior, column = torch.cat(found, 1)
        box, score, label = all_boxes[b, prior], all_scores[b, prior, column], column + 1 - first
        keep = nms(box, score, iou_threshold) if class_agnostic else batched_nms(box, score, label, iou_threshold)
        keep = keep[:max_detections]
        n = counts[b] = len(keep)
        boxes[b, :n], scores[b, :n], labels[b, :n] = box[keep], score[keep], label[keep]
    return boxes, scores, labels, counts
