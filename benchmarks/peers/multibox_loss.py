"""Peers of multibox_loss."""

import math
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from benchmarks.peers.spec import MissingPeerError, Peers
from opinfo.inputs import ssd300_priors
from opinfo.spec import Inputs
from ssd_ext import ops


def _plain(inputs: Inputs):
    """The four tensors, for peers that do no more than the default."""
    inputs = dict(inputs)
    tensors = [inputs.pop(name) for name in ("deltas", "logits", "target_deltas", "target_labels")]
    if inputs:
        raise MissingPeerError(f"has no {', '.join(inputs)}")
    return tensors


def _torchvision(inputs: Inputs):
    """torchvision's SSD.compute_loss, its matches and boxes made from the targets."""
    from torchvision.models.detection.ssd import SSD

    deltas, logits, target_deltas, target_labels = _plain(inputs)
    priors = ssd300_priors()[: logits.shape[1]].to(deltas.device)
    if len(priors) < logits.shape[1]:
        raise MissingPeerError("this case has more priors than SSD300")
    boxes = ops.decode(target_deltas, priors, bbox_xform_clip=math.inf)
    anchors = torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1)
    matches = torch.full_like(target_labels, -1)
    targets = []
    for b, image in enumerate(target_labels):
        (positive,) = (image > 0).nonzero(as_tuple=True)
        matches[b, positive] = torch.arange(len(positive), device=target_labels.device)
        targets.append({"boxes": boxes[b, positive], "labels": image[positive]})
    from torchvision.models.detection._utils import BoxCoder

    model = SimpleNamespace(box_coder=BoxCoder((10.0, 10.0, 5.0, 5.0)), neg_to_pos_ratio=3)
    heads = {"bbox_regression": deltas, "cls_logits": logits.contiguous()}  # it takes no other layout

    def call():
        losses = SSD.compute_loss(model, targets, heads, [anchors] * len(targets), matches)
        return losses["bbox_regression"], losses["classification"]

    return call


def _tuned_loss(deltas, logits, target_deltas, target_labels):
    """What one writes with care: no loop over images, one cross-entropy, a batched top-k, no synchronisation."""
    positive = target_labels > 0
    counts = positive.sum(1, keepdim=True)
    total = counts.sum().clamp(min=1)
    losses = F.cross_entropy(logits.flatten(0, 1), target_labels.flatten(), reduction="none").view_as(target_labels)
    candidates = losses.detach().masked_fill(positive, -math.inf)
    priors = target_labels.shape[1]
    most = min(priors, 1 + int(0.15 * priors)) if priors > 1000 else priors
    index = candidates.topk(most, dim=1).indices
    wanted = torch.arange(most, device=index.device) < torch.minimum(3 * counts, priors - counts)
    selected = positive.scatter(1, index, wanted | positive.gather(1, index))
    conf = (losses * selected).sum() / total
    loc = F.smooth_l1_loss(deltas, target_deltas, reduction="none").sum(-1)
    return (loc * positive).sum() / total, conf


def _tuned(inputs: Inputs):
    tensors = _plain(inputs)
    return lambda: _tuned_loss(*tensors)


PEERS = {"multibox_loss": Peers({"torchvision": _torchvision, "tuned": _tuned}, {"tuned, torch.compile": _tuned_loss})}
