"""Peers of hard_negatives."""

import math

import torch

from benchmarks.peers.spec import Peers
from opinfo.spec import Inputs, arguments
from ssd_ext import ops


def _wanted(given):
    """``[B, 1]`` number of negatives to mark."""
    wanted = (
        ((given.target_labels > 0).sum(1, keepdim=True).double() * given.neg_to_pos_ratio)
        .floor()
        .clamp(min=given.min_negatives)
    )
    return torch.minimum(wanted, (given.target_labels == 0).sum(1, keepdim=True)).long()


def _candidates(given):
    return given.loss.masked_fill(given.target_labels != 0, -math.inf)


def _torch_topk(inputs: Inputs):
    """What one writes with care: one batched top-k of as many as the greediest image wants."""
    given = arguments(ops.hard_negatives, inputs)

    def call():
        wanted = _wanted(given)
        most = int(wanted.max())
        index = _candidates(given).topk(most, dim=1).indices
        rank = torch.arange(most, device=given.loss.device)
        return torch.zeros_like(given.target_labels, dtype=torch.bool).scatter_(1, index, rank < wanted)

    return call


def _double_sort(inputs: Inputs):
    """The way of torchvision's SSD and most others: sort, sort the order, compare the ranks."""
    given = arguments(ops.hard_negatives, inputs)

    def call():
        order = _candidates(given).sort(1, descending=True).indices
        return order.sort(1).indices < _wanted(given)

    return call


PEERS = {"hard_negatives": Peers({"torch.topk": _torch_topk, "double sort": _double_sort})}
