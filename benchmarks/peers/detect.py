"""Peers of detect."""

import functools
from types import SimpleNamespace

import torch

from benchmarks.peers.spec import MissingPeerError, Peers, onnx_session
from opinfo.spec import Inputs, arguments
from ssd_ext import ops


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
    given = arguments(ops.detect, inputs)
    if given.activation != "softmax" or given.class_agnostic or given.window is None or given.window[:2] != (0.0, 0.0):
        raise MissingPeerError("softmax, class by class, clipped to the image alone")
    return given


def _torchvision(inputs: Inputs):
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.ssd import SSD
    from torchvision.ops import box_convert

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
    from torchvision.ops import batched_nms

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
        half = (d[:, 2:] * given.variances[1]).clamp(max=given.bbox_xform_clip).exp() * p[:, 2:] * 0.5
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
    from onnx import TensorProto, helper

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
    return onnx_session(graph, 13, threads)


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
        "clip": torch.tensor(given.bbox_xform_clip),
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


PEERS = {"detect": Peers({"torchvision": _torchvision, "tuned PyTorch": _tuned_torch, "ONNX Runtime": _onnx_runtime})}
