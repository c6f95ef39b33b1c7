"""Box coding and overlap in plain PyTorch."""

import functools
import math

import torch
from torch import Tensor


def promoted(*tensors: Tensor) -> list[Tensor]:
    """All in the dtype that theirs promote to."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def encode(boxes: Tensor, priors: Tensor, *, variances: tuple[float, float] = (0.1, 0.2)) -> Tensor:
    """``[..., P, 4]`` corners to deltas; see :func:`ssd_ext.ops.encode`."""
    boxes, priors = promoted(boxes, priors)
    low, high = boxes[..., :2], boxes[..., 2:]
    center, size = priors[:, :2], priors[:, 2:]
    offset = ((low + high) / 2 - center) / (size * variances[0])
    scale = torch.log((high - low) / size) / variances[1]
    return torch.cat([offset, scale], -1)


def decode(
    deltas: Tensor,
    priors: Tensor,
    *,
    variances: tuple[float, float] = (0.1, 0.2),
    bbox_xform_clip: float = math.log(1000 / 16),
) -> Tensor:
    """``[..., P, 4]`` deltas to corners; see :func:`ssd_ext.ops.decode`."""
    deltas, priors = promoted(deltas, priors)
    center = priors[:, :2] + deltas[..., :2] * variances[0] * priors[:, 2:]
    size = torch.exp((deltas[..., 2:] * variances[1]).clamp(max=bbox_xform_clip)) * priors[:, 2:]
    return torch.cat([center - size / 2, center + size / 2], -1)


def area(boxes: Tensor) -> Tensor:
    """``[..., 4]`` corners to ``[...]``."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """``[N, 4]`` and ``[M, 4]`` to ``[N, M]``; 0 where the union is not a positive number."""
    a, b = boxes1[:, None], boxes2[None]
    extent = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    overlap = extent.clamp(min=0).prod(-1)
    union = area(a) + area(b) - overlap
    return torch.where(union > 0, overlap / union, 0)
