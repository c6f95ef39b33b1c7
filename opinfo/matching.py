"""match, assign_targets."""

import dataclasses
import math

import torch

from opinfo.compare import matching as compare
from opinfo.inputs import coco_gts, random_boxes, ssd300_priors, synthetic_gts
from opinfo.spec import EXACT, Case, ErrorCase, OpInfo
from ssd_ext import ops, reference


def _priors(n, g):
    return torch.cat([torch.rand(n, 2, generator=g), 0.05 + 0.6 * torch.rand(n, 2, generator=g)], 1)


def _case(name, counts, num_priors, more=None, **kwargs):
    """Random ground truth, ``counts`` boxes in each image."""

    def make(g):
        boxes = [random_boxes(n, g, 0.05, 0.6) for n in counts]
        return {"gt_boxes": boxes, "priors": _priors(num_priors, g), **(more or {})}

    return Case(name, make, **kwargs)


def _hostile(g):
    """Bad ground truth of every kind among good ones; an image with bad ones alone."""
    boxes = random_boxes(10, g, 0.1, 0.6)
    boxes[0, 0], boxes[2, 1], boxes[3, 2], boxes[4, 0] = math.nan, math.nan, math.inf, -math.inf
    boxes[5, 2] = boxes[5, 0]  # no width
    boxes[6] = boxes[6, [2, 1, 0, 3]]  # inverted
    boxes[7] = boxes[7, [2, 3, 0, 1]]  # inverted twice: a positive product of sides
    return {"gt_boxes": [boxes, boxes[2:8], boxes[8:]], "priors": _priors(50, g)}


def _copies(count, num_priors, g):
    """Equal ground truths: all but one lose the prior that they want, again and again."""
    return {"gt_boxes": [random_boxes(1, g, 0.2, 0.6).repeat(count, 1)], "priors": _priors(num_priors, g)}


def _bad_priors(g):
    """Priors of every kind of bad number among good ones, also as the first and the last of a warp and of all."""
    priors = _priors(600, g)
    bad = torch.tensor([math.nan, math.inf, -math.inf, -1.0, 0.0])
    for at, value in zip((0, 63, 64, 100, 599), bad, strict=True):
        priors[at, at % 4] = value
    priors[128:192] = math.nan
    return {"gt_boxes": [random_boxes(6, g, 0.1, 0.6), random_boxes(3, g, 0.1, 0.6)], "priors": priors}


def _one_best_prior(g):
    """Two ground truths with one best prior; the second is closer to it."""
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]])
    return {"gt_boxes": [torch.tensor([[0.3, 0.3, 0.6, 0.6], [0.3, 0.3, 0.7, 0.7]])], "priors": priors}


def _exactly_at_threshold(g):
    """IoU exactly 1/2 and exactly 1/4, in numbers that every dtype holds."""
    priors = torch.tensor([[1.0, 1.0, 2.0, 2.0], [6.0, 1.0, 4.0, 2.0], [20.0, 20.0, 2.0, 2.0]])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0], [4.0, 0.0, 5.0, 2.0]])
    return {"gt_boxes": [boxes], "priors": priors, "low_threshold": 0.25, "force": "none"}


def _in_pixels(g):
    """Negative coordinates and priors over the edge, in pixels."""
    return {
        "gt_boxes": [random_boxes(5, g, 0.3, 0.8) * 300 - 100, random_boxes(2, g) * 300 - 400],
        "priors": _priors(64, g) * 300 - 100,
    }


def _at_zero_threshold(g):
    return {"gt_boxes": [random_boxes(3, g), torch.empty(0, 4)], "priors": _priors(20, g), "iou_threshold": 0.0}


def _meeting_none(g):
    """At threshold 0, priors that meet none of many ground truths belong to the first."""
    boxes = random_boxes(70, g, high=0.1) + 2
    return {"gt_boxes": [boxes], "priors": _priors(20, g), "iou_threshold": 0.0, "force": "none"}


def _ragged_pair(g):
    counts = torch.tensor([3, 0, 5, 1])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return {"gt_boxes": (random_boxes(9, g), offsets), "priors": _priors(70, g)}


def _ssd300(batch, kind, **more):
    def make(g):
        boxes, labels = coco_gts(batch) if kind == "coco" else synthetic_gts(batch, g)
        return {"gt_boxes": boxes, "gt_labels": labels, "priors": ssd300_priors(), **more}

    return make


def _crowded(batch, count):
    def make(g):
        boxes = [random_boxes(count, g) for _ in range(batch)]
        labels = [torch.randint(1, 81, (count,), generator=g) for _ in range(batch)]
        return {"gt_boxes": boxes, "gt_labels": labels, "priors": ssd300_priors()}

    return make


_SMALL = [
    _case("three images", (3, 1, 7), 100),
    _case("last", (3, 0, 7), 69, {"force": "last"}),
    _case("none", (3, 1, 7), 100, {"force": "none"}),
    _case("two thresholds", (5, 9), 200, {"iou_threshold": 0.5, "low_threshold": 0.2}),
    _case("some images empty", (0, 4, 0, 0, 2), 50),
    _case("large images, some empty", (0, 9, 0, 40), 1100),
    _case("large images, some empty, last", (9, 0, 40, 0), 1100, {"force": "last"}),
    _case("no ground truth at all", (0, 0), 33),
    _case("more ground truths than priors", (20,), 7),
    _case("one prior", (3, 1), 1),
    _case("B=0", (), 10),
    _case("P=0", (2, 1), 0),
    _case("a row of blocks", (12, 3), 1000),
    _case("one large image", (30,), 5000),
    Case("(boxes, offsets)", _ragged_pair),
    Case("hostile ground truth", _hostile),
    Case("equal ground truths, more than priors", lambda g: _copies(40, 30, g)),
    Case("equal ground truths, many priors", lambda g: _copies(12, 1100, g)),
    Case("bad priors", _bad_priors),
    Case("one best prior", _one_best_prior),
    Case("one best prior, last", lambda g: {**_one_best_prior(g), "force": "last"}),
    Case("exactly at the thresholds", _exactly_at_threshold),
    Case("negative coordinates", _in_pixels),
    Case("threshold 0", _at_zero_threshold),
    Case("threshold 0, none met", _meeting_none),
]


def _with_labels(case):
    def make(g):
        inputs = case.make(g)
        boxes = inputs["gt_boxes"]
        if isinstance(boxes, tuple):
            labels = torch.randint(1, 21, (len(boxes[0]),), generator=g)
        else:
            labels = [torch.randint(1, 21, (len(b),), generator=g) for b in boxes]
        return {**inputs, "gt_labels": labels}

    return dataclasses.replace(case, make=make)


def _best_ious(inputs):
    """Of each prior of each image."""
    corners = reference.matching._corners(inputs["priors"])
    return torch.cat([reference.box_iou(boxes, corners).max(0).values for boxes in inputs["gt_boxes"] if len(boxes)])


def _low_ious(inputs):
    """Those below the default of iou_threshold."""
    ious = _best_ious(inputs)
    return ious[ious < 0.5]


_THRESHOLDS = {"iou_threshold": _best_ious, "low_threshold": _low_ious}


def _call(**changes):
    base = {
        "gt_boxes": [torch.tensor([[0.1, 0.1, 0.5, 0.5]]), torch.tensor([[0.2, 0.2, 0.6, 0.7]])],
        "priors": torch.tensor([[0.5, 0.5, 0.4, 0.4]]),
    }
    return lambda: {**base, **changes}


_ONE = torch.tensor([[0.1, 0.1, 0.5, 0.5]])
_ERRORS = [
    ErrorCase("one tensor", _call(gt_boxes=_ONE), r"list of \[G, 4\] tensors .* got one tensor \[1, 4\]"),
    ErrorCase("a box without a row", _call(gt_boxes=[_ONE, _ONE[0]]), r"gt_boxes\[1\] must be \[G, 4\], got \[4\]"),
    ErrorCase("priors", _call(priors=torch.rand(4)), r"priors must be \[P, 4\], got \[4\]"),
    ErrorCase("dtypes mixed", _call(priors=torch.rand(3, 4).double()), r"dtype of gt_boxes, float32, got float64"),
    ErrorCase("integers", _call(gt_boxes=[_ONE.long()]), r"gt_boxes must be float32.*got int64"),
    ErrorCase("threshold", _call(iou_threshold=1.5), r"iou_threshold must be in \[0, 1\], got 1.5"),
    ErrorCase("threshold NaN", _call(iou_threshold=math.nan), r"iou_threshold must be in \[0, 1\], got -?nan"),
    ErrorCase("low threshold", _call(low_threshold=0.6), r"at most iou_threshold \(0.5\), got 0.6"),
    ErrorCase("force", _call(force="all"), r"force must be one of 'none', 'last', 'bipartite', got 'all'"),
    ErrorCase("offsets fall", _call(gt_boxes=(_ONE, torch.tensor([0, 1, 0]))), r"offsets\[1\] = 1, offsets\[2\] = 0"),
    ErrorCase("offsets run over", _call(gt_boxes=(_ONE, torch.tensor([0, 9]))), r"gt_boxes, 1, got 0 to 9"),
    ErrorCase("offsets from -1", _call(gt_boxes=(_ONE, torch.tensor([-1, 1]))), r"gt_boxes, 1, got -1 to 1"),
    ErrorCase("no offsets", _call(gt_boxes=(_ONE, torch.empty(0, dtype=torch.int64))), r"offsets .* got \[0\]"),
    ErrorCase("int32 offsets", _call(gt_boxes=(_ONE, torch.tensor([0, 1]).int())), r"int64, got int32"),
]
_INVALID = [
    ErrorCase(
        f"validate: {name}",
        _call(gt_boxes=[_ONE, torch.cat([_ONE, torch.tensor([box])])], validate=True),
        rf"got \[{numbers}.*\(image 1, box 1\)",
    )
    for name, box, numbers in [
        ("NaN", [math.nan, 0.0, 1.0, 1.0], "nan, 0"),
        ("Inf", [0.0, 0.0, math.inf, 1.0], "0.0, 0.0, inf"),
        ("no area", [0.5, 0.0, 0.5, 1.0], "0.5, 0.0, 0.5"),
        ("inverted", [0.5, 0.0, 0.25, 1.0], "0.5, 0.0, 0.25"),
    ]
]

MATCH = OpInfo(
    name="match",
    op=ops.match,
    reference=reference.match,
    schema="match",
    cases=[
        *_SMALL,
        Case("SSD300 COCO B=8", lambda g: _drop_labels(_ssd300(8, "coco")(g)), benchmark=True, dtypes=EXACT),
        Case(
            "SSD300 COCO B=32, last",
            lambda g: _drop_labels(_ssd300(32, "coco", force="last")(g)),
            benchmark=True,
            dtypes=EXACT,
        ),
    ],
    errors=[*_ERRORS, *_INVALID],
    agrees=compare.matches_agree,
    thresholds=_THRESHOLDS,
    full_size=lambda g: _drop_labels(_ssd300(2, "coco")(g)),
)


def _drop_labels(inputs):
    return {k: v for k, v in inputs.items() if k != "gt_labels"}


def _labelled(error):
    def make():
        inputs = error.make()
        boxes = inputs["gt_boxes"]
        if isinstance(boxes, list):
            labels = [torch.ones(len(b), dtype=torch.int64) for b in boxes]
        else:
            labels = torch.ones(len(boxes[0]), dtype=torch.int64)
        return {**inputs, "gt_labels": labels}

    return ErrorCase(error.name, make, error.match, error.error)


def _label_call(**changes):
    ones = torch.ones(1, dtype=torch.int64)
    return _call(**{"gt_labels": [ones, ones], **changes})


ASSIGN_TARGETS = OpInfo(
    name="assign_targets",
    op=ops.assign_targets,
    reference=reference.assign_targets,
    schema="assign_targets",
    cases=[
        *map(_with_labels, _SMALL),
        Case("SSD300 COCO B=1, last", _ssd300(1, "coco", force="last"), benchmark=True, dtypes=EXACT),
        Case("SSD300 COCO B=8", _ssd300(8, "coco"), benchmark=True, dtypes=EXACT),
        Case("SSD300 COCO B=32, last", _ssd300(32, "coco", force="last"), benchmark=True, dtypes=EXACT),
        Case(
            "SSD300 synthetic B=32, last",
            _ssd300(32, "synthetic", force="last"),
            benchmark=True,
            quick=True,
            dtypes=EXACT,
        ),
        Case("SSD300 synthetic B=32", _ssd300(32, "synthetic"), benchmark=True, dtypes=EXACT),
        Case("SSD300 60 gts B=32", _crowded(32, 60), benchmark=True, dtypes=EXACT),
    ],
    errors=[
        *map(_labelled, [e for e in _ERRORS if e.name not in ("one tensor", "a box without a row")]),
        ErrorCase("labels missing", _label_call(gt_labels=[torch.ones(1).long()]), r"\[1, 1\] entries .* got \[1\]"),
        ErrorCase("one label tensor", _label_call(gt_labels=torch.ones(2).long()), r"list like gt_boxes.* \[2\]"),
        ErrorCase("float labels", _label_call(gt_labels=[torch.ones(1)] * 2), r"gt_labels must be int64, got float32"),
        ErrorCase(
            "validate: label 0",
            _label_call(gt_labels=[torch.ones(1).long(), torch.zeros(1).long()], validate=True),
            r"1 or more \(0 is background\), got 0 \(image 1, box 0\)",
        ),
        ErrorCase(
            "validate: label too large",
            _label_call(gt_labels=[torch.ones(1).long(), torch.tensor([21])], validate=True, num_classes=21),
            r"in 1\.\.20 \(0 is background\), got 21 \(image 1, box 0\)",
        ),
        ErrorCase("variance", _label_call(variances=(0.1, -0.2)), r"positive and finite, got \(0.1, -0.2\)"),
    ],
    agrees=compare.targets_agree,
    thresholds=_THRESHOLDS,
    scaling=lambda batch: _ssd300(batch, "synthetic")(torch.Generator().manual_seed(batch)),
)

OPS = [MATCH, ASSIGN_TARGETS]
