"""nms, batched_nms, and both with outputs of fixed size."""

import dataclasses
import math

import torch

from opinfo.compare import nms as compare
from opinfo.inputs import detector_candidates, distinct_scores, extreme_boxes, random_boxes
from opinfo.spec import EXACT, Case, ErrorCase, OpInfo
from ssd_ext import ops, reference


def _random(n, high=0.5, iou_threshold=0.5, **kwargs):
    def make(g):
        boxes = random_boxes(n, g, high=high)
        return {"boxes": boxes, "scores": distinct_scores(n, g), "iou_threshold": iou_threshold}

    return Case(f"random N={n}", make, **kwargs)


def _candidates(n, iou_threshold=0.5, **kwargs):
    def make(g):
        boxes, scores = detector_candidates(n, g)
        return {"boxes": boxes, "scores": scores, "iou_threshold": iou_threshold}

    return Case(f"candidates N={n}", make, **kwargs)


def _equal_scores(g):
    boxes, scores = detector_candidates(60, g)
    return {"boxes": boxes, "scores": torch.full_like(scores, 0.5), "iou_threshold": 0.5}


def _no_scores(g):
    boxes, scores = detector_candidates(70, g)
    return {"boxes": boxes, "scores": torch.full_like(scores, math.nan), "iou_threshold": 0.5}


def _few_scores(g):
    """Many ties, -0 beside 0."""
    boxes, _ = detector_candidates(100, g)
    levels = torch.tensor([-1.0, -0.0, 0.0, 0.25, 1.0])
    return {"boxes": boxes, "scores": levels[torch.randint(5, (100,), generator=g)], "iou_threshold": 0.3}


def _equal_boxes(g):
    return {
        "boxes": random_boxes(1, g, 0.2).repeat(70, 1),
        "scores": torch.rand(70, generator=g),
        "iou_threshold": 0.5,
    }


def _exactly_at_threshold(g):
    """IoU exactly 1/2 is not above 1/2; of the last two boxes the second is suppressed."""
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [8, 0, 12, 4], [8, 0, 12, 3]])
    return {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]), "iou_threshold": 0.5}


def _hostile(g):
    boxes, scores = detector_candidates(40, g)
    boxes = torch.cat([boxes, boxes[:12]])  # a good copy of each box that goes bad
    scores = torch.cat([scores, scores[:12]])
    boxes[0, 0], boxes[1, 2], boxes[2, 0], boxes[3] = math.nan, math.inf, -math.inf, math.nan
    boxes[4] = boxes[4, [2, 1, 0, 3]]  # inverted
    boxes[5] = boxes[5, [2, 3, 0, 1]]  # inverted twice
    boxes[6, 2:] = boxes[6, :2]  # a point
    scores[7], scores[8], scores[9] = math.nan, math.inf, -math.inf
    return {"boxes": boxes, "scores": scores, "iou_threshold": 0.4}


def _denormal_areas(g):
    """Boxes whose areas are the least denormal numbers, or nothing, in float32."""
    boxes = random_boxes(64, g, high=0.3) * 7e-22
    return {"boxes": boxes, "scores": torch.rand(64, generator=g), "iou_threshold": 0.3}


def _extreme(g):
    boxes = extreme_boxes().repeat(3, 1)
    return {"boxes": boxes, "scores": distinct_scores(len(boxes), g), "iou_threshold": 0.4}


def _negative(g):
    boxes, scores = detector_candidates(80, g)
    return {"boxes": boxes * 600 - 1000, "scores": scores - 0.5, "iou_threshold": 0.45}


_SMALL = [
    _random(50),
    _candidates(63),
    _random(1),
    _random(0, peers=False),
    _random(777, dtypes=EXACT),
    _candidates(300, dtypes=EXACT),
    _candidates(64, iou_threshold=0.0),
    _candidates(65, iou_threshold=1.0),
    Case("scores all equal", _equal_scores),
    Case("scores all NaN", _no_scores, peers=False),
    Case("few scores", _few_scores),
    Case("boxes all equal", _equal_boxes),
    Case("exactly at the threshold", _exactly_at_threshold),
    Case("hostile", _hostile, peers=False),
    Case("denormal areas", _denormal_areas, dtypes=(torch.float32,), peers=False),
    Case("extreme", _extreme, dtypes=(torch.float32,), oracle=torch.float32, peers=False),
    Case("negative coordinates", _negative, dtypes=EXACT),
]


def _large(name, case, quick=False):
    return dataclasses.replace(case, name=name, benchmark=True, quick=quick, dtypes=EXACT)


def _in_classes(case, classes):
    def make(g):
        inputs = case.make(g)
        idxs = torch.randint(classes, (len(inputs["boxes"]),), generator=g)
        return {
            "boxes": inputs["boxes"],
            "scores": inputs["scores"],
            "idxs": idxs,
            "iou_threshold": inputs["iou_threshold"],
        }

    return dataclasses.replace(case, name=f"{case.name}, {classes} classes", make=make)


def _narrow_ids(g):
    """As torchvision's datasets have them."""
    inputs = _in_classes(_candidates(100), 5).make(g)
    return {**inputs, "idxs": inputs["idxs"].int()}


def _far_ids(g):
    """Ids beyond what a float holds, and below 0."""
    inputs = _candidates(200).make(g)
    ids = torch.tensor([-(2**63), -1, 0, 65504, 65505, 2**53, 2**53 + 1, 2**63 - 1])
    return {**inputs, "idxs": ids[torch.randint(8, (200,), generator=g)]}


def _far_outlier(n):
    """What is laid out between the least and greatest coordinates has all other boxes in one place."""

    def make(g):
        inputs = _random(n, high=0.1).make(g)
        inputs["boxes"][n // 2] += 1e6
        return inputs

    return Case("one far outlier", make)


def _far_clusters(n):
    def make(g):
        inputs = _random(n, high=0.1).make(g)
        inputs["boxes"] *= 512
        inputs["boxes"][n // 2 :] += 1e5
        return inputs

    return Case("two far clusters", make)


def _groups(groups, n):
    """As the images of a batch: one after another."""

    def make(g):
        inputs = _random(groups * n, high=0.1).make(g)
        idxs = torch.arange(groups).repeat_interleave(n)
        return {**inputs, "idxs": idxs}

    return Case("groups", make)


def _ious(inputs):
    """Of each kept box with all boxes."""
    keep = reference.nms(inputs["boxes"], inputs["scores"], inputs["iou_threshold"])
    return reference.box_iou(inputs["boxes"][keep], inputs["boxes"])


def _call(**changes):
    base = {"boxes": torch.rand(3, 4), "scores": torch.rand(3), "iou_threshold": 0.5}
    return lambda: {**base, **changes}


_ERRORS = [
    ErrorCase("boxes", _call(boxes=torch.rand(3, 5)), r"boxes must be \[N, 4\], got \[3, 5\]"),
    ErrorCase("scores", _call(scores=torch.rand(4)), r"scores must be \[N\], one for each of boxes, got \[4\]"),
    ErrorCase("scores [N, 1]", _call(scores=torch.rand(3, 1)), r"scores must be .* got \[3, 1\]"),
    ErrorCase("dtypes mixed", _call(scores=torch.rand(3).double()), r"dtype of boxes, float32, got float64"),
    ErrorCase("integers", _call(boxes=torch.ones(3, 4).long()), r"boxes must be float32.* got int64"),
    ErrorCase("threshold", _call(iou_threshold=1.5), r"iou_threshold must be in \[0, 1\], got 1.5"),
    ErrorCase("threshold NaN", _call(iou_threshold=math.nan), r"iou_threshold must be in \[0, 1\], got -?nan"),
]


def _with_ids(error):
    return ErrorCase(error.name, lambda: {**error.make(), "idxs": torch.zeros(3).long()}, error.match, error.error)


_ID_ERRORS = [
    ErrorCase("idxs", _call(idxs=torch.zeros(4).long()), r"idxs must be \[N\], one for each of boxes, got \[4\]"),
    ErrorCase("float idxs", _call(idxs=torch.zeros(3)), r"idxs must be \[N\] integers, got torch.float32"),
    ErrorCase("no idxs", _call(idxs=None), r"idxs must be \[N\] integers, got None"),
]

NMS = OpInfo(
    name="nms",
    op=ops.nms,
    reference=reference.nms,
    schema="nms",
    cases=[
        *_SMALL,
        _candidates(3100, dtypes=EXACT),  # enough to be split into cells
        _large("random N=100", _random(100)),
        _large("random N=1000", _random(1000), quick=True),
        _large("random N=5000", _random(5000)),
        _large("random N=20000", _random(20000)),
        _large("candidates N=1000", _candidates(1000)),
        _large("candidates N=20000", _candidates(20000)),
        _large("N=20000, one far outlier", _far_outlier(20000)),
        _large("N=20000, two far clusters", _far_clusters(20000)),
    ],
    errors=_ERRORS,
    agrees=compare.agrees,
    thresholds={"iou_threshold": _ious},
    capturable=False,
    full_size=_candidates(8732).make,
)

BATCHED_NMS = OpInfo(
    name="batched_nms",
    op=ops.batched_nms,
    reference=reference.batched_nms,
    schema="nms",
    cases=[
        *(_in_classes(case, 3) for case in _SMALL),
        Case("far ids", _far_ids, peers=False),
        Case("int32 ids", _narrow_ids),
        _in_classes(_candidates(4200, dtypes=EXACT), 40),  # enough to be grouped by class on the GPU
        _large("random N=1000, 80 classes", _in_classes(_random(1000), 80), quick=True),
        _large("random N=20000, 80 classes", _in_classes(_random(20000), 80)),
        _large("candidates N=1000, 80 classes", _in_classes(_candidates(1000), 80)),
        _large("candidates N=20000, 80 classes", _in_classes(_candidates(20000), 80)),
        _large("64 groups of 2000", _groups(64, 2000)),
    ],
    errors=[*map(_with_ids, _ERRORS), *_ID_ERRORS],
    agrees=compare.agrees,
    thresholds={"iou_threshold": _ious},
    capturable=False,
    full_size=_in_classes(_candidates(8732), 2).make,
)

NMS_PADDED = OpInfo(
    name="nms_padded",
    op=ops.nms_padded,
    reference=reference.nms_padded,
    schema="nms_padded",
    cases=[
        *_SMALL,
        _large("random N=1000", _random(1000), quick=True),
    ],
    errors=_ERRORS,
    agrees=compare.padded_agrees,
    thresholds={"iou_threshold": _ious},
    full_size=_candidates(8732).make,
)

BATCHED_NMS_PADDED = OpInfo(
    name="batched_nms_padded",
    op=ops.batched_nms_padded,
    reference=reference.batched_nms_padded,
    schema="nms_padded",
    cases=[
        *(_in_classes(case, 3) for case in _SMALL[:6]),
        Case("far ids", _far_ids, peers=False),
        Case("int32 ids", _narrow_ids),
        _large("random N=20000, 80 classes", _in_classes(_random(20000), 80)),
    ],
    errors=[*map(_with_ids, _ERRORS), *_ID_ERRORS],
    agrees=compare.padded_agrees,
    thresholds={"iou_threshold": _ious},
    full_size=_in_classes(_candidates(8732), 2).make,
)

OPS = [NMS, BATCHED_NMS, NMS_PADDED, BATCHED_NMS_PADDED]
