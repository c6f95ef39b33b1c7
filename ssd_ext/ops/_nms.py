"""Non-maximum suppression: nms, batched_nms, and the same with outputs of fixed size."""

import torch
from torch import Tensor

from ssd_ext._arguments import explained
from ssd_ext.ground_truth import as_int64
from ssd_ext.ops._library import autocast_to_float32, define, fake, no_gradient

define(
    "nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold) -> Tensor",
    torch.Tag.dynamic_output_shape,
    torch.Tag.cudagraph_unsafe,
)


@explained
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: of boxes that overlap, keep the one of highest score.

    Args:
        boxes: ``[N, 4]`` corners ``(x1, y1, x2, y2)``, any units. float32, float64, float16 or
            bfloat16; the halves compute in float32.
        scores: ``[N]``, same dtype and device.
        iou_threshold: in 0..1; a box is suppressed where its IoU with a kept box is above (``>``).

    Returns:
        ``[K]`` int64 indices of the kept boxes by descending score (ties: the lowest index first, and
        the lowest index is kept). A NaN score is never kept; a box with a NaN or infinite coordinate
        suppresses nothing.

    The length depends on the data, so on the GPU this waits for it; :func:`nms_padded` does not.

    Raises:
        ValueError: wrong shape, dtype or device, or a threshold outside 0..1.

    Source: torchvision's ``nms``.
    """
    keep: Tensor = torch.ops.ssd_ext.nms.default(boxes, scores, None, iou_threshold)
    return keep


@explained
def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms` within each class (or image, or level): boxes of different ``idxs`` never suppress each other.

    Ids are compared, coordinates are not shifted: any int64 id and any coordinate is exact, in half too.

    Args:
        boxes: ``[N, 4]`` corners ``(x1, y1, x2, y2)``.
        scores: ``[N]``, same dtype and device.
        idxs: ``[N]`` class of each box, integers of any width and any value, same device.
        iou_threshold: in 0..1; a box is suppressed where its IoU with a kept box is above (``>``).

    Returns:
        ``[K]`` int64 indices of the kept boxes of all classes by descending score (ties: lowest index first).

    Raises:
        ValueError: wrong shape, dtype or device, or a threshold outside 0..1.

    Source: torchvision's ``batched_nms``.
    """
    keep: Tensor = torch.ops.ssd_ext.nms.default(boxes, scores, _ids(idxs), iou_threshold)
    return keep


@explained
def nms_padded(boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """:func:`nms` with outputs of fixed size: no wait for the GPU, capturable in a CUDA graph.

    Args:
        boxes: ``[N, 4]`` corners ``(x1, y1, x2, y2)``.
        scores: ``[N]``, same dtype and device.
        iou_threshold: in 0..1; a box is suppressed where its IoU with a kept box is above (``>``).

    Returns:
        ``keep``: ``[N]`` int64, the indices of the kept boxes as :func:`nms` gives them, then ``-1``.
        ``count``: ``[]`` int64, how many are kept.

    Raises:
        ValueError: wrong shape, dtype or device, or a threshold outside 0..1.

    Source: as :func:`nms`.
    """
    kept: tuple[Tensor, Tensor] = torch.ops.ssd_ext.nms_padded.default(boxes, scores, None, iou_threshold)
    return kept


@explained
def batched_nms_padded(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """:func:`batched_nms` with outputs of fixed size: no wait for the GPU, capturable in a CUDA graph.

    Args:
        boxes: ``[N, 4]`` corners ``(x1, y1, x2, y2)``.
        scores: ``[N]``, same dtype and device.
        idxs: ``[N]`` class of each box, integers of any width and any value, same device.
        iou_threshold: in 0..1; a box is suppressed where its IoU with a kept box is above (``>``).

    Returns:
        As :func:`nms_padded`.

    Raises:
        ValueError: wrong shape, dtype or device, or a threshold outside 0..1.

    Source: as :func:`batched_nms`.
    """
    kept: tuple[Tensor, Tensor] = torch.ops.ssd_ext.nms_padded.default(boxes, scores, _ids(idxs), iou_threshold)
    return kept


def _ids(idxs: Tensor) -> Tensor:
    if idxs is None or idxs.is_floating_point():
        given = "None; nms and nms_padded take boxes of one class" if idxs is None else idxs.dtype
        raise ValueError(f"idxs must be [N] integers, got {given}")
    return as_int64(idxs)


@fake("nms")
def _(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@fake("nms_padded")
def _(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> tuple[Tensor, Tensor]:
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64), boxes.new_empty((), dtype=torch.int64)


for _op in ("nms", "nms_padded"):
    no_gradient(_op)
    autocast_to_float32(_op)
