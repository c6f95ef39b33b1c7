"""Box coding and overlap: encode, decode, box_iou."""

import math
from typing import Any

import torch
from torch import Tensor

from ssd_ext._arguments import explained
from ssd_ext.ground_truth import INTEGERS
from ssd_ext.ops._library import autocast_to_float32, call, differentiable, fake, promoted, refuse_gradient

BBOX_XFORM_CLIP = math.log(1000 / 16)


@explained
def encode(boxes: Tensor, priors: Tensor, *, variances: tuple[float, float] = (0.1, 0.2)) -> Tensor:
    """Encode boxes as deltas from priors, the targets of SSD's regression head.

    With a box's centre and size ``(gx, gy, gw, gh)`` and a prior ``(cx, cy, w, h)``:
    ``((gx - cx) / (w * v0), (gy - cy) / (h * v0), log(gw / w) / v1, log(gh / h) / v1)``.

    Args:
        boxes: ``[..., P, 4]`` corners ``(x1, y1, x2, y2)``, in the units of ``priors`` (relative
            0..1 or pixels). float32, float64, float16 or bfloat16, whatever the dtype of ``priors``.
        priors: ``[P, 4]`` centre and size ``(cx, cy, w, h)``, of any of these dtypes, on the same device; a constant.
        variances: of centre and size. ``(0.1, 0.2)`` equals torchvision's weights ``(10, 10, 5, 5)``.

    Returns:
        ``[..., P, 4]`` deltas ``(dx, dy, dw, dh)`` in the order of ``boxes``. Their dtype is
        ``torch.promote_types`` of the two; halves compute in float32. A box without width or height gives ``-inf``,
        an inverted one NaN.

    Differentiable in ``boxes`` in reverse mode, twice too, also by ``torch.func`` (``grad``, ``jacrev``, ``vmap``; they
    run eagerly under ``torch.compile``); not by forward-mode AD (``torch.func.jvp``).

    Raises:
        ValueError: wrong shape, dtype or device, or a variance that is not positive.
        RuntimeError: a gradient for ``priors`` is asked for.

    Source: Liu et al., SSD (2016), eq. 2; torchvision's ``BoxCoder.encode``.
    """
    deltas: Tensor = call(torch.ops.ssd_ext.encode.default, boxes, priors, list(variances))
    return deltas


@explained
def decode(
    deltas: Tensor,
    priors: Tensor,
    *,
    variances: tuple[float, float] = (0.1, 0.2),
    bbox_xform_clip: float = BBOX_XFORM_CLIP,
) -> Tensor:
    """Decode deltas from priors to boxes; the inverse of :func:`encode`.

    Args:
        deltas: ``[..., P, 4]`` as :func:`encode` gives them. float32, float64, float16 or bfloat16, whatever the dtype
            of ``priors``.
        priors: ``[P, 4]`` centre and size ``(cx, cy, w, h)``, of any of these dtypes, on the same device; a constant.
            Keep them in float32 beside deltas in half precision, which do not hold their positions.
        variances: of centre and size.
        bbox_xform_clip: upper bound of ``delta * variance`` of a size, before the exponential, so that no
            delta makes an infinite box; as in torchvision there is no lower bound. ``math.inf`` turns it off.

    Returns:
        ``[..., P, 4]`` corners ``(x1, y1, x2, y2)`` in the units and order of ``priors``, not
        clipped to the image. Their dtype is ``torch.promote_types`` of the two; halves compute in float32. A NaN delta
        gives NaN corners.

    Differentiable in ``deltas`` as :func:`encode` is in boxes; a size that ``bbox_xform_clip`` bounds has no gradient.

    Raises:
        ValueError: wrong shape, dtype or device, a variance that is not positive, a NaN
            ``bbox_xform_clip``.
        RuntimeError: a gradient for ``priors`` is asked for.

    Source: Liu et al., SSD (2016), eq. 2; torchvision's ``BoxCoder.decode``.
    """
    boxes: Tensor = call(torch.ops.ssd_ext.decode.default, deltas, priors, list(variances), bbox_xform_clip)
    return boxes


@explained
def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair of two sets of boxes.

    Args:
        boxes1: ``[N, 4]`` corners ``(x1, y1, x2, y2)``, any units. float32, float64, float16 or
            bfloat16; the halves compute in float32. Or integers, whose IoU is computed in float64.
        boxes2: ``[M, 4]`` corners in the same units, same dtype and device; two tensors of integers may
            differ in width.

    Returns:
        ``[N, M]`` in 0..1, in the dtype of the boxes, or float32 for integers. A box with a NaN or infinite
        coordinate, or without area, has IoU 0 with everything (torchvision gives NaN), and so has one whose
        area their type does not hold, in float32 a square of sides from 1.85e19 or below 2.7e-23.

    Not differentiable; for a loss, use torchvision's ``generalized_box_iou_loss`` and its kin.

    Raises:
        ValueError: wrong shape, dtype or device.
        RuntimeError: a gradient is asked for.

    Source: Everingham et al., PASCAL VOC (2010), section 4.2; torchvision's ``box_iou``.
    """
    if {boxes1.dtype, boxes2.dtype} <= INTEGERS:
        return box_iou(boxes1.double(), boxes2.double()).float()
    iou: Tensor = call(torch.ops.ssd_ext.box_iou.default, boxes1, boxes2)
    return iou


@fake("encode")
def _(boxes: Tensor, priors: Tensor, variances: list[float]) -> Tensor:
    return torch.empty(boxes.shape, dtype=promoted(boxes, priors), device=boxes.device)


@fake("decode")
def _(deltas: Tensor, priors: Tensor, variances: list[float], bbox_xform_clip: float) -> Tensor:
    return torch.empty(deltas.shape, dtype=promoted(deltas, priors), device=deltas.device)


@fake("box_iou")
def _(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return boxes1.new_empty(boxes1.shape[0], boxes2.shape[0])


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, priors, *ctx.constants = inputs
    ctx.save_for_backward(rows, priors)


def _refuse_prior_gradient(ctx: Any, op: str) -> None:
    if ctx.needs_input_grad[1]:
        raise RuntimeError(f"ssd_ext::{op} has no gradient for priors: they are constants (pass priors.detach())")


def _widened(*tensors: Tensor) -> list[Tensor]:
    """In the dtype that the ops compute in: float64 if one of them is, else float32."""
    dtype = torch.promote_types(promoted(*tensors), torch.float32)
    return [t.to(dtype) for t in tensors]


def _encode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    _refuse_prior_gradient(ctx, "encode")
    boxes, priors = ctx.saved_tensors
    dtype = boxes.dtype
    boxes, priors, grad = _widened(boxes, priors, grad)
    (variances,) = ctx.constants
    extent = boxes[..., 2:] - boxes[..., :2]
    center = grad[..., :2] * 0.5 / (priors[:, 2:] * variances[0])
    size = grad[..., 2:] / (extent * variances[1])
    return torch.cat([center - size, center + size], -1).to(dtype), None, None


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    _refuse_prior_gradient(ctx, "decode")
    deltas, priors = ctx.saved_tensors
    dtype = deltas.dtype
    deltas, priors, grad = _widened(deltas, priors, grad)
    variances, clip = ctx.constants
    scaled = deltas[..., 2:] * variances[1]
    extent = scaled.clamp(max=clip).exp() * priors[:, 2:]
    center = (grad[..., :2] + grad[..., 2:]) * priors[:, 2:] * variances[0]
    size = (grad[..., 2:] - grad[..., :2]) * 0.5 * extent * variances[1]
    return torch.cat([center, torch.where(scaled > clip, 0, size)], -1).to(dtype), None, None, None


differentiable("encode", _encode_backward, _keep_inputs)
differentiable("decode", _decode_backward, _keep_inputs)
refuse_gradient("box_iou", "use a loss made for training boxes, such as torchvision.ops.generalized_box_iou_loss")

for _op in ("encode", "decode", "box_iou"):
    autocast_to_float32(_op)
