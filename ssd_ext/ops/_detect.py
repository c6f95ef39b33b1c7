"""Logits and deltas of a batch to detections: detect, unpad."""

import torch
from torch import Tensor

from ssd_ext._arguments import explained
from ssd_ext.ops._boxes import BBOX_XFORM_CLIP
from ssd_ext.ops._library import autocast_to_float32, call, fake, promoted, refuse_gradient

_SIGMOID = {"softmax": False, "sigmoid": True}


@explained
def detect(
    deltas: Tensor,
    logits: Tensor,
    priors: Tensor,
    *,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.45,
    topk_per_class: int = 400,
    max_detections: int = 200,
    activation: str = "softmax",
    variances: tuple[float, float] = (0.1, 0.2),
    bbox_xform_clip: float = BBOX_XFORM_CLIP,
    class_agnostic: bool = False,
    window: tuple[float, float, float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn a detector's outputs into detections: scores, threshold, decoding and NMS of a batch in one call.

    In each image: scores; those above ``score_threshold`` are candidates; of each class the ``topk_per_class``
    best; NMS among them; the ``max_detections`` best of all classes.

    Args:
        deltas: ``[B, P, 4]`` as :func:`ssd_ext.ops.encode` gives them. The three tensors may be float32, float64,
            float16 or bfloat16 independently, on one device, and are read as they are.
        logits: ``[B, P, C]``. Any strides, so a head's ``[B, C, P]`` is best passed as ``logits.mT``: it is not copied.
            (Under autocast all three are cast to float32 first, which copies halves.)
        priors: ``[P, 4]`` centre and size ``(cx, cy, w, h)``. Keep them in float32 beside heads in half precision,
            which does not hold their positions.
        score_threshold: in 0..1; a score is a candidate's above it (``>``).
        iou_threshold: in 0..1; a box is suppressed where its IoU with a kept box is above (``>``).
        topk_per_class: candidates of each class that NMS looks at, 1 or more.
        max_detections: ``K``, 1 or more.
        activation: ``"softmax"``: a prior's scores are the softmax of its row; column 0 is background
            and never detected. ``"sigmoid"``: each element's own sigmoid; there is no background, and
            column ``k - 1`` is class ``k`` (RetinaNet).
        variances: of centre and size, as for :func:`ssd_ext.ops.decode`.
        bbox_xform_clip: upper bound of decoded sizes, as for :func:`ssd_ext.ops.decode`.
        class_agnostic: boxes suppress those of other classes too.
        window: ``(x1, y1, x2, y2)`` that boxes are clipped to before NMS, in the units of ``priors``,
            one for all images; usually the image. Boxes that are returned in half precision are rounded to its inside.
            ``None``: they are not clipped.

    Returns:
        ``boxes``: ``[B, K, 4]`` corners ``(x1, y1, x2, y2)`` in the units of ``priors``. ``scores``:
        ``[B, K]``, descending. ``labels``: ``[B, K]`` int64, classes from 1 on. ``counts``:
        ``[B]`` int64, how many of an image's ``K`` are detections; the others have box 0, score 0
        and label -1. :func:`unpad` makes a list of them.

        Boxes and scores have one dtype, as NMS asks for: what those of ``deltas``, ``logits`` and ``priors`` promote to
        (``torch.promote_types``), so float32 of heads in half precision beside float32 priors. In float64 all is
        computed in float64, else in float32.

    Ties: of equal scores the lowest class comes first, then the lowest prior, in the order of the
    result and in the choice of the best. A NaN score is never detected (softmax: nor is anything of
    a row with a NaN or +inf logit); a box with a NaN or infinite coordinate suppresses nothing and is
    not suppressed. Which boxes are found, and their scores, agree to the bit between CPU and CUDA.

    Memory beside inputs and outputs, in keys of 8 bytes (16 for float64), ``k = min(topk_per_class, P)``.
    CPU: at most ``16 max(4096, 16 K)`` keys a thread; an image of which NMS leaves too few of them takes a
    second pass over its logits, with at most ``6 C k`` keys. CUDA: ``B C k`` keys, 8 bytes (16) a row of
    logits under softmax, 4 a class of each image, 12 an image, and with ``K > 256`` 20 (36) a detection.

    Not differentiable. No wait for the GPU; fits into a CUDA graph.

    Raises:
        ValueError: wrong shape, dtype or device; a threshold outside 0..1; a ``topk_per_class`` or
            ``max_detections`` below 1; an unknown ``activation``; a variance that is not positive; a
            NaN ``bbox_xform_clip``; a ``window`` that is not four numbers or inverted; 2^31 or more logits an image; on
            CUDA, 2^28 or more images, or ``B * (P / 64 + 1)`` of 2^31 or more.
        RuntimeError: a gradient is asked for.

    Source: Liu et al., SSD (2016), section 2.2; torchvision's ``SSD.postprocess_detections``, whose
    ``topk`` leaves the order of ties open.
    """
    if activation not in _SIGMOID:
        raise ValueError(f"ssd_ext::detect: activation must be 'softmax' or 'sigmoid', got {activation!r}")
    found: tuple[Tensor, Tensor, Tensor, Tensor] = call(
        torch.ops.ssd_ext.detect.default,
        deltas,
        logits,
        priors,
        score_threshold,
        iou_threshold,
        topk_per_class,
        max_detections,
        _SIGMOID[activation],
        list(variances),
        bbox_xform_clip,
        class_agnostic,
        None if window is None else list(window),
    )
    return found


@explained
def unpad(boxes: Tensor, scores: Tensor, labels: Tensor, counts: Tensor) -> list[dict[str, Tensor]]:
    """The detections of :func:`ssd_ext.ops.detect` image by image, as torchvision's detectors return them.

    Args:
        boxes: ``[B, K, 4]``.
        scores: ``[B, K]``.
        labels: ``[B, K]``.
        counts: ``[B]``. They are copied to the host: on CUDA this waits for the device.

    Returns:
        For each image ``{"boxes": [N, 4], "scores": [N], "labels": [N]}``, views of the arguments.
    """
    return [
        {"boxes": boxes[b, :n], "scores": scores[b, :n], "labels": labels[b, :n]} for b, n in enumerate(counts.tolist())
    ]


@fake("detect")
def _(
    deltas: Tensor,
    logits: Tensor,
    priors: Tensor,
    score_threshold: float,
    iou_threshold: float,
    topk_per_class: int,
    max_detections: int,
    sigmoid: bool,
    variances: list[float],
    bbox_xform_clip: float,
    class_agnostic: bool,
    window: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = logits.shape[0], max_detections
    scores = logits.new_empty(shape, dtype=promoted(deltas, logits, priors))
    labels = logits.new_empty(shape, dtype=torch.int64)
    return scores.new_empty(*shape, 4), scores, labels, labels.new_empty(shape[0])


refuse_gradient(
    "detect",
    "it selects boxes; train on the deltas and logits that go into it (a detector of torchvision that accelerate() "
    "changed has detections with gradients again after restore())",
)
autocast_to_float32("detect")
