"""nms, batched_nms, nms_padded."""

import dataclasses
import functools
import math

import torch

from benchmarks.cases.inputs import detector_candidates, distinct_scores, random_boxes
from benchmarks.cases.spec import EXACT, Case, ErrorCase, Inputs, MissingPeerError, Op
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
    """Boxes whose areas are denormal numbers, or nothing, in float32."""
    boxes = random_boxes(64, g, 0.3) * 1e-20
    return {"boxes": boxes, "scores": torch.rand(64, generator=g), "iou_threshold": 0.5}


def _negative(g):
    boxes, scores = detector_candidates(80, g)
    return {"boxes": boxes * 600 - 1000, "scores": scores - 0.5, "iou_threshold": 0.45}


_SMALL = [
    _random(50),
    _random(1),
    _random(0, peers=False),
    _random(777, dtypes=EXACT),
    _candidates(300, dtypes=EXACT),
    _candidates(63),
    _candidates(64, iou_threshold=0.0),
    _candidates(65, iou_threshold=1.0),
    Case("scores all equal", _equal_scores),
    Case("scores all NaN", _no_scores, peers=False),
    Case("few scores", _few_scores),
    Case("boxes all equal", _equal_boxes),
    Case("exactly at the threshold", _exactly_at_threshold),
    Case("hostile", _hostile, peers=False),
    Case("denormal areas", _denormal_areas, dtypes=(torch.float32,), peers=False),
    Case("negative coordinates", _negative, dtypes=EXACT),
]
_LARGE = [
    _random(100, benchmark=True, dtypes=EXACT),
    _random(1000, benchmark=True, quick=True, dtypes=EXACT),
    _random(5000, benchmark=True, dtypes=EXACT),
    _random(20000, benchmark=True, dtypes=EXACT),
    _candidates(1000, benchmark=True, dtypes=EXACT),
    _candidates(20000, benchmark=True, dtypes=EXACT),
]


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


def _far_ids(g):
    """Ids beyond what a float holds, and below 0."""
    inputs = _candidates(200).make(g)
    ids = torch.tensor([-(2**63), -1, 0, 65504, 65505, 2**53, 2**53 + 1, 2**63 - 1])
    return {**inputs, "idxs": ids[torch.randint(8, (200,), generator=g)]}


def _agrees(inputs, result, expected):
    """Equal to the float64 reference, or to the reference in the dtype the op computes in.

    Whether a box is suppressed can hang on the rounding of one IoU next to the threshold, and all that
    follows on that box. So the reference decides in the op's own arithmetic where the two differ.
    """
    if result.dtype != torch.int64:
        return f"got {result.dtype}, expected int64"
    result, expected = result.cpu(), expected.cpu()
    if torch.equal(result, expected):
        return None
    same = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    if same["boxes"].dtype != torch.float64:
        same = {k: v.float() if k in ("boxes", "scores") else v for k, v in same.items()}
        expected = (reference.batched_nms if same.get("idxs") is not None else reference.nms)(**same)
    if torch.equal(result, expected):
        return None
    return f"kept {result.tolist()[:10]}... ({len(result)}), expected {expected.tolist()[:10]}... ({len(expected)})"


def _padded_agrees(inputs, result, expected):
    (keep, count), (want, want_count) = result, expected
    if len(keep) != len(inputs["boxes"]) or count.shape != () or count.dtype != torch.int64:
        return f"keep {list(keep.shape)}, count {list(count.shape)} {count.dtype}"
    if bool((keep[int(count) :] != -1).any()):
        return "padding is not -1"
    return _agrees(inputs, keep[: int(count)], want[: int(want_count)])


def _torchvision(inputs: Inputs):
    try:
        from torchvision.ops import batched_nms, nms
    except ImportError as e:
        raise MissingPeerError(f"torchvision: {e}") from e
    if "idxs" in inputs:
        return lambda: batched_nms(inputs["boxes"], inputs["scores"], inputs["idxs"], inputs["iou_threshold"])
    return lambda: nms(inputs["boxes"], inputs["scores"], inputs["iou_threshold"])


def _torchvision_padded(inputs: Inputs):
    """Its indices in the form of nms_padded."""
    call, size = _torchvision(inputs), len(inputs["boxes"])

    def padded():
        kept = call()
        return torch.nn.functional.pad(kept, (0, size - len(kept)), value=-1), kept.new_tensor(len(kept))

    return padded


@functools.cache
def _onnx_session(threads: int):
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError as e:
        raise MissingPeerError(f"ONNX Runtime: {e}") from e
    inputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, None, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, None, None]),
        helper.make_tensor_value_info("threshold", TensorProto.FLOAT, [1]),
    ]
    constants = [
        helper.make_tensor("most", TensorProto.INT64, [1], [2**31 - 1]),
        helper.make_tensor("least", TensorProto.FLOAT, [1], [-3e38]),
    ]
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "threshold", "least"], ["kept"])
    output = helper.make_tensor_value_info("kept", TensorProto.INT64, [None, 3])
    graph = helper.make_graph([node], "nms", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else it disturbs the next contender
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _onnx_runtime(inputs: Inputs):
    """NonMaxSuppression; classes are rows of a [1, C, N] score matrix, -inf where a box is of another class."""
    if inputs["boxes"].is_cuda or not inputs["iou_threshold"] > 0:
        raise MissingPeerError("ONNX Runtime: CPU only; threshold 0 is not allowed")
    session = _onnx_session(torch.get_num_threads())
    boxes, scores = inputs["boxes"].numpy()[None], inputs["scores"]
    if "idxs" in inputs:
        idxs = inputs["idxs"]
        if int(idxs.min()) < 0 or int(idxs.max()) > 1000:
            raise MissingPeerError("ONNX Runtime: class ids must be small, they are rows of a matrix")
        table = scores.new_full((int(idxs.max()) + 1, len(scores)), -math.inf)
        table[idxs, torch.arange(len(scores))] = scores
    else:
        table = scores[None]
    feed = {"boxes": boxes, "scores": table[None].numpy(), "threshold": [inputs["iou_threshold"]]}

    def call():
        kept = torch.from_numpy(session.run(None, feed)[0])[:, 2]
        # Row by row in ONNX's order; ours is by falling score over all classes.
        return kept[scores[kept].argsort(descending=True, stable=True)] if "idxs" in inputs else kept

    return call


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
    ErrorCase("float idxs", _call(idxs=torch.zeros(3)), r"idxs must be int64, got float32"),
    ErrorCase("int32 idxs", _call(idxs=torch.zeros(3).int()), r"idxs must be int64, got int32"),
]
_PEERS = {"torchvision": _torchvision, "ONNX Runtime": _onnx_runtime}

NMS = Op(
    name="nms",
    op=ops.nms,
    reference=reference.nms,
    schema="nms",
    cases=[*_SMALL, _candidates(3100, dtypes=EXACT), *_LARGE],  # 3100: enough to be split into cells
    errors=_ERRORS,
    peers=_PEERS,
    agrees=_agrees,
    capturable=False,
    full_size=_candidates(8732).make,
)

BATCHED_NMS = Op(
    name="batched_nms",
    op=ops.batched_nms,
    reference=reference.batched_nms,
    schema="nms",
    cases=[
        *(_in_classes(case, 3) for case in _SMALL),
        Case("far ids", _far_ids, peers=False),
        _in_classes(_candidates(4200, dtypes=EXACT), 40),  # enough to be grouped by class on the GPU
        *(_in_classes(case, 80) for case in _LARGE if case.name not in ("random N=100", "random N=5000")),
    ],
    errors=[*map(_with_ids, _ERRORS), *_ID_ERRORS],
    peers=_PEERS,
    agrees=_agrees,
    capturable=False,
    full_size=_in_classes(_candidates(8732), 2).make,
)

NMS_PADDED = Op(
    name="nms_padded",
    op=ops.nms_padded,
    reference=reference.nms_padded,
    schema="nms_padded",
    cases=[
        *_SMALL,
        *(_in_classes(case, 3) for case in _SMALL[:6]),
        Case("far ids", _far_ids, peers=False),
        _random(1000, benchmark=True, quick=True, dtypes=EXACT),
        _in_classes(_random(20000, benchmark=True, dtypes=EXACT), 80),
    ],
    errors=[*_ERRORS, *_ID_ERRORS],
    peers={"torchvision": _torchvision_padded},
    agrees=_padded_agrees,
    full_size=_candidates(8732).make,
)

OPS = [NMS, BATCHED_NMS, NMS_PADDED]
