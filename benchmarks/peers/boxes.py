"""Peers of encode, decode and box_iou."""

import torch

from benchmarks.peers.spec import Peers
from opinfo.spec import Inputs


def _torchvision_coder(method):
    def peer(inputs: Inputs):
        from torchvision.models.detection._utils import BoxCoder
        from torchvision.ops import box_convert

        coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        priors = box_convert(inputs["priors"], "cxcywh", "xyxy")
        rows = inputs["boxes" if method == "encode_single" else "deltas"]
        one = getattr(coder, method)
        if rows.dim() == 2:
            return lambda: one(rows, priors)
        images = rows.reshape(-1, *rows.shape[-2:])
        return lambda: torch.stack([one(image, priors) for image in images]).reshape(rows.shape)

    return peer


def _torchvision_iou(inputs: Inputs):
    from torchvision.ops import box_iou

    return lambda: box_iou(inputs["boxes1"], inputs["boxes2"])


PEERS = {
    "encode": Peers({"torchvision": _torchvision_coder("encode_single")}),
    "decode": Peers({"torchvision": _torchvision_coder("decode_single")}),
    "box_iou": Peers({"torchvision": _torchvision_iou}),
}
