"""Peers of match and assign_targets."""

import torch

from benchmarks.peers.spec import MissingPeerError, Peers
from opinfo.spec import Inputs


def _torchvision_match(inputs: Inputs):
    """SSDMatcher, image by image, as SSD.forward calls it."""
    from torchvision.models.detection._utils import SSDMatcher
    from torchvision.ops import box_convert, box_iou

    if inputs.get("force") != "last" or inputs.get("low_threshold") or isinstance(inputs["gt_boxes"], tuple):
        raise MissingPeerError("torchvision: SSDMatcher has force='last' and one threshold only")
    priors, matcher = box_convert(inputs["priors"], "cxcywh", "xyxy"), SSDMatcher(inputs.get("iou_threshold", 0.5))
    background = torch.full((len(priors),), -1, device=priors.device)

    def of_image(boxes):
        return matcher(box_iou(boxes, priors)) if boxes.numel() else background

    return lambda: torch.stack([of_image(boxes) for boxes in inputs["gt_boxes"]])


def _torchvision_targets(inputs: Inputs):
    """SSDMatcher, then gather and BoxCoder.encode an image, as SSD.compute_loss does."""
    match = _torchvision_match(inputs)
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.ops import box_convert

    coder, priors = BoxCoder((10.0, 10.0, 5.0, 5.0)), box_convert(inputs["priors"], "cxcywh", "xyxy")

    def call():
        all_labels, all_deltas = [], []
        for matched, boxes, labels in zip(match(), inputs["gt_boxes"], inputs["gt_labels"], strict=True):
            positive = matched >= 0
            target = torch.zeros(len(priors), dtype=torch.int64, device=priors.device)
            target[positive] = labels[matched[positive]]
            deltas = priors.new_zeros(len(priors), 4)
            deltas[positive] = coder.encode_single(boxes[matched[positive]], priors[positive])
            all_labels.append(target)
            all_deltas.append(deltas)
        return torch.stack(all_labels), torch.stack(all_deltas)

    return call


PEERS = {
    "match": Peers({"torchvision": _torchvision_match}),
    "assign_targets": Peers({"torchvision": _torchvision_targets}),
}
