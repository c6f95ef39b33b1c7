"""Matching of priors with ground truth: match, assign_targets."""

import warnings

import torch
from torch import Tensor

from ssd_ext._arguments import explained
from ssd_ext.ground_truth import GroundTruth, Targets, as_ground_truth
from ssd_ext.ops._library import autocast_to_float32, call, define, fake, implement, no_gradient, refuse_gradient

FORCE = {"none": 0, "last": 1, "bipartite": 2}


@explained
def match(
    ground_truth: GroundTruth | Targets,
    priors: Tensor,
    *,
    iou_threshold: float = 0.5,
    low_threshold: float | None = None,
    force: str = "bipartite",
    min_force_iou: float | None = 0.0,
    validate: bool = False,
) -> Tensor:
    """Match every prior of every image with a ground-truth box, or with none.

    A prior takes the ground truth of highest IoU (ties: the lowest index) where that IoU is at least
    ``iou_threshold``. Then ground truths claim priors by ``force``, where their IoU is above ``min_force_iou``.

    Args:
        ground_truth: the objects of ``B`` images, see :class:`ssd_ext.GroundTruth`; or a list with a dict
            ``{"boxes": [G_b, 4], "labels": [G_b]}`` for each image. Boxes are corners ``(x1, y1, x2, y2)``;
            float32, float64, float16 or bfloat16; the halves compute in float32. In a CUDA graph give a
            ``GroundTruth``, as the lengths in a list are copied from the host.
        priors: ``[P, 4]`` centre and size ``(cx, cy, w, h)``, in the units, dtype and device of the boxes.
        iou_threshold: in 0..1; a prior is matched from this IoU on (``>=``).
        low_threshold: if given, priors whose best IoU is from here up to ``iou_threshold`` are ignored.
        force: ``"bipartite"``: the pair of highest IoU is joined first, then the best of the ground
            truths and priors left, so every ground truth gets a prior while priors that overlap it last (ties: the
            lowest prior, then the lowest ground truth). ``"last"``: each ground truth claims its best
            prior (ties: the lowest); of several that claim one prior the last has it. ``"none"``.
        min_force_iou: in 0..1; ``force`` joins a ground truth and a prior only where their IoU is above (``>``), by
            default only where they overlap. ``None``: whatever the IoU, so that an object outside of all
            priors gets one too, as in torchvision.
        validate: raise for a ground truth that cannot be matched or whose label is below 1 and not -1, and
            warn of priors that look like corners. This synchronises with the GPU.

    Returns:
        ``[B, P]`` int64: the index of the ground truth within its image, ``-1`` background, ``-2``
        ignored. A ground truth with a non-finite coordinate or without positive area is never matched.

    Raises:
        ValueError: wrong shape, dtype or device; thresholds or ``min_force_iou`` outside 0..1, or thresholds crossed;
            an unknown ``force``; on the CPU, offsets that do not ascend from 0 to at most ``G`` (on a
            GPU, which is not waited for, images from the first offset that is wrong on
            get no match); with ``validate``, a bad ground truth (names image, box and value).

    Source: ``"bipartite"``: Liu et al., SSD (2016), section 2.2 "Matching strategy" and its Caffe code;
    ``"last"``: torchvision's ``SSDMatcher`` and amdegroot's ``ssd.pytorch``; ``min_force_iou``: ``min_pos_iou`` of
    mmdetection's ``MaxIoUAssigner``.
    """
    gt = as_ground_truth(ground_truth, priors)
    if validate and torch.compiler.is_compiling():
        gt = _validated_in_graph(gt, priors)
    low = iou_threshold if low_threshold is None else low_threshold
    matches: Tensor = torch.ops.ssd_ext.match.default(
        gt.boxes, gt.offsets, priors, iou_threshold, low, _force(force), min_force_iou
    )
    if validate and not torch.compiler.is_compiling():
        _validate(gt, priors)
    return matches


@explained
def assign_targets(
    ground_truth: GroundTruth | Targets,
    priors: Tensor,
    *,
    iou_threshold: float = 0.5,
    low_threshold: float | None = None,
    force: str = "bipartite",
    min_force_iou: float | None = 0.0,
    variances: tuple[float, float] = (0.1, 0.2),
    validate: bool = False,
    num_classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Training targets of SSD's two heads: :func:`match`, then the label and :func:`encode` of each match.

    ``multibox_loss(deltas, logits, *assign_targets(ground_truth, priors))`` is the loss of SSD.

    Args:
        ground_truth: as for :func:`match`. Labels are int64 classes, 1 or more (0 is background). A region to ignore,
            of label -1, is matched as an object is: the priors that match it are ignored.
        priors: ``[P, 4]`` centre and size.
        iou_threshold: as for :func:`match`.
        low_threshold: as for :func:`match`.
        force: as for :func:`match`.
        min_force_iou: as for :func:`match`.
        variances: of centre and size, as for :func:`encode`.
        validate: as for :func:`match`; also raise for a label that is not below ``num_classes``. Without it
            labels are copied as they are.
        num_classes: number of classes with background, 2 or more; only with ``validate``.

    Returns:
        ``target_deltas``: ``[B, P, 4]``, the encoded ground truth where matched, else 0. ``target_labels``:
        ``[B, P]`` int64, 0 background, -1 ignored. Both are constants: no gradient.

    Raises:
        ValueError: as for :func:`match`; labels of wrong shape or dtype; with ``validate``, a label out of
            range (names image, box, label and the range).
        RuntimeError: a gradient is asked for.

    Source: Liu et al., SSD (2016), sections 2.2 and eq. 2; torchvision's ``SSD.compute_loss``.
    """
    if num_classes is not None and not (validate and num_classes >= 2):
        raise ValueError(f"num_classes needs validate=True and must be at least 2, got {num_classes}, {validate=}")
    gt = as_ground_truth(ground_truth, priors)
    if validate and torch.compiler.is_compiling():
        gt = _validated_in_graph(gt, priors, num_classes)
    low = iou_threshold if low_threshold is None else low_threshold
    targets: tuple[Tensor, Tensor] = call(
        torch.ops.ssd_ext.assign_targets.default,
        gt.boxes,
        gt.labels,
        gt.offsets,
        priors,
        iou_threshold,
        low,
        _force(force),
        min_force_iou,
        list(variances),
    )
    if validate and not torch.compiler.is_compiling():
        _validate(gt, priors, num_classes)
    return targets


def _force(force: str) -> int:
    if force not in FORCE:
        raise ValueError(f"force must be one of {', '.join(map(repr, FORCE))}, got {force!r}")
    return FORCE[force]


def _validate(gt: GroundTruth, priors: Tensor, num_classes: int | None = None) -> None:
    gt.validate(num_classes)
    # Of a grid of so many cells some have their centre further out than any prior is large.
    if (priors[:, 2:] > priors[:, :2]).all() and len(priors[:, :2].unique(dim=0)) >= 16:
        warnings.warn(
            "priors look like corners (x1, y1, x2, y2), but must be (cx, cy, w, h): "
            'torchvision.ops.box_convert(anchors, "xyxy", "cxcywh") converts them',
            stacklevel=4,
        )


# What validates in a graph. It gives the offsets, without which the graph would have no need of it.
define("validated_offsets(Tensor boxes, Tensor labels, Tensor offsets, Tensor priors, int? num_classes) -> Tensor")


def _validated_in_graph(gt: GroundTruth, priors: Tensor, num_classes: int | None = None) -> GroundTruth:
    return gt._replace(offsets=torch.ops.ssd_ext.validated_offsets.default(*gt, priors, num_classes))


@implement("validated_offsets")
def _(boxes: Tensor, labels: Tensor, offsets: Tensor, priors: Tensor, num_classes: int | None) -> Tensor:
    gt = GroundTruth(boxes, labels, offsets)
    match(gt, priors[:0])  # checks the shapes
    _validate(gt, priors, num_classes)
    return offsets.clone()


@fake("validated_offsets")
def _(boxes: Tensor, labels: Tensor, offsets: Tensor, priors: Tensor, num_classes: int | None) -> Tensor:
    return torch.empty_like(offsets)


@fake("match")
def _(
    gt_boxes: Tensor,
    offsets: Tensor,
    priors: Tensor,
    iou_threshold: float,
    low_threshold: float,
    force: int,
    min_force_iou: float | None,
) -> Tensor:
    return offsets.new_empty(offsets.shape[0] - 1, priors.shape[0])


@fake("assign_targets")
def _(
    gt_boxes: Tensor,
    gt_labels: Tensor,
    offsets: Tensor,
    priors: Tensor,
    iou_threshold: float,
    low_threshold: float,
    force: int,
    min_force_iou: float | None,
    variances: list[float],
) -> tuple[Tensor, Tensor]:
    labels = offsets.new_empty(offsets.shape[0] - 1, priors.shape[0])
    return gt_boxes.new_empty(*labels.shape, 4), labels


no_gradient("match")
refuse_gradient("assign_targets", "targets are constants (pass boxes that require no gradient)")
for _op in ("match", "assign_targets"):
    autocast_to_float32(_op)
