"""detect."""

import functools
import math
from types import SimpleNamespace

import torch

from benchmarks.cases.inputs import random_boxes, ssd300_priors
from benchmarks.cases.spec import EXACT, FLOATS, Case, ErrorCase, Inputs, MissingPeerError, Op, close, convert
from ssd_ext import ops, priors, reference

PIXELS = 300.0
SSD300 = {"window": (0.0, 0.0, PIXELS, PIXELS)}
# How near to a threshold a score (relative) and an IoU may fall on its other side. Float32: torchvision
# shifts each class's boxes away from the others', up to 80 image widths, and loses those bits.
SCORE_MARGIN = {torch.float32: 1e-5, torch.float64: 1e-12}
IOU_MARGIN = {torch.float32: 1e-4, torch.float64: 1e-10}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}


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
    return _trained(1, 81, g, priors.SSD512_COCO.boxes() * PIXELS)


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


def _by_class(inputs):
    inputs["logits"] = inputs["logits"].mT.contiguous().mT


def _strided(inputs):
    inputs["logits"] = inputs["logits"].repeat_interleave(2, 0)[::2].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["deltas"] = inputs["deltas"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    inputs["priors"] = inputs["priors"].mT.contiguous().mT


def _expanded(inputs):
    inputs["deltas"] = inputs["deltas"][:1, :1].expand_as(inputs["deltas"])
    inputs["logits"] = inputs["logits"][:1].expand_as(inputs["logits"])


_EVERY_CLASS = {"class_agnostic": True, "score_threshold": 0.001}
_WANT_ALL = {"iou_threshold": 0.9, "max_detections": 1000}
_UNIT = {"window": (0.0, 0.0, 1.0, 1.0)}
_SMALL = [
    _case("B=2 P=60 C=5", 2, 60, 5, dtypes=FLOATS, peers=True, **_UNIT),
    _case("not clipped", 3, 100, 21, dtypes=FLOATS),
    _case("vectors and a rest", 2, 130, 37, background=4.0, peers=True, **_UNIT),
    _case("C=2", 2, 80, 2, 0.0, dtypes=FLOATS),
    _case("C=1, background alone", 2, 9, 1, 0.0),
    _case("C=0", 2, 9, 0, 0.0),
    _case("C=1000", 2, 24, 1000, 6.0, peers=True, **_UNIT),
    _case("P=1", 3, 1, 6, 0.0),
    _case("P=0", 2, 0, 6),
    _case("B=0", 0, 20, 6),
    _case("B=19, 17,000 rows", 19, 901, 3, 8.0, dtypes=(torch.float32,)),
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
    _case("the same, sizes not bounded", 2, 60, 5, change=_wild_deltas, clip=math.inf, dtypes=(torch.float64,)),
    _case("NaN, infinite and negative priors", 2, 60, 5, 1.0, change=_strange_priors),
    _case("negative coordinates", 2, 80, 5, 2.0, change=_negative),
    _case("other variances", 2, 80, 5, 2.0, variances=(1.0, 0.5)),
    _case("logits [B, C, P]", 2, 100, 21, change=_by_class, dtypes=FLOATS, peers=True, **_UNIT),
    _case("sigmoid, logits [B, C, P]", 2, 75, 3, -3.0, change=_by_class, activation="sigmoid", score_threshold=0.5),
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


# ---- comparison --------------------------------------------------------------------------------


def _agrees(inputs, result, expected):
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


def _unexplained(inputs, result):
    given = _arguments(**inputs)
    margins = SCORE_MARGIN[result[0].dtype], IOU_MARGIN[result[0].dtype]
    tolerance = TOLERANCE[result[0].dtype]
    wide = convert(inputs, torch.float64)
    logits = wide["logits"]
    all_scores = logits.softmax(-1) if given.activation == "softmax" else logits.sigmoid()
    if given.activation == "softmax":
        all_scores[..., :1] = -1
    all_boxes = reference.decode(wide["deltas"], wide["priors"], given.variances, given.clip)
    if given.window:
        low, high = all_boxes.new_tensor(given.window).view(2, 2)
        all_boxes = all_boxes.unflatten(-1, (2, 2)).clamp(low, high).flatten(-2)
    for b, n in enumerate(result[3].tolist()):
        image = [t[b, :n] for t in result[:3]]
        wrong = _image_unexplained(given, margins, tolerance, all_scores[b].nan_to_num(-1), all_boxes[b], *image)
        if wrong:
            return f"image {b}: {wrong}"
    return None


def _image_unexplained(given, margins, tolerance, scores64, boxes64, boxes, scores, labels):
    near, iou_margin = margins
    n = len(labels)
    # Which prior each detection is of: the lowest that fits and is not taken.
    taken = torch.zeros_like(scores64, dtype=torch.bool)
    found = []
    for k in range(n):
        box, score, label = boxes[k].double(), scores[k].double(), labels[k]
        off = (boxes64 - box).abs() / boxes64.abs().clamp(min=1)
        off = torch.where((boxes64 == box) | (boxes64.isnan() & box.isnan()), 0, off).amax(1)
        far = (scores64[:, label] - score).abs() / score
        fits = (~(off > tolerance) & (far <= near) & ~taken[:, label]).nonzero().flatten()
        if len(fits) == 0:
            return f"detection {k} is of no prior: box {boxes[k].tolist()}, score {score}, label {label}"
        taken[fits[0], label] = True
        found.append(fits[0])
    prior = torch.stack(found) if found else labels
    score = scores64[prior, labels]
    if bool((scores[1:] > scores[:-1]).any()):
        return "scores rise"
    rank = torch.stack([labels, prior], 1).tolist()
    for k in range(1, n):
        if scores[k] == scores[k - 1] and rank[k] < rank[k - 1]:
            return f"detections {k - 1} and {k} tie in the wrong order: (label, prior) {rank[k - 1]}, {rank[k]}"
    if bool((score <= given.score_threshold * (1 - near)).any()):
        return "a score is not above the threshold"

    ordered = scores64.sort(0).values.T.contiguous()  # [C, P]

    def better(c, s):
        """How many priors have a score above s[i] in class c[i]."""
        return len(scores64) - torch.searchsorted(ordered[c], s[:, None], right=True).flatten()

    if n and bool((better(labels, score * (1 + near)) >= given.topk_per_class).any()):
        return "a detection is not among the best of its class"
    rivals = torch.ones(n, n, dtype=torch.bool) if given.class_agnostic else labels[:, None] == labels
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
            by &= c[part, None] == labels
        missing = (among & ~by.any(1)).nonzero().flatten()
        if len(missing):
            i = start + int(missing[0])
            return f"prior {int(q[i])} of class {int(c[i])}, score {s[i]:.6g}, is missing"
    return None


def _arguments(
    deltas,
    logits,
    priors,
    score_threshold=0.01,
    iou_threshold=0.45,
    topk_per_class=400,
    max_detections=200,
    activation="softmax",
    variances=(0.1, 0.2),
    clip: float = math.log(1000 / 16),
    class_agnostic=False,
    window=None,
):
    return SimpleNamespace(**locals())


# ---- peers -------------------------------------------------------------------------------------


def _padded(images, most):
    """The op's four outputs of a list of (boxes, scores, labels)."""
    out = []
    for values, width, pad in zip(zip(*images, strict=True), (4, None, None), (0.0, 0.0, -1), strict=True):
        shape = (len(images), most) + ((width,) if width else ())
        padded = values[0].new_full(shape, pad)
        for b, value in enumerate(values):
            padded[b, : len(value)] = value
        out.append(padded)
    counts = torch.tensor([len(image[0]) for image in images], device=out[0].device)
    return *out, counts


def _plain(inputs: Inputs):
    """The arguments, where a detector of torchvision could have them."""
    given = _arguments(**inputs)
    if given.activation != "softmax" or given.class_agnostic or given.window is None or given.window[:2] != (0.0, 0.0):
        raise MissingPeerError("softmax, class by class, clipped to the image alone")
    return given


def _torchvision(inputs: Inputs):
    try:
        from torchvision.models.detection._utils import BoxCoder
        from torchvision.models.detection.ssd import SSD
        from torchvision.ops import box_convert
    except ImportError as e:
        raise MissingPeerError(f"torchvision: {e}") from e
    given = _plain(inputs)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    ssd = SimpleNamespace(
        box_coder=coder,
        score_thresh=given.score_threshold,
        nms_thresh=given.iou_threshold,
        topk_candidates=given.topk_per_class,
        detections_per_img=given.max_detections,
    )
    heads = {"bbox_regression": given.deltas, "cls_logits": given.logits}
    batch = len(given.logits)
    anchors = [box_convert(given.priors, "cxcywh", "xyxy")] * batch
    shapes = [(given.window[3], given.window[2])] * batch

    def call():
        found = SSD.postprocess_detections(ssd, heads, anchors, shapes)
        return _padded([(d["boxes"], d["scores"], d["labels"]) for d in found], given.max_detections)

    return call


def _tuned_torch(inputs: Inputs):
    """What one writes with care: all classes at once, candidates alone decoded, torchvision's batched NMS."""
    try:
        from torchvision.ops import batched_nms
    except ImportError as e:
        raise MissingPeerError(f"torchvision's batched_nms: {e}") from e
    given = _plain(inputs)
    window = given.priors.new_tensor(given.window)

    def image(deltas, scores):  # scores [C - 1, P]
        best = min(given.topk_per_class, scores.shape[1])
        if int((scores > given.score_threshold).sum(1).max()) > best:
            value, prior = scores.topk(best, 1)
            row, column = (value > given.score_threshold).nonzero().T
            score, prior = value[row, column], prior[row, column]
        else:
            row, prior = (scores > given.score_threshold).nonzero().T
            score = scores[row, prior]
        p, d = given.priors[prior], deltas[prior]
        center = p[:, :2] + d[:, :2] * given.variances[0] * p[:, 2:]
        half = (d[:, 2:] * given.variances[1]).clamp(max=given.clip).exp() * p[:, 2:] * 0.5
        box = torch.cat([center - half, center + half], 1)
        box = torch.minimum(torch.maximum(box, window[:2].repeat(2)), window[2:].repeat(2))
        keep = batched_nms(box, score, row, given.iou_threshold)[: given.max_detections]
        return box[keep], score[keep], row[keep] + 1

    def call():
        scores = given.logits.softmax(-1)[..., 1:].mT.contiguous()
        return _padded([image(d, s) for d, s in zip(given.deltas, scores, strict=True)], given.max_detections)

    return call


@functools.cache
def _onnx_session(threads: int):
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError as e:
        raise MissingPeerError(f"ONNX Runtime: {e}") from e
    node = helper.make_node
    floats, longs = TensorProto.FLOAT, TensorProto.INT64
    names = {
        "logits": (floats, ["B", "P", "C"]),
        "deltas": (floats, ["B", "P", 4]),
        "center": (floats, ["P", 2]),
        "size": (floats, ["P", 2]),
        "variances": (floats, [2]),
        "clip": (floats, []),
        "low": (floats, [4]),
        "high": (floats, [4]),
        "score_threshold": (floats, [1]),
        "iou_threshold": (floats, [1]),
        "most": (longs, [1]),
    }
    constants = {"one": [1], "end": [2**31 - 1], "last": [2], "zero": [0], "two": [2, 2]}
    nodes = [
        node("Softmax", ["logits"], ["all_scores"], axis=-1),
        node("Slice", ["all_scores", "one", "end", "last"], ["foreground"]),
        node("Transpose", ["foreground"], ["scores"], perm=[0, 2, 1]),
        node("Split", ["deltas", "two"], ["offset", "scale"], axis=-1),
        node("Split", ["variances"], ["v0", "v1"], axis=0),
        node("Mul", ["offset", "v0"], ["offset_v"]),
        node("Mul", ["offset_v", "size"], ["shift"]),
        node("Add", ["shift", "center"], ["moved"]),
        node("Mul", ["scale", "v1"], ["scale_v"]),
        node("Min", ["scale_v", "clip"], ["clipped"]),
        node("Exp", ["clipped"], ["grown"]),
        node("Mul", ["grown", "size"], ["extent"]),
        node("Mul", ["extent", "half"], ["halved"]),
        node("Sub", ["moved", "halved"], ["first"]),
        node("Add", ["moved", "halved"], ["second"]),
        node("Concat", ["first", "second"], ["unclipped"], axis=-1),
        node("Max", ["unclipped", "low"], ["raised"]),
        node("Min", ["raised", "high"], ["boxes"]),
        node("NonMaxSuppression", ["boxes", "scores", "most", "iou_threshold", "score_threshold"], ["kept"]),
        node("GatherND", ["scores", "kept"], ["kept_scores"]),
    ]
    inputs = [helper.make_tensor_value_info(name, *kind) for name, kind in names.items()]
    outputs = [
        helper.make_tensor_value_info("kept", longs, ["N", 3]),
        helper.make_tensor_value_info("kept_scores", floats, ["N"]),
        helper.make_tensor_value_info("boxes", floats, ["B", "P", 4]),
    ]
    initial = [helper.make_tensor(name, longs, [len(v)], v) for name, v in constants.items()]
    initial.append(helper.make_tensor("half", floats, [1], [0.5]))
    graph = helper.make_graph(nodes, "detect", inputs, outputs, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else it disturbs the next contender
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _onnx_runtime(inputs: Inputs):
    """Softmax, decoding and NonMaxSuppression in a graph; the best of each image outside."""
    given = _plain(inputs)
    if given.logits.is_cuda:
        raise MissingPeerError("ONNX Runtime: CPU only")
    session = _onnx_session(torch.get_num_threads())
    values = {
        "logits": given.logits,
        "deltas": given.deltas,
        "center": given.priors[:, :2],
        "size": given.priors[:, 2:],
        "variances": torch.tensor(given.variances),
        "clip": torch.tensor(given.clip),
        "low": torch.tensor(given.window[:2] * 2),
        "high": torch.tensor(given.window[2:] * 2),
        "score_threshold": torch.tensor([given.score_threshold]),
        "iou_threshold": torch.tensor([given.iou_threshold]),
        "most": torch.tensor([given.topk_per_class]),
    }
    feed = {name: value.contiguous().numpy() for name, value in values.items()}

    def call():
        kept, scores, boxes = map(torch.from_numpy, session.run(None, feed))
        images = []
        for b in range(len(given.logits)):
            mine = (kept[:, 0] == b).nonzero().flatten()
            mine = mine[scores[mine].argsort(descending=True, stable=True)][: given.max_detections]
            images.append((boxes[b, kept[mine, 2]], scores[mine], kept[mine, 1] + 1))
        return _padded(images, given.max_detections)

    return call


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


DETECT = Op(
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
        ErrorCase("dtypes mixed", _call(logits=torch.rand(2, 3, 5).double()), r"dtype of deltas, float32, got float64"),
        ErrorCase("integers", _call(deltas=torch.ones(2, 3, 4).long()), r"deltas must be float32.* got int64"),
        ErrorCase("too many logits", _huge, r"at most 2147479551 elements an image, got \[1, 1073741824, 3\]"),
        ErrorCase("score threshold", _call(score_threshold=-0.1), r"score_threshold must be in \[0, 1\], got -0.1"),
        ErrorCase("score threshold NaN", _call(score_threshold=math.nan), r"score_threshold must be in \[0, 1\]"),
        ErrorCase("IoU threshold", _call(iou_threshold=1.5), r"iou_threshold must be in \[0, 1\], got 1.5"),
        ErrorCase("top k", _call(topk_per_class=0), r"topk_per_class must be at least 1, got 0"),
        ErrorCase("detections", _call(max_detections=0), r"max_detections must be at least 1, got 0"),
        ErrorCase("activation", _call(activation="relu"), r"must be 'softmax' or 'sigmoid', got 'relu'"),
        ErrorCase("variances", _call(variances=(0.1, 0.0)), r"variances must be positive.* got \(0.1, 0\)"),
        ErrorCase("clip", _call(clip=math.nan), r"clip must be a number, got nan"),
        ErrorCase("window", _call(window=(0, 0, 1)), r"window must be \(x1, y1, x2, y2\), got 3 values"),
        ErrorCase("window inverted", _call(window=(0, 2, 1, 1)), r"x1 <= x2 and y1 <= y2, got \(0, 2, 1, 1\)"),
        ErrorCase("window NaN", _call(window=(0, 0, 1, math.nan)), r"x1 <= x2 and y1 <= y2, got \(0, 0, 1, nan\)"),
    ],
    peers={"torchvision": _torchvision, "tuned PyTorch": _tuned_torch, "ONNX Runtime": _onnx_runtime},
    agrees=_agrees,
    full_size=lambda g: _trained(1, 21, g),
    scaling=lambda batch: _trained(batch, 81, torch.Generator().manual_seed(batch)),
)

OPS = [DETECT]
