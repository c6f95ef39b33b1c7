"""How results of detect are compared."""

import math

import torch

from opinfo.spec import arguments, close, convert
from ssd_ext import ops, reference

# How near to a threshold a score (relative) and an IoU may fall on its other side. Float32: torchvision
# shifts each class's boxes away from the others', up to 80 image widths, and loses those bits.
SCORE_MARGIN = {torch.float32: 1e-5, torch.float64: 1e-12}
IOU_MARGIN = {torch.float32: 1e-4, torch.float64: 1e-10}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def agrees(inputs, result, expected):
    """Equal to the expected detections, or different only where a margin decides.

    The choice of detections is discontinuous: one IoU rounded across the threshold changes all that
    follows. So where results differ, each is held against the scores and boxes in float64: whatever it
    keeps must be allowed, and whatever it lacks must be explained, to within the margins.
    """
    if wrong := _malformed(inputs, result):
        return wrong
    dtype = result[0].dtype
    result = convert(result, device="cpu")
    if dtype in (torch.float16, torch.bfloat16):  # the float32 detections, rounded
        inputs = convert(inputs, torch.float32, "cpu")
        wide = ops.detect(**inputs)
        if wrong := close(result, convert(wide, dtype), TOLERANCE):
            return f"other than in float32: {wrong}"
        if wrong := _outside_window(inputs, result):
            return wrong
        result = wide
    if close(result, expected, TOLERANCE) is None:
        return None
    if wrong := _unexplained(convert(inputs, device="cpu"), result):
        return wrong
    if expected[0].dtype != torch.float64 and (wrong := _unexplained(convert(inputs, device="cpu"), expected)):
        return f"what was expected is wrong: {wrong}"
    return None


def _malformed(inputs, result):
    boxes, scores, labels, counts = result
    batch, most = len(inputs["logits"]), inputs.get("max_detections", 200)
    shapes = [list(t.shape) for t in result]
    if shapes != [[batch, most, 4], [batch, most], [batch, most], [batch]]:
        return f"shapes {shapes}"
    if labels.dtype != torch.int64 or counts.dtype != torch.int64:
        return f"labels are {labels.dtype}, counts {counts.dtype}"
    if bool(((counts < 0) | (counts > most)).any()):
        return f"counts {counts.tolist()}"
    padding = torch.arange(most, device=counts.device) >= counts[:, None]
    if bool((boxes[padding] != 0).any() | (scores[padding] != 0).any() | (labels[padding] != -1).any()):
        return "padding is not box 0, score 0, label -1"
    return None


def _outside_window(inputs, result):
    window = inputs.get("window") or (-math.inf, -math.inf, math.inf, math.inf)
    low, high = torch.tensor(window, dtype=torch.float64).view(2, 2)
    corners = result[0].double().unflatten(-1, (2, 2))
    outside = ((corners < low) | (corners > high)).flatten(2).any(2) & (result[2] > 0)
    return f"boxes leave the window {window}: {result[0][outside].tolist()}" if bool(outside.any()) else None


def _unexplained(inputs, result):
    given = arguments(ops.detect, inputs)
    margins = SCORE_MARGIN[result[0].dtype], IOU_MARGIN[result[0].dtype]
    tolerance = TOLERANCE[result[0].dtype]
    wide = convert(inputs, torch.float64)
    logits = wide["logits"]
    all_scores = logits.softmax(-1) if given.activation == "softmax" else logits.sigmoid()
    if given.activation == "softmax":
        all_scores[..., :1] = -1
    all_boxes = reference.decode(
        wide["deltas"], wide["priors"], variances=given.variances, bbox_xform_clip=given.bbox_xform_clip
    )
    if given.window:
        low, high = all_boxes.new_tensor(given.window).view(2, 2)
        all_boxes = all_boxes.unflatten(-1, (2, 2)).clamp(low, high).flatten(-2)
    for b, n in enumerate(result[3].tolist()):
        boxes, scores, labels = (t[b, :n] for t in result[:3])
        columns = labels - 1 if given.activation == "sigmoid" else labels
        image = (all_scores[b].nan_to_num(-1), all_boxes[b], boxes, scores, columns)
        wrong = _image_unexplained(given, margins, tolerance, *image)
        if wrong:
            return f"image {b}: {wrong}"
    return None


def _image_unexplained(given, margins, tolerance, scores64, boxes64, boxes, scores, columns):
    near, iou_margin = margins
    n = len(columns)
    # Which prior each detection is of: the lowest that fits and is not taken.
    taken = torch.zeros_like(scores64, dtype=torch.bool)
    found = []
    for k in range(n):
        box, score, column = boxes[k].double(), scores[k].double(), columns[k]
        off = (boxes64 - box).abs() / boxes64.abs().clamp(min=1)
        off = torch.where((boxes64 == box) | (boxes64.isnan() & box.isnan()), 0, off).amax(1)
        far = (scores64[:, column] - score).abs() / score
        fits = (~(off > tolerance) & (far <= near) & ~taken[:, column]).nonzero().flatten()
        if len(fits) == 0:
            return f"detection {k} is of no prior: box {boxes[k].tolist()}, score {score}, column {column}"
        taken[fits[0], column] = True
        found.append(fits[0])
    prior = torch.stack(found) if found else columns
    score = scores64[prior, columns]
    if bool((scores[1:] > scores[:-1]).any()):
        return "scores rise"
    rank = torch.stack([columns, prior], 1).tolist()
    for k in range(1, n):
        if scores[k] == scores[k - 1] and rank[k] < rank[k - 1]:
            return f"detections {k - 1} and {k} tie in the wrong order: (column, prior) {rank[k - 1]}, {rank[k]}"
    if bool((score <= given.score_threshold * (1 - near)).any()):
        return "a score is not above the threshold"

    ordered = scores64.sort(0).values.T.contiguous()  # [C, P]

    def better(c, s):
        """How many priors have a score above s[i] in class c[i]."""
        return len(scores64) - torch.searchsorted(ordered[c], s[:, None], right=True).flatten()

    if n and bool((better(columns, score * (1 + near)) >= given.topk_per_class).any()):
        return "a detection is not among the best of its class"
    rivals = torch.ones(n, n, dtype=torch.bool) if given.class_agnostic else columns[:, None] == columns
    overlap = reference.box_iou(boxes64[prior], boxes64[prior])
    if bool((rivals & (overlap > given.iou_threshold + iou_margin)).triu(1).any()):
        return "two detections overlap"

    # What is missing: behind the last detection, not among the best of its class, or suppressed.
    least = max(given.score_threshold, score[-1].item() if n == given.max_detections else 0.0)
    q, c = ((scores64 > least * (1 + near)) & ~taken).nonzero().T
    s = scores64[q, c]
    for start in range(0, len(q), 1 << 14):
        part = slice(start, start + (1 << 14))
        among = better(c[part], s[part] * (1 - near)) <= given.topk_per_class
        by = reference.box_iou(boxes64[q[part]], boxes64[prior]) > given.iou_threshold - iou_margin
        by &= score >= s[part, None] * (1 - near)
        if not given.class_agnostic:
            by &= c[part, None] == columns
        missing = (among & ~by.any(1)).nonzero().flatten()
        if len(missing):
            i = start + int(missing[0])
            return f"prior {int(q[i])} of class {int(c[i])}, score {s[i]:.6g}, is missing"
    return None
