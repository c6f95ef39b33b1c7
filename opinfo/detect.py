"""detect."""

import math

import torch

from opinfo.compare import detect as compare
from opinfo.inputs import extreme_boxes, random_boxes, ssd300_priors
from opinfo.spec import EXACT, FLOATS, HALVES, Case, ErrorCase, OpInfo
from ssd_ext import ops, priors, reference

PIXELS = 300.0
SSD300 = {"window": (0.0, 0.0, PIXELS, PIXELS)}


def _priors(n, g):
    return torch.cat([torch.rand(n, 2, generator=g), 0.05 + 0.4 * torch.rand(n, 2, generator=g)], 1)


def _random(batch, n, classes, g, background=3.0, spread=2.0):
    """Noise; the higher ``background``, the fewer candidates."""
    logits = torch.randn(batch, n, classes, generator=g) * spread
    logits[..., :1] += background
    return {"deltas": torch.randn(batch, n, 4, generator=g), "logits": logits, "priors": _priors(n, g)}


def _case(name, batch, n, classes, background=3.0, dtypes=EXACT, peers=False, change=lambda inputs: None, **arguments):
    def make(g):
        inputs = _random(batch, n, classes, g, background)
        change(inputs)
        return {**inputs, **arguments}

    return Case(name, make, dtypes=dtypes, peers=peers)


def _trained(batch, classes, g, boxes=None):
    """Outputs of a trained detector in pixels: about eight objects an image, about 300 candidates above 0.01."""
    boxes = ssd300_priors() * PIXELS if boxes is None else boxes
    n = len(boxes)
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    logits = torch.randn(batch, n, classes, generator=g) * 0.7
    logits[..., 0] += 8
    deltas = torch.randn(batch, n, 4, generator=g) * 0.5
    for b in range(batch):
        objects = random_boxes(8, g, low=0.08) * PIXELS
        labels = torch.randint(1, classes, (8,), generator=g)
        iou, nearest = reference.box_iou(corners, objects).max(1)
        near = (iou > 0.35).nonzero().flatten()
        noise = torch.randn(len(near), generator=g)
        logits[b, near, labels[nearest[near]]] += 12 * iou[near] + noise - 3.0
        logits[b, near, 0] -= 3 * iou[near]
        target = reference.encode(objects[nearest[near]], boxes[near])
        deltas[b, near] = target + torch.randn(len(near), 4, generator=g) * 0.4
    return {"deltas": deltas, "logits": logits, "priors": boxes, **SSD300}


def _untrained(batch, classes, g):
    """Every class of every prior has about the same score."""
    boxes = ssd300_priors() * PIXELS
    logits = torch.randn(batch, len(boxes), classes, generator=g) * 0.05
    return {"deltas": torch.randn(batch, len(boxes), 4, generator=g) * 0.5, "logits": logits, "priors": boxes, **SSD300}


def _large(name, make, quick=False):
    return Case(name, make, benchmark=True, quick=quick, dtypes=EXACT)


def _ssd512(g):
    return _trained(1, 81, g, priors.SSD512_COCO.priors() * PIXELS)


# ---- hostile outputs: each changes what _random made -------------------------------------------


def _nan_and_infinite_logits(inputs):
    logits = inputs["logits"]
    logits[0, 3] = math.nan
    logits[0, 5, 1], logits[0, 6, 2], logits[0, 7, 0] = math.nan, math.inf, math.inf
    logits[1, 3] = -math.inf
    logits[1, 4, 1:], logits[1, 5, 0], logits[1, 6, 2:] = -math.inf, -math.inf, math.inf
    logits[1, 7] *= 1e30
    logits[1, 8::2, ::3] = math.nan


def _wild_deltas(inputs):
    deltas = inputs["deltas"]
    deltas[0, ::3], deltas[0, 1::3], deltas[1, ::2, 2:] = 500, -500, 500
    deltas[1, 1::4], deltas[1, 2, 0], deltas[1, 4, 3], deltas[1, 6, 2] = math.nan, math.inf, -math.inf, math.inf


def _equal_scores(inputs):
    inputs["logits"][:] = 0.5


def _equal_boxes(inputs):
    inputs["deltas"][:] = 0
    inputs["priors"][:] = torch.tensor([0.5, 0.5, 0.2, 0.2])


def _all_equal(inputs):
    _equal_scores(inputs)
    _equal_boxes(inputs)


def _one_class_leads(inputs):
    """Most candidates are of one class and overlap: far more must be seen than are kept."""
    _equal_boxes(inputs)
    inputs["logits"][..., 1] += 3
    inputs["priors"][::5, 0] += torch.arange(len(inputs["priors"][::5])) % 10


def _one_class_alone(inputs):
    """More candidates of it than are to be looked at, and no other."""
    inputs["logits"][..., 1] += 8


def _first_image_untrained(inputs):
    inputs["logits"][0] = 0
    inputs["logits"][0, :, 1] = inputs["logits"][1, :, 1] / 10


def _tied_scores(inputs):
    inputs["logits"].copy_(inputs["logits"].round())


def _negative(inputs):
    inputs["priors"][:, :2] -= 3


def _strange_priors(inputs):
    p = inputs["priors"]
    p[0], p[1, 2], p[2, 2:], p[3, 0] = math.nan, math.inf, 0, -math.inf
    p[4, 2:] *= -1


def _extreme(g):
    boxes = extreme_boxes()
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    inputs = _random(2, len(boxes), 4, g, background=0.0)
    inputs["priors"] = torch.cat([centres, boxes[:, 2:] - boxes[:, :2]], 1)
    inputs["deltas"] *= 0.1
    return inputs


def _pixels(inputs):
    inputs["priors"] *= 1333


def _by_class(inputs):
    inputs["logits"] = inputs["logits"].mT.contiguous().mT


def _strided(inputs):
    inputs["logits"] = inputs["logits"].repeat_interleave(2, 0)[::2].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["deltas"] = inputs["deltas"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    inputs["priors"] = inputs["priors"].mT.contiguous().mT


def _expanded(inputs):
    inputs["deltas"] = inputs["deltas"][:1, :1].expand_as(inputs["deltas"])
    inputs["logits"] = inputs["logits"][:1].expand_as(inputs["logits"])


# The kernels for few and for many rows, which read logits in their own dtype, in all that are computed in float64.
_WITH_FLOAT64 = ({"priors": torch.float64}, *({"logits": dtype, "deltas": torch.float64} for dtype in HALVES))
_MIXES = (
    *({"deltas": dtype, "logits": dtype} for dtype in HALVES),  # a network in half precision, priors in float32
    {"deltas": torch.float16, "logits": torch.bfloat16, "priors": torch.float16},
    {"logits": torch.bfloat16},
    {"logits": torch.float64, "priors": torch.float16},
    *_WITH_FLOAT64,
)
_EVERY_CLASS = {"class_agnostic": True, "score_threshold": 0.001}
_WANT_ALL = {"iou_threshold": 0.9, "max_detections": 1000}
_UNIT = {"window": (0.0, 0.0, 1.0, 1.0)}
_SMALL = [
    _case("B=2 P=60 C=5", 2, 60, 5, 6.0, dtypes=FLOATS, peers=True, **_UNIT),
    _case("sigmoid, logits [B, C, P]", 2, 75, 3, -3.0, change=_by_class, activation="sigmoid", score_threshold=0.5),
    _case("not clipped", 3, 100, 21, dtypes=FLOATS),
    _case("vectors and a rest", 2, 130, 37, background=4.0, peers=True, **_UNIT),
    _case("C=2", 2, 80, 2, 0.0, dtypes=FLOATS),
    _case("C=1, background alone", 2, 9, 1, 0.0),
    _case("C=0", 2, 9, 0, 0.0),
    _case("C=1000", 2, 24, 1000, 6.0, peers=True, **_UNIT),
    _case("P=1", 3, 1, 6, 0.0),
    _case("P=0", 2, 0, 6),
    _case("B=0", 0, 20, 6),
    _case("B=19, 17,000 rows", 19, 901, 3, 8.0, dtypes=(torch.float32, *_WITH_FLOAT64)),
    _case("dtypes mixed", 2, 60, 5, 6.0, dtypes=_MIXES, **_UNIT),
    _case("dtypes mixed, untrained", 1, 300, 17, 0.0, dtypes=_MIXES[:2], topk_per_class=60, max_detections=50),
    # Its edges are no halves: 777 and 1333 are 776 and 1336 in bfloat16.
    _case("halves, clipped", 2, 60, 5, 3.0, dtypes=FLOATS, change=_pixels, window=(0.3, 1.7, 1333.0, 777.0)),
    # More priors than the GPU keeps scores of in shared memory, and more candidates than its lists hold.
    _case("P=24564", 1, 24564, 3, 8.0, dtypes=(torch.float32,), topk_per_class=20),
    _case("no candidate", 2, 60, 5, 30.0, dtypes=FLOATS),
    _case("more wanted than there are", 2, 30, 4, 1.0, max_detections=5000),
    _case("few wanted", 2, 90, 8, 0.0, max_detections=3),
    _case("few of each class", 2, 90, 8, 0.0, topk_per_class=4),
    _case("few of each class, ties at the cut", 2, 90, 8, 0.0, change=_tied_scores, topk_per_class=7),
    _case("one class alone", 2, 60, 9, change=_one_class_alone, topk_per_class=12, iou_threshold=0.9),
    # More than the GPU visits together: of what is kept little and much, class by class and all classes together.
    _case("one class alone, 900 of it", 1, 900, 21, change=_one_class_alone, topk_per_class=600, **_WANT_ALL),
    _case("the same, few kept", 1, 900, 21, change=_one_class_alone, topk_per_class=800, iou_threshold=0.0),
    _case("the same, class-agnostic", 1, 400, 6, 2.0, topk_per_class=284, class_agnostic=True, **_WANT_ALL),
    _case("all scores equal", 2, 60, 12, change=_equal_scores, topk_per_class=30, max_detections=100),
    _case("all boxes equal", 2, 60, 7, 0.0, change=_equal_boxes),
    # More candidates than the first pass of the CPU keeps, and than a list of the GPU holds.
    _case("untrained", 1, 300, 17, 0.0, score_threshold=0.001, topk_per_class=60, max_detections=50),
    _case("untrained in one image", 3, 300, 17, 9.0, change=_first_image_untrained, topk_per_class=20),
    _case("untrained, B=16", 16, 3, 20, 0.0, dtypes=(torch.float32,), score_threshold=0.0, topk_per_class=1),
    _case("untrained, sigmoid", 2, 300, 9, 0.0, activation="sigmoid", score_threshold=0.1, topk_per_class=30),
    _case("untrained, all boxes equal", 1, 1000, 8, 0.0, change=_equal_boxes, topk_per_class=50),
    _case("untrained, all equal", 1, 700, 8, change=_all_equal, topk_per_class=50),
    _case("one class leads", 1, 1400, 6, 0.0, change=_one_class_leads, topk_per_class=50, max_detections=100),
    _case("untrained, class-agnostic", 1, 300, 17, 0.0, topk_per_class=60, iou_threshold=0.1, **_EVERY_CLASS),
    _case("class-agnostic", 2, 100, 9, class_agnostic=True, dtypes=FLOATS),
    _case("class-agnostic, ties", 2, 100, 9, 1.0, change=_tied_scores, class_agnostic=True, topk_per_class=9),
    _case("sigmoid", 2, 80, 6, -3.0, activation="sigmoid", score_threshold=0.4, dtypes=FLOATS),
    _case("sigmoid, high threshold", 2, 80, 6, 5.0, activation="sigmoid", score_threshold=0.999),
    _case("sigmoid C=1", 2, 80, 1, 0.0, activation="sigmoid", score_threshold=0.3),
    _case("sigmoid, NaN and Inf", 2, 40, 21, -3.0, change=_nan_and_infinite_logits, activation="sigmoid"),
    _case("score threshold 0", 2, 30, 5, 0.0, score_threshold=0.0),
    _case("many classes of each prior", 1, 14, 150, 0.0, score_threshold=0.002),
    _case("score threshold 1", 2, 30, 5, score_threshold=1.0),
    _case("IoU threshold 0", 2, 60, 5, 1.0, iou_threshold=0.0),
    _case("IoU threshold 1", 2, 60, 5, 1.0, iou_threshold=1.0),
    _case("NaN and Inf logits", 2, 40, 5, 1.0, change=_nan_and_infinite_logits, dtypes=(torch.float32,)),
    _case("deltas of 500, NaN and Inf", 2, 60, 5, 1.0, change=_wild_deltas),
    _case("the same, clipped", 2, 60, 5, 1.0, change=_wild_deltas, **_UNIT),
    _case(
        "the same, sizes not bounded", 2, 60, 5, change=_wild_deltas, bbox_xform_clip=math.inf, dtypes=(torch.float64,)
    ),
    _case("NaN, infinite and negative priors", 2, 60, 5, 1.0, change=_strange_priors),
    _case("negative coordinates", 2, 80, 5, 2.0, change=_negative),
    Case("extreme", _extreme, dtypes=(torch.float32,), oracle=torch.float32, peers=False),
    _case("other variances", 2, 80, 5, 2.0, variances=(1.0, 0.5)),
    _case("logits [B, C, P]", 2, 100, 21, change=_by_class, dtypes=FLOATS, peers=True, **_UNIT),
    _case("strided", 2, 60, 9, change=_strided, dtypes=FLOATS),
    _case("expanded", 3, 60, 9, change=_expanded),
]
_LARGE = [
    _large("trained, C=81 B=1", lambda g: _trained(1, 81, g)),
    _large("trained, C=81 B=8", lambda g: _trained(8, 81, g), quick=True),
    _large("trained, C=81 B=32", lambda g: _trained(32, 81, g)),
    _large("trained, C=21 B=8", lambda g: _trained(8, 21, g)),
    _large("trained, SSD512, C=81 B=1", _ssd512),
    _large("untrained, C=81 B=1", lambda g: _untrained(1, 81, g)),
    _large("untrained, C=81 B=8", lambda g: _untrained(8, 81, g)),
]


# ---- wrong calls -------------------------------------------------------------------------------


def _call(**changes):
    base = {"deltas": torch.rand(2, 3, 4), "logits": torch.rand(2, 3, 5), "priors": torch.rand(3, 4)}
    return lambda: {**base, **changes}


def _huge():
    size = 2**30
    one = torch.zeros(1, 1, 1)
    return {
        "deltas": one.expand(1, size, 4),
        "logits": one.expand(1, size, 3),
        "priors": one[0].expand(size, 4),
    }


DETECT = OpInfo(
    name="detect",
    op=ops.detect,
    reference=reference.detect,
    schema="detect",
    cases=[*_SMALL, *_LARGE],
    errors=[
        ErrorCase("priors", _call(priors=torch.rand(3, 5)), r"priors must be \[P, 4\], got \[3, 5\]"),
        ErrorCase("P of logits", _call(logits=torch.rand(2, 4, 5)), r"logits must be .* P = 3, .* got \[2, 4, 5\]"),
        ErrorCase("one image", _call(logits=torch.rand(3, 5)), r"logits must be \[B, P, C\].* got \[3, 5\]"),
        ErrorCase("B of deltas", _call(deltas=torch.rand(1, 3, 4)), r"B = 2 and P = 3, got \[1, 3, 4\]"),
        ErrorCase("deltas", _call(deltas=torch.rand(2, 3, 5)), r"deltas must be \[B, P, 4\].* got \[2, 3, 5\]"),
        ErrorCase("integers", _call(deltas=torch.ones(2, 3, 4).long()), r"deltas must be float32.* got int64"),
        ErrorCase("logits of integers", _call(logits=torch.ones(2, 3, 5).int()), r"logits must be float32.* got int32"),
        ErrorCase("priors of bools", _call(priors=torch.ones(3, 4) > 0), r"priors must be float32.* got bool"),
        ErrorCase("too many logits", _huge, r"at most 2147479551 elements an image, got \[1, 1073741824, 3\]"),
        ErrorCase("score threshold", _call(score_threshold=-0.1), r"score_threshold must be in \[0, 1\], got -0.1"),
        ErrorCase("score threshold NaN", _call(score_threshold=math.nan), r"score_threshold must be in \[0, 1\]"),
        ErrorCase("IoU threshold", _call(iou_threshold=1.5), r"iou_threshold must be in \[0, 1\], got 1.5"),
        ErrorCase("top k", _call(topk_per_class=0), r"topk_per_class must be at least 1, got 0"),
        ErrorCase("detections", _call(max_detections=0), r"max_detections must be at least 1, got 0"),
        ErrorCase("activation", _call(activation="relu"), r"must be 'softmax' or 'sigmoid', got 'relu'"),
        ErrorCase("variances", _call(variances=(0.1, 0.0)), r"variances must be positive.* got \(0.1, 0\)"),
        ErrorCase("bbox_xform_clip", _call(bbox_xform_clip=math.nan), r"bbox_xform_clip must be a number, got nan"),
        ErrorCase("window", _call(window=(0, 0, 1)), r"window must be \(x1, y1, x2, y2\), got 3 values"),
        ErrorCase("window inverted", _call(window=(0, 2, 1, 1)), r"x1 <= x2 and y1 <= y2, got \(0, 2, 1, 1\)"),
        ErrorCase("window NaN", _call(window=(0, 0, 1, math.nan)), r"x1 <= x2 and y1 <= y2, got \(0, 0, 1, nan\)"),
    ],
    agrees=compare.agrees,
    full_size=lambda g: _trained(1, 21, g),
    scaling=lambda batch: _trained(batch, 81, torch.Generator().manual_seed(batch)),
)

OPS = [DETECT]
