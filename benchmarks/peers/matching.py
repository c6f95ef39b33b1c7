"""Peers of match and assign_targets."""

import torch

from benchmarks.peers.spec import MissingPeerError, Peers
from opinfo.spec import Inputs


def _torchvision_match(inputs: Inputs):
    """SSDMatcher, image by image, as SSD.forward calls it."""
    from torchvision.models.detection._utils import SSDMatcher
    from torchvision.ops import box_convert, box_iou

    if inputs.get("force") != "last" or inputs.get("low_threshold"):
        raise MissingPeerError("torchvision: SSDMatcher has force='last' and one threshold only")
    priors, matcher = box_convert(inputs["priors"], "cxcywh", "xyxy"), SSDMatcher(inputs.get("iou_threshold", 0.5))
    background = torch.full((len(priors),), -1, device=priors.device)

    def of_image(boxes):
        return matcher(box_iou(boxes, priors)) if boxes.numel() else background

    images = [target["boxes"] for target in inputs["ground_truth"].to_targets()]
    return lambda: torch.stack([of_image(boxes) for boxes in images])


def _torchvision_targets(inputs: Inputs):
    """SSDMatcher, then gather and BoxCoder.encode an image, as SSD.compute_loss does."""
    match = _torchvision_match(inputs)
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.ops import box_convert

    coder, priors = BoxCoder((10.0, 10.0, 5.0, 5.0)), box_convert(inputs["priors"], "cxcywh", "xyxy")
    targets = inputs["ground_truth"].to_targets()

    def call():
        all_labels, all_deltas = [], []
        for matched, target in zip(match(), targets, strict=True):
            positive = matched >= 0
            labels = torch.zeros(len(priors), dtype=torch.int64, device=priors.device)
            labels[positive] = target["labels"][matched[positive]]
            deltas = priors.new_zeros(len(priors), 4)
            deltas[positive] = coder.encode_single(target["boxes"][matched[positive]], priors[positive])
            all_labels.append(labels)
            all_deltas.append(deltas)
        return torch.stack(all_deltas), torch.stack(all_labels)

    return call


PEERS = {
    "match": Peers({"torchvision": _torchvision_match}),
    "assign_targets": Peers({"torchvision": _torchvision_targets}),
}
