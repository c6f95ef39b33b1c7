"""How results of soft_nms and soft_nms_padded are compared."""

import math

import torch
from torch import Tensor

from opinfo.spec import HALVES, TOLERANCE, Inputs, arguments, close
from ssd_ext import ops, reference
from ssd_ext.reference.soft_nms import decay


def _replay(inputs: Inputs, keep: Tensor, margin: float) -> Tensor | str:
    """Take the boxes in the order of ``keep`` in float64: their scores, or what is wrong with that order.

    Where two scores are within ``margin``, rounding may order them either way; scores that are equal
    in float64 must still go by index. (IoUs must be clear of
    iou_threshold then, where the linear rule jumps.)
    """
    given = arguments(ops.soft_nms, inputs)
    boxes, current = given.boxes.cpu().double(), given.scores.cpu().double().nan_to_num(-math.inf, math.inf, -math.inf)
    taken = []
    for step, j in enumerate(keep.tolist()):
        best = current.max()
        gap = best - current[j]
        if j != int((current == best).nonzero()[0]) and not 0 < gap <= margin:
            return f"step {step} takes box {j}, whose score is {gap:.3g} below the best"
        if current[j] <= given.score_threshold - margin:
            return f"step {step} takes box {j} of score {current[j]:.3g}, not over the threshold"
        taken.append(current[j].clone())
        iou = reference.box_iou(boxes[j : j + 1], boxes)[0]
        current = current * decay(iou, given.iou_threshold, given.sigma, given.method)
        current = current.nan_to_num(-math.inf, math.inf, -math.inf)
        current[j] = -math.inf
    if len(current) and current.max() > given.score_threshold + margin:
        return f"box {int(current.argmax())} of score {current.max():.3g} is not taken"
    return torch.stack(taken) if taken else current[:0]


def agrees(inputs: Inputs, result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """The same boxes in the same order but for near-ties (see ``_replay``), and scores within tolerance."""
    keep, scores, *counts = result
    if counts:
        (count,) = counts
        if keep.shape != expected[0].shape or scores.shape != expected[1].shape or count.shape != ():
            return f"outputs have shapes {[list(t.shape) for t in result]}"
        if (keep[count:] != -1).any() or (scores[count:] != 0).any():
            return "padding is not -1 and 0"
        keep, scores, expected = keep[:count], scores[:count], [t[: expected[2]] for t in expected[:2]]
    if keep.dtype != torch.int64 or len(keep) != len(scores):
        return f"{len(keep)} {keep.dtype} indices of {len(scores)} scores"
    expected_scores = expected[1]
    if not torch.equal(keep.cpu(), expected[0].cpu()):
        expected_scores = _replay(inputs, keep, TOLERANCE[torch.float32 if scores.dtype in HALVES else scores.dtype])
        if isinstance(expected_scores, str):
            return expected_scores
    return close(scores, expected_scores, TOLERANCE)
