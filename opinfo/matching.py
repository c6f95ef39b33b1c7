"""match, assign_targets."""

import dataclasses
import math

import torch

from opinfo.compare import matching as compare
from opinfo.inputs import coco_gts, extreme_boxes, random_boxes, ssd300_priors, synthetic_gts
from opinfo.spec import EXACT, Case, ErrorCase, OpInfo
from ssd_ext import GroundTruth, ops, reference


def _priors(n, g):
    return torch.cat([torch.rand(n, 2, generator=g), 0.05 + 0.6 * torch.rand(n, 2, generator=g)], 1)


def _inputs(boxes, priors, **more):
    """``boxes`` of each image; labels are made by :func:`_with_labels`."""
    return {"ground_truth": GroundTruth.from_lists(boxes), "priors": priors, **more}


def _case(name, counts, num_priors, more=None, **kwargs):
    """Random ground truth, ``counts`` boxes in each image."""

    def make(g):
        boxes = [random_boxes(n, g, 0.05, 0.6) for n in counts]
        return _inputs(boxes, _priors(num_priors, g), **(more or {}))

    return Case(name, make, **kwargs)


def _hostile(g):
    """Bad ground truth of every kind among good ones; an image with bad ones alone."""
    boxes = random_boxes(10, g, 0.1, 0.6)
    boxes[0, 0], boxes[2, 1], boxes[3, 2], boxes[4, 0] = math.nan, math.nan, math.inf, -math.inf
    boxes[5, 2] = boxes[5, 0]  # no width
    boxes[6] = boxes[6, [2, 1, 0, 3]]  # inverted
    boxes[7] = boxes[7, [2, 3, 0, 1]]  # inverted twice: a positive product of sides
    return _inputs([boxes, boxes[2:8], boxes[8:]], _priors(50, g))


def _copies(count, num_priors, g):
    """Equal ground truths: all but one lose the prior that they want, again and again."""
    return _inputs([random_boxes(1, g, 0.2, 0.6).repeat(count, 1)], _priors(num_priors, g))


def _crowd(count, num_priors, g, **more):
    """Nearly equal ground truths, and one that meets no prior."""
    boxes = random_boxes(1, g, 0.2, 0.6) + 0.01 * torch.rand(count, 4, generator=g)
    return _inputs([torch.cat([boxes, boxes[:1] + 5])], _priors(num_priors, g), **more)


def _one_image(boxes, every=1):
    return lambda g: {"ground_truth": GroundTruth.from_lists([boxes(g)]), "priors": ssd300_priors()[::every]}


def _equal(g):
    return random_boxes(1, g, 0.2, 0.6).repeat(300, 1)


def _near(g):
    return random_boxes(1, g, 0.2, 0.6) + 0.01 * torch.rand(1000, 4, generator=g)


def _cells(g):
    """10,000 that divide the image evenly."""
    at = torch.cartesian_prod(torch.arange(100), torch.arange(100)).flip(1) / 100
    return torch.cat([at, at + 0.01], 1)


def _bad_priors(g):
    """Priors of every kind of bad number among good ones, also as the first and the last of a warp and of all."""
    priors = _priors(600, g)
    bad = torch.tensor([math.nan, math.inf, -math.inf, -1.0, 0.0])
    for at, value in zip((0, 63, 64, 100, 599), bad, strict=True):
        priors[at, at % 4] = value
    priors[128:192] = math.nan
    return _inputs([random_boxes(6, g, 0.1, 0.6), random_boxes(3, g, 0.1, 0.6)], priors)


def _one_best_prior(g):
    """Two ground truths with one best prior; the second is closer to it."""
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]])
    return _inputs([torch.tensor([[0.3, 0.3, 0.6, 0.6], [0.3, 0.3, 0.7, 0.7]])], priors)


def _exactly_at_threshold(g):
    """IoU exactly 1/2 and exactly 1/4, in numbers that every dtype holds."""
    priors = torch.tensor([[1.0, 1.0, 2.0, 2.0], [6.0, 1.0, 4.0, 2.0], [20.0, 20.0, 2.0, 2.0]])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0], [4.0, 0.0, 5.0, 2.0]])
    return _inputs([boxes], priors, low_threshold=0.25, force="none")


def _in_pixels(g):
    """Negative coordinates and priors over the edge, in pixels."""
    boxes = [random_boxes(5, g, 0.3, 0.8) * 300 - 100, random_boxes(2, g) * 300 - 400]
    return _inputs(boxes, _priors(64, g) * 300 - 100)


def _at_zero_threshold(g):
    return _inputs([random_boxes(3, g), torch.empty(0, 4)], _priors(20, g), iou_threshold=0.0)


def _meeting_none(g):
    """At threshold 0, priors that meet none of many ground truths belong to the first."""
    boxes = random_boxes(70, g, high=0.1) + 2
    return _inputs([boxes], _priors(20, g), iou_threshold=0.0, force="none")


def _padding(g):
    """Rows that belong to no image, with bad boxes among them."""
    inputs = _inputs([random_boxes(n, g) for n in (3, 0, 5, 1)], _priors(70, g))
    boxes, labels, offsets = inputs["ground_truth"]
    padding = torch.cat([random_boxes(3, g), torch.full((1, 4), math.nan)])
    labels = torch.cat([labels, torch.tensor([7, -5, 0, 2**40])])
    return {**inputs, "ground_truth": GroundTruth(torch.cat([boxes, padding]), labels, offsets)}


def _extreme(g):
    """Ground truth and priors of the same boxes in two orders, of which only those in float32's range match."""
    boxes = extreme_boxes()
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return _inputs([boxes, boxes.flip(0)[:9]], torch.cat([centres, boxes[:, 2:] - boxes[:, :2]], 1), force="none")


def _ssd300(batch, kind, **more):
    def make(g):
        boxes, labels = coco_gts(batch) if kind == "coco" else synthetic_gts(batch, g)
        return {"ground_truth": GroundTruth.from_lists(boxes, labels), "priors": ssd300_priors(), **more}

    return make


def _crowded(batch, count):
    def make(g):
        boxes = [random_boxes(count, g) for _ in range(batch)]
        labels = [torch.randint(1, 81, (count,), generator=g) for _ in range(batch)]
        return {"ground_truth": GroundTruth.from_lists(boxes, labels), "priors": ssd300_priors()}

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
    Case("padding", _padding),
    Case("hostile ground truth", _hostile),
    Case("equal ground truths, more than priors", lambda g: _copies(40, 30, g)),
    Case("equal ground truths, many priors", lambda g: _copies(12, 1100, g)),
    Case("a crowd within a hundredth", lambda g: _crowd(40, 60, g)),
    Case("a crowd, with priors for all of it", lambda g: _crowd(40, 1100, g, min_force_iou=None)),
    Case("a crowd, above an IoU", lambda g: _crowd(40, 300, g, min_force_iou=0.2)),
    Case("last, above an IoU", lambda g: _crowd(40, 300, g, min_force_iou=0.2, force="last"), peers=False),
    Case("bad priors", _bad_priors),
    Case("one best prior", _one_best_prior),
    Case("one best prior, last", lambda g: {**_one_best_prior(g), "force": "last"}),
    Case("exactly at the thresholds", _exactly_at_threshold),
    Case("negative coordinates", _in_pixels),
    Case("extreme", _extreme, dtypes=(torch.float32,), oracle=torch.float32),
    Case("extreme, last", lambda g: {**_extreme(g), "force": "last"}, dtypes=(torch.float32,), oracle=torch.float32),
    Case("threshold 0", _at_zero_threshold),
    Case("threshold 0, none met", _meeting_none),
]


def _with_labels(case):
    def make(g):
        inputs = case.make(g)
        given = inputs["ground_truth"]
        labels = torch.randint(1, 21, given.labels.shape, generator=g)
        return {**inputs, "ground_truth": given._replace(labels=labels)}

    return dataclasses.replace(case, make=make)


def _best_ious(inputs):
    """Of each prior of each image."""
    corners = reference.matching._corners(inputs["priors"])
    images = [target["boxes"] for target in inputs["ground_truth"].to_targets()]
    return torch.cat([reference.box_iou(boxes, corners).max(0).values for boxes in images if len(boxes)])


def _low_ious(inputs):
    """Those below the default of iou_threshold."""
    ious = _best_ious(inputs)
    return ious[ious < 0.5]


_THRESHOLDS = {"iou_threshold": _best_ious, "low_threshold": _low_ious}


_ONE = torch.tensor([[0.1, 0.1, 0.5, 0.5]])


def _call(boxes=None, labels=None, offsets=None, **changes):
    """Two images of one object each; parts of the ground truth, or other arguments, are replaced."""
    given = GroundTruth.from_lists([_ONE, torch.tensor([[0.2, 0.2, 0.6, 0.7]])])
    parts = {"boxes": boxes, "labels": labels, "offsets": offsets}
    given = given._replace(**{name: value for name, value in parts.items() if value is not None})
    return lambda: {"ground_truth": given, "priors": torch.tensor([[0.5, 0.5, 0.4, 0.4]]), **changes}


_TWO = torch.cat([_ONE, _ONE])
_ERRORS = [
    ErrorCase("one tensor", _call(ground_truth=_ONE), r"a GroundTruth or a list of dicts .* got a Tensor"),
    ErrorCase("a list of tensors", _call(ground_truth=[_ONE]), r"GroundTruth.from_lists.* got a list of tensors"),
    ErrorCase("no labels", _call(ground_truth=[{"boxes": _ONE}]), r"targets\[0\] .* boxes and labels, got \['boxes'\]"),
    ErrorCase("boxes", _call(boxes=torch.rand(2, 5)), r"ground_truth.boxes must be \[G, 4\], got \[2, 5\]"),
    ErrorCase("priors", _call(priors=torch.rand(4)), r"priors must be \[P, 4\], got \[4\]"),
    ErrorCase("dtypes mixed", _call(priors=torch.rand(3, 4).double()), r"of ground_truth.boxes, float32, got float64"),
    ErrorCase("integers", _call(boxes=_TWO.long()), r"ground_truth.boxes must be float32.*got int64"),
    ErrorCase("threshold", _call(iou_threshold=1.5), r"iou_threshold must be in \[0, 1\], got 1.5"),
    ErrorCase("threshold NaN", _call(iou_threshold=math.nan), r"iou_threshold must be in \[0, 1\], got -?nan"),
    ErrorCase("low threshold", _call(low_threshold=0.6), r"at most iou_threshold \(0.5\), got 0.6"),
    ErrorCase("min_force_iou", _call(min_force_iou=-0.1), r"min_force_iou must be in \[0, 1\], got -0.1"),
    ErrorCase("min_force_iou NaN", _call(min_force_iou=math.nan), r"min_force_iou must be in \[0, 1\], got -?nan"),
    ErrorCase("force", _call(force="all"), r"force must be one of 'none', 'last', 'bipartite', got 'all'"),
    ErrorCase("offsets fall", _call(offsets=torch.tensor([0, 1, 0])), r"offsets\[1\] = 1, offsets\[2\] = 0"),
    ErrorCase("offsets run over", _call(offsets=torch.tensor([0, 9])), r"number of boxes, 2, got 0 to 9"),
    ErrorCase("offsets from -1", _call(offsets=torch.tensor([-1, 1])), r"begin with 0 .* got -1 to 1"),
    ErrorCase("no offsets", _call(offsets=torch.empty(0, dtype=torch.int64)), r"offsets .* got \[0\]"),
    ErrorCase("int32 offsets", _call(offsets=torch.tensor([0, 1]).int()), r"int64, got int32"),
]
_INVALID = [
    ErrorCase(
        f"validate: {name}",
        lambda box=box: _call(ground_truth=GroundTruth.from_lists([_ONE, torch.cat([_ONE, box])]), validate=True)(),
        rf"got \[{numbers}.*\(image 1, box 1\)",
    )
    for name, box, numbers in [
        ("NaN", torch.tensor([[math.nan, 0.0, 1.0, 1.0]]), "nan, 0"),
        ("Inf", torch.tensor([[0.0, 0.0, math.inf, 1.0]]), "0.0, 0.0, inf"),
        ("no area", torch.tensor([[0.5, 0.0, 0.5, 1.0]]), "0.5, 0.0, 0.5"),
        ("inverted", torch.tensor([[0.5, 0.0, 0.25, 1.0]]), "0.5, 0.0, 0.25"),
        ("inverted twice", torch.tensor([[0.5, 0.5, 0.25, 0.25]]), "0.5, 0.5, 0.25"),
    ]
]

MATCH = OpInfo(
    name="match",
    op=ops.match,
    reference=reference.match,
    schema="match",
    cases=[
        *_SMALL,
        Case("SSD300 COCO B=8", _ssd300(8, "coco"), benchmark=True, dtypes=EXACT),
        Case(
            "SSD300 COCO B=32, last",
            _ssd300(32, "coco", force="last"),
            benchmark=True,
            dtypes=EXACT,
        ),
        Case("SSD300 300 equal boxes", _one_image(_equal), benchmark=True, dtypes=(torch.float32,)),
        Case("SSD300 1,000 boxes within 0.01", _one_image(_near), benchmark=True, dtypes=(torch.float32,)),
        # With all priors the reference would take a minute.
        Case("SSD300/4 10,000 equal cells", _one_image(_cells, every=4), benchmark=True, dtypes=(torch.float32,)),
    ],
    errors=[*_ERRORS, *_INVALID],
    agrees=compare.matches_agree,
    thresholds=_THRESHOLDS,
    full_size=_ssd300(2, "coco"),
)


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
        *_ERRORS,
        ErrorCase("labels missing", _call(labels=torch.ones(1).long()), r"ground_truth.labels must be .* got \[1\]"),
        ErrorCase("float labels", _call(labels=torch.ones(2)), r"ground_truth.labels must be int64, got float32"),
        ErrorCase(
            "validate: label 0",
            _call(labels=torch.tensor([1, 0]), validate=True),
            r"1 or more \(0 is background, -1 a region to ignore\), got 0 \(image 1, box 0\)",
        ),
        ErrorCase(
            "validate: label too large",
            _call(labels=torch.tensor([1, 21]), validate=True, num_classes=21),
            r"in 1\.\.20 \(0 is background, -1 a region to ignore\), got 21 \(image 1, box 0\)",
        ),
        ErrorCase(
            "validate: label -2", _call(labels=torch.tensor([-2, 1]), validate=True), r"got -2 \(image 0, box 0\)"
        ),
        ErrorCase("variance", _call(variances=(0.1, -0.2)), r"positive and finite, got \(0.1, -0.2\)"),
    ],
    agrees=compare.targets_agree,
    thresholds=_THRESHOLDS,
    scaling=lambda batch: _ssd300(batch, "synthetic")(torch.Generator().manual_seed(batch)),
)

OPS = [MATCH, ASSIGN_TARGETS]
