"""Peers of nms, batched_nms and their padded forms."""

import functools
import math

import torch

from benchmarks.peers.spec import MissingPeerError, Peers, onnx_session
from opinfo.spec import Inputs


def _torchvision(inputs: Inputs):
    from torchvision.ops import batched_nms, nms

    if "idxs" in inputs:
        return lambda: batched_nms(inputs["boxes"], inputs["scores"], inputs["idxs"], inputs["iou_threshold"])
    return lambda: nms(inputs["boxes"], inputs["scores"], inputs["iou_threshold"])


def _torchvision_padded(inputs: Inputs):
    """Its indices, padded."""
    call, size = _torchvision(inputs), len(inputs["boxes"])

    def padded():
        kept = call()
        return torch.nn.functional.pad(kept, (0, size - len(kept)), value=-1), kept.new_tensor(len(kept))

    return padded


@functools.cache
def _onnx_session(threads: int):
    from onnx import TensorProto, helper

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
    return onnx_session(graph, 11, threads)


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
        # Row by row in ONNX's order; ours is by descending score over all classes.
        return kept[scores[kept].argsort(descending=True, stable=True)] if "idxs" in inputs else kept

    return call


_PLAIN = Peers({"torchvision": _torchvision, "ONNX Runtime": _onnx_runtime})
_PADDED = Peers({"torchvision": _torchvision_padded})
PEERS = {"nms": _PLAIN, "batched_nms": _PLAIN, "nms_padded": _PADDED, "batched_nms_padded": _PADDED}
