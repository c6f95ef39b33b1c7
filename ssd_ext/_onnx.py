"""The ops as standard ONNX operators: see :func:`ssd_ext.export.onnx_translations`.

A function has the arguments of the ``torch.ops.ssd_ext`` op of its name, with ONNX values for tensors, and returns ONNX
values. All of them compute in float32, the type of NonMaxSuppression. They compare by Less only, because OpenVINO's
Greater is true for NaN.
"""

from typing import Any

import torch
from onnxscript import ir
from onnxscript import opset18 as op

FLOAT, DOUBLE, INT64 = ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT64
ABSENT = -1.0  # the score, or rank, of what is no candidate: NonMaxSuppression looks at those above 0
# In place of 0: in OpenVINO an IoU equal to the threshold suppresses, and every IoU would.
LEAST_THRESHOLD = torch.finfo(torch.float32).smallest_normal


def encode(boxes: Any, priors: Any, variances: list[float]) -> Any:
    """Translate :func:`ssd_ext.ops.encode`."""
    low, high = _parts(boxes, 2)
    center, size = _parts(priors, 2)
    offset = ((low + high) * 0.5 - center) / (size * variances[0])
    scale = op.Log((high - low) / size) / variances[1]
    return op.Cast(op.Concat(offset, scale, axis=-1), to=_promoted(boxes, priors))


def decode(deltas: Any, priors: Any, variances: list[float], bbox_xform_clip: float) -> Any:
    """Translate :func:`ssd_ext.ops.decode`."""
    return op.Cast(_decoded(deltas, priors, variances, bbox_xform_clip), to=_promoted(deltas, priors))


def box_iou(boxes1: Any, boxes2: Any) -> Any:
    """Translate :func:`ssd_ext.ops.box_iou`."""
    a = _parts(_overlapping(boxes1), 4)  # [N, 1] each
    b = [op.Transpose(x, perm=[1, 0]) for x in _parts(_overlapping(boxes2), 4)]  # [1, M] each
    width, height = (op.Max(op.Min(a[i + 2], b[i + 2]) - op.Max(a[i], b[i]), 0.0) for i in range(2))
    overlap = width * height
    union = _area(*a) + _area(*b) - overlap
    return op.Cast(op.Where(op.Less(0.0, union), overlap / union, 0.0), to=_promoted(boxes1, boxes2))


def nms(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
    """Translate :func:`ssd_ext.ops.nms`, and with ``idxs`` :func:`ssd_ext.ops.batched_nms`."""
    scores = _float(scores)
    absent = op.IsNaN(scores)
    ranks = op.Where(absent, ABSENT, _ranks(op.Where(absent, -torch.inf, scores)))
    rows = op.Unsqueeze(ranks, [0])
    if idxs is not None:
        ids, *_ = op.Unique(idxs)
        rows = op.Where(op.Equal(op.Unsqueeze(ids, [1]), idxs), ranks, ABSENT)
    kept = op.Gather(_kept(op.Unsqueeze(boxes, [0]), op.Unsqueeze(rows, [0]), iou_threshold), 2, axis=1)
    _, order = op.TopK(op.Gather(ranks, kept), op.Shape(kept))
    return op.Gather(kept, order)


def nms_padded(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
    """Translate :func:`ssd_ext.ops.nms_padded`, and with ``idxs`` :func:`ssd_ext.ops.batched_nms_padded`."""
    keep = nms(boxes, scores, idxs, iou_threshold)
    padding = op.Expand(-1, op.Shape(scores) - op.Shape(keep))
    return op.Concat(keep, padding, axis=0), op.Size(keep)


def detect(
    deltas: Any,
    logits: Any,
    priors: Any,
    score_threshold: float,
    iou_threshold: float,
    topk_per_class: int,
    max_detections: int,
    sigmoid: bool,
    variances: list[float],
    bbox_xform_clip: float,
    class_agnostic: bool,
    window: Any,
) -> Any:
    """Translate :func:`ssd_ext.ops.detect`.

    An image's candidates are ordered by class, within a class by falling score, then by prior. So the first of equal
    scores, which TopK prefers, is that of the lowest class, then of the lowest prior.
    """
    boxes = _decoded(deltas, priors, variances, bbox_xform_clip)
    if window is not None:
        low, high = window[:2] * 2, window[2:] * 2
        boxes = op.Where(op.Less(boxes, low), low, op.Where(op.Less(high, boxes), high, boxes))
    scores = _scores(logits, sigmoid)
    scores = op.Where(op.Less(score_threshold, scores), scores, ABSENT)

    images, classes, each = _size(scores, 0), _size(scores, 1), op.Min(topk_per_class, _size(scores, 2))
    every = classes * each
    scores, prior = op.TopK(scores, each)
    boxes = op.GatherND(boxes, op.Reshape(prior, [images, every, 1], allowzero=1), batch_dims=1)

    rows = [images, every] if class_agnostic else [images * classes, each]
    scores = op.Reshape(scores, rows, allowzero=1)
    scores = _suppressed(op.Reshape(boxes, [*rows, 4], allowzero=1), scores, iou_threshold)

    wanted = op.Min(max_detections, every)
    scores, index = op.TopK(op.Reshape(scores, [images, every], allowzero=1), wanted)
    found = op.Less(ABSENT, scores)
    boxes = op.GatherND(boxes, op.Unsqueeze(index, [2]), batch_dims=1)
    boxes = op.Where(op.Unsqueeze(found, [2]), boxes, 0.0)
    scores = op.Where(found, scores, 0.0)
    labels = op.Where(found, op.Div(index, op.Max(each, 1)) + 1, -1)

    padding, dtype = max_detections - wanted, _promoted(deltas, logits, priors)
    return (
        op.Cast(op.Pad(boxes, [0, 0, 0, 0, padding, 0]), to=dtype),
        op.Cast(op.Pad(scores, [0, 0, 0, padding]), to=dtype),
        op.Pad(labels, [0, 0, 0, padding], -1),
        op.ReduceSum(op.Cast(found, to=INT64), [1], keepdims=0),
    )


def _scores(logits: Any, sigmoid: bool) -> Any:
    """``[B, P, C]`` logits to ``[B, C, P]`` scores, without the background of a softmax."""
    logits = _float(logits)
    scores = op.Sigmoid(logits) if sigmoid else op.Slice(op.Softmax(logits, axis=-1), [1], _size(logits, 2), [2])
    return op.Transpose(scores, perm=[0, 2, 1])


def _suppressed(boxes: Any, scores: Any, iou_threshold: float) -> Any:
    """``scores [R, N]``, but ABSENT where NMS among the ``boxes [R, N, 4]`` of a row does not keep the box."""
    ranks = op.Where(op.Less(scores, 0.0), ABSENT, _ranks(scores))
    kept = op.Gather(_kept(boxes, op.Unsqueeze(ranks, [1]), iou_threshold), [0, 2], axis=1)
    return op.ScatterND(op.Min(scores, ABSENT), kept, op.GatherND(scores, kept))


def _kept(boxes: Any, ranks: Any, iou_threshold: float) -> Any:
    """What NMS keeps of ``boxes [B, N, 4]``, by each row of ``ranks [B, R, N]``: ``[K, 3]`` indices of image, row, box.

    ONNX leaves open which of equal scores is kept. Therefore ranks, which differ, take the place of scores.
    """
    threshold = max(iou_threshold, LEAST_THRESHOLD)
    return op.NonMaxSuppression(_overlapping(boxes), ranks, _size(boxes, 1), threshold, 0.0)


def _ranks(scores: Any) -> Any:
    """Ranks in the last dimension of ``scores [..., N]`` without NaN: N of the highest, 1 of the lowest.

    Of equal scores the first has the highest rank. The ranks are float32, exact up to 2^24.
    """
    number = op.Shape(scores, start=-1)
    _, order = op.TopK(scores, number)
    ranks = op.Cast(op.Range(op.Squeeze(number), 0, -1), to=FLOAT)
    return op.ScatterElements(scores, order, op.Expand(ranks, op.Shape(scores)), axis=-1)


def _overlapping(boxes: Any) -> Any:
    """``boxes [..., 4]``, but zeros instead of those whose IoU with any box is 0.

    ONNX takes two opposite corners in any order, and leaves NaN and infinity open.
    """
    x1, y1, x2, y2 = _parts(boxes, 4)
    valid = op.And(op.And(op.Less(x1, x2), op.Less(y1, y2)), op.Less(_area(x1, y1, x2, y2), torch.inf))
    return op.Where(valid, _float(boxes), 0.0)


def _area(x1: Any, y1: Any, x2: Any, y2: Any) -> Any:
    return (x2 - x1) * (y2 - y1)


def _decoded(deltas: Any, priors: Any, variances: list[float], bbox_xform_clip: float) -> Any:
    offset, scale = _parts(deltas, 2)
    center, size = _parts(priors, 2)
    center = center + offset * variances[0] * size
    scale = scale * variances[1]
    scale = op.Where(op.Less(bbox_xform_clip, scale), bbox_xform_clip, scale)  # unlike Min, keeps NaN in every runtime
    half = op.Exp(scale) * size * 0.5
    return op.Concat(center - half, center + half, axis=-1)


def _parts(boxes: Any, count: int) -> list[Any]:
    """``[..., 4]`` in 2 or 4 parts. Of a constant, the exporter computes what Slice gives, but not what Split gives."""
    width = 4 // count
    return [op.Slice(_float(boxes), [start], [start + width], [-1]) for start in range(0, 4, width)]


def _float(tensor: Any) -> Any:
    return op.Cast(tensor, to=FLOAT)


def _promoted(*tensors: Any) -> ir.DataType:
    """The type of a result, as ``torch.promote_types`` gives it."""
    kinds = {tensor.dtype for tensor in tensors}
    return kinds.pop() if len(kinds) == 1 else DOUBLE if DOUBLE in kinds else FLOAT


def _size(tensor: Any, axis: int) -> Any:
    return op.Shape(tensor, start=axis, end=axis + 1)
