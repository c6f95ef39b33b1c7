"""soft_nms, soft_nms_padded."""

import dataclasses
import functools
import math

import torch

from opinfo.compare import soft_nms as compare
from opinfo.inputs import detector_candidates, distinct_scores, extreme_boxes, random_boxes
from opinfo.spec import Case, ErrorCase, OpInfo
from ssd_ext import ops, reference


def _ious(inputs):
    return reference.box_iou(inputs["boxes"], inputs["boxes"])


def _random(n, g):
    return {"boxes": random_boxes(n, g), "scores": torch.rand(n, generator=g)}


def _clustered(n, g):
    boxes, scores = detector_candidates(n, g)
    return {"boxes": boxes, "scores": scores}


def _shifted(g):
    inputs = _clustered(60, g)
    return {"boxes": inputs["boxes"] * 40 - 30, "scores": inputs["scores"]}


def _hostile(g):
    inputs = _clustered(60, g)
    boxes, scores = inputs["boxes"], inputs["scores"]
    scores[0], scores[1], scores[2], scores[3], scores[4] = math.nan, math.inf, -math.inf, 0, -0.5
    boxes[5, 0], boxes[6, 2], boxes[7, 1] = math.nan, math.inf, -math.inf
    boxes[8] = boxes[8, [2, 1, 0, 3]]  # inverted in x
    boxes[9] = boxes[9, [2, 3, 0, 1]]  # inverted in both
    boxes[10, 2:] = boxes[10, :2]  # a point
    boxes[11] = boxes[1]  # IoU 1 with the box of infinite score: inf * 0 in the linear rule
    scores[11] = math.inf
    boxes[12] = torch.tensor([-3e18, -3e18, 3e18, 3e18])
    return inputs


def _extreme(g):
    boxes = extreme_boxes().repeat(2, 1)
    return {"boxes": boxes, "scores": distinct_scores(len(boxes), g)}


def _identical(g):
    return {"boxes": random_boxes(1, g).repeat(20, 1), "scores": torch.rand(20, generator=g)}


def _identical_equal(g):
    return {"boxes": random_boxes(4, g).repeat(10, 1), "scores": torch.full((40,), 0.75)}


def _equal_scores(g):
    return {"boxes": random_boxes(50, g), "scores": torch.full((50,), 0.5)}


def _all_nan(g):
    return {"boxes": random_boxes(5, g), "scores": torch.full((5,), math.nan)}


def _negative_scores(g):
    """They rise when they are lowered."""
    inputs = _clustered(300, g)
    return {"boxes": inputs["boxes"], "scores": inputs["scores"] - 0.5}


def _zeros(g):
    """Zeros of both signs, which are equal."""
    return {
        "boxes": random_boxes(40, g),
        "scores": torch.tensor([0.0, -0.0]).repeat(20)[torch.randperm(40, generator=g)],
    }


def _case(name, make, methods=("linear", "gaussian"), **arguments):
    def one(method):
        return Case(f"{name} {method}", lambda g: {**make(g), "method": method, **arguments}, peers=False)

    return map(one, methods)


def _large(name, n, method, quick=False):
    make = lambda g: {**_clustered(n, g), "method": method}  # noqa: E731
    return Case(name, make, benchmark=True, quick=quick, peers=False)


def _sized(make, n):
    return functools.partial(make, n)


CASES = [
    *_case("random N=33", _sized(_random, 33), methods=["linear"]),
    *_case("clustered N=100", _sized(_clustered, 100), methods=["gaussian"]),
    *_case("random N=33", _sized(_random, 33), methods=["gaussian"]),
    *_case("clustered N=100", _sized(_clustered, 100), methods=["linear"]),
    *_case("clustered N=257", _sized(_clustered, 257), score_threshold=0.1),
    *_case("random N=2100, few above the threshold", _sized(_random, 2100), score_threshold=0.99),
    *_case("N=0", _sized(_random, 0)),
    *_case("N=1", _sized(_random, 1)),
    *_case("N=1 too low", _sized(_random, 1), score_threshold=1.0),
    *_case("all scores equal", _equal_scores),
    *_case("identical boxes", _identical),
    *_case("identical boxes and scores", _identical_equal),
    *_case("negative coordinates", _shifted),
    *_case("hostile", _hostile),
    *(dataclasses.replace(c, dtypes=(torch.float32,), oracle=torch.float32) for c in _case("extreme", _extreme)),
    *_case("all NaN", _all_nan),
    *_case("negative scores", _negative_scores, score_threshold=-0.4),
    *_case("zeros of both signs", _zeros, score_threshold=-1.0),
    *_case("threshold of minus infinity", _hostile, score_threshold=-math.inf),
    *_case("threshold of infinity", _hostile, score_threshold=math.inf),
    *_case("any overlap decays", _sized(_clustered, 60), iou_threshold=0.0, methods=["linear"]),
    *_case("nothing decays", _sized(_clustered, 60), iou_threshold=1.0, methods=["linear"]),
    *_case("tiny sigma", _sized(_clustered, 60), sigma=1e-60, methods=["gaussian"]),
    *_case("infinite sigma", _sized(_clustered, 60), sigma=math.inf, methods=["gaussian"]),
    _large("clustered N=200 linear", 200, "linear"),
    _large("clustered N=200 gaussian", 200, "gaussian"),
    _large("clustered N=1000 linear", 1000, "linear", quick=True),
    _large("clustered N=1000 gaussian", 1000, "gaussian", quick=True),
    _large("clustered N=5000 linear", 5000, "linear"),
    _large("clustered N=5000 gaussian", 5000, "gaussian"),
]


def _call(**changes):
    return lambda: {"boxes": torch.rand(3, 4), "scores": torch.rand(3), **changes}


ERRORS = [
    ErrorCase("not boxes", _call(boxes=torch.rand(3, 5)), r"boxes must be \[N, 4\], got \[3, 5\]"),
    ErrorCase("one box", _call(boxes=torch.rand(4)), r"boxes must be \[N, 4\], got \[4\]"),
    ErrorCase("N differs", _call(scores=torch.rand(4)), r"scores must be \[3\].*got \[4\]"),
    ErrorCase("scores in a column", _call(scores=torch.rand(3, 1)), r"scores must be \[3\].*got \[3, 1\]"),
    ErrorCase("dtypes mixed", _call(scores=torch.rand(3).half()), r"scores must have .* float32, got float16"),
    ErrorCase("integers", _call(boxes=torch.ones(3, 4).long()), r"bfloat16, got int64"),
    ErrorCase("IoU threshold over 1", _call(iou_threshold=1.5), r"iou_threshold must be in \[0, 1\], got 1.5"),
    ErrorCase("IoU threshold NaN", _call(iou_threshold=math.nan), r"iou_threshold must be in \[0, 1\], got nan"),
    ErrorCase("zero sigma", _call(sigma=0.0), r"sigma must be positive, got 0"),
    ErrorCase("NaN sigma", _call(sigma=math.nan), r"sigma must be positive, got nan"),
    ErrorCase("NaN score threshold", _call(score_threshold=math.nan), r"score_threshold must be a number, got nan"),
    ErrorCase("unknown method", _call(method="cosine"), r"method must be 'linear' or 'gaussian', got 'cosine'"),
]


def _full_size(g):
    boxes, scores = detector_candidates(8732, g)
    return {"boxes": boxes, "scores": scores, "score_threshold": 0.9}


SOFT_NMS = OpInfo(
    name="soft_nms",
    op=ops.soft_nms,
    reference=reference.soft_nms,
    schema="soft_nms",
    cases=CASES,
    errors=ERRORS,
    agrees=compare.agrees,
    thresholds={"iou_threshold": _ious},
    capturable=False,
    full_size=_full_size,
)

SOFT_NMS_PADDED = OpInfo(
    name="soft_nms_padded",
    op=ops.soft_nms_padded,
    reference=reference.soft_nms_padded,
    schema="soft_nms_padded",
    cases=CASES,
    errors=ERRORS,
    agrees=compare.agrees,
    thresholds={"iou_threshold": _ious},
    full_size=_full_size,
)

OPS = [SOFT_NMS, SOFT_NMS_PADDED]
