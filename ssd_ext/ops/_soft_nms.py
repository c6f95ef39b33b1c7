"""Soft non-maximum suppression: overlapping boxes lose score instead of being removed."""

import torch
from torch import Tensor

from ssd_ext._arguments import explained
from ssd_ext.ops._library import autocast_to_float32, call, define, fake, refuse_gradient

_METHODS = {"linear": 0, "gaussian": 1}


def _method_number(op: str, method: str) -> int:
    if method not in _METHODS:
        raise ValueError(f"ssd_ext::{op}: method must be 'linear' or 'gaussian', got {method!r}")
    return _METHODS[method]


@explained
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    *,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: str = "linear",
) -> tuple[Tensor, Tensor]:
    """Select boxes by score, lowering the scores of those that overlap a selected one.

    Repeats: take the box of highest current score; stop if that score is not greater than
    ``score_threshold``; multiply the score of every box left by ``f(iou)``, its IoU with the box
    taken. ``"linear"``: ``f = 1 - iou`` where ``iou > iou_threshold``, else 1. ``"gaussian"``:
    ``f = exp(-iou * iou / sigma)``.

    Args:
        boxes: ``[N, 4]`` corners ``(x1, y1, x2, y2)``, any units. float32, float64, float16 or
            bfloat16; the halves compute in float32. A box with a NaN or infinite coordinate has
            IoU 0 with everything.
        scores: ``[N]``, same dtype and device. A NaN is never selected, nor is a score that has
            become NaN (an infinite one times 0).
        iou_threshold: for ``"linear"``, in 0..1.
        sigma: for ``"gaussian"``, positive.
        score_threshold: any number.
        method: ``"linear"`` or ``"gaussian"``.

    Returns:
        ``(keep, scores)`` of the K boxes taken, in the order in which they were taken: ``keep`` is
        ``[K]`` int64 indices into ``boxes``; ``scores`` is ``[K]`` in the dtype of ``scores``, what
        each had when it was taken: never rising, unless a negative ``score_threshold`` lets negative
        scores in. Of equal scores the lowest index is taken first.

    K depends on the data: on CUDA this waits for the device. :func:`soft_nms_padded` does not.
    Time grows as N times K. Not differentiable.

    Raises:
        ValueError: wrong shape, dtype or device; ``iou_threshold`` outside 0..1; ``sigma`` not
            positive; a NaN ``score_threshold``; an unknown ``method``.
        RuntimeError: a gradient is asked for.

    Source: Bodla et al., Soft-NMS -- Improving Object Detection With One Line of Code (2017),
    section 3 and figure 2. The paper's linear rule decays at ``iou >= iou_threshold``; here, as in
    :func:`ssd_ext.ops.nms`, strictly above it.
    """
    number = _method_number("soft_nms", method)
    taken: tuple[Tensor, Tensor] = call(
        torch.ops.ssd_ext.soft_nms.default, boxes, scores, iou_threshold, sigma, score_threshold, number
    )
    return taken


@explained
def soft_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    *,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
    method: str = "linear",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`soft_nms` with outputs of fixed length: no wait for the device, fit for a CUDA graph.

    Args:
        boxes: ``[N, 4]`` corners ``(x1, y1, x2, y2)``, any units.
        scores: ``[N]``, same dtype and device.
        iou_threshold: for ``"linear"``, in 0..1.
        sigma: for ``"gaussian"``, positive.
        score_threshold: any number.
        method: ``"linear"`` or ``"gaussian"``.

    Returns:
        ``(keep, scores, count)``: ``keep`` is ``[N]`` int64, ``scores`` ``[N]``, ``count`` an int64
        scalar. The first ``count`` entries are what :func:`soft_nms` gives, by its rules for order,
        ties and hostile values; the rest of ``keep`` is -1, of ``scores`` 0.

    Raises:
        ValueError: as :func:`soft_nms`.
        RuntimeError: a gradient is asked for.

    Source: as :func:`soft_nms`.
    """
    number = _method_number("soft_nms_padded", method)
    taken: tuple[Tensor, Tensor, Tensor] = call(
        torch.ops.ssd_ext.soft_nms_padded.default, boxes, scores, iou_threshold, sigma, score_threshold, number
    )
    return taken


define(
    "soft_nms(Tensor boxes, Tensor scores, float iou_threshold, float sigma, float score_threshold, int method)"
    " -> (Tensor keep, Tensor scores)",
    torch.Tag.dynamic_output_shape,
    torch.Tag.cudagraph_unsafe,
)


@fake("soft_nms")
def _(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, score_threshold: float, method: int
) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(count, dtype=torch.int64), scores.new_empty(count)


@fake("soft_nms_padded")
def _(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, score_threshold: float, method: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = boxes.shape[0]
    return boxes.new_empty(n, dtype=torch.int64), scores.new_empty(n), boxes.new_empty((), dtype=torch.int64)


for _op in ("soft_nms", "soft_nms_padded"):
    refuse_gradient(_op, "it selects boxes one after another; train on the scores that go into it")
    autocast_to_float32(_op)
