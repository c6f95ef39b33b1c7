"""Matching of priors with ground truth: match, assign_targets."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ssd_ext.ops._library import autocast_to_float32, call, fake, no_gradient, refuse_gradient

FORCE = {"none": 0, "last": 1, "bipartite": 2}

# One tensor an image, or all images' rows in one tensor with offsets [B + 1].
Ragged = Sequence[Tensor] | tuple[Tensor, Tensor]


def match(
    gt_boxes: Ragged,
    priors: Tensor,
    iou_threshold: float = 0.5,
    low_threshold: float | None = None,
    *,
    force: str = "bipartite",
    validate: bool = False,
) -> Tensor:
    """Match every prior of every image with a ground-truth box, or with none.

    A prior takes the ground truth of highest IoU (ties: the lowest index) where that IoU is at least
    ``iou_threshold``. Then ground truths claim priors by ``force``, whatever the IoU.

    Args:
        gt_boxes: corners ``(x1, y1, x2, y2)``: a list of ``[G_b, 4]`` tensors, one an image (``[0]``
            counts as none), or ``(boxes[G, 4], offsets[B + 1])``, where image ``b`` owns the rows
            ``offsets[b]`` up to ``offsets[b + 1]`` (int64, same device; the form for a CUDA graph,
            since a list's lengths are copied from the host). float32, float64, float16 or bfloat16;
            the halves compute in float32.
        priors: ``[P, 4]`` centre and size ``(cx, cy, w, h)``, in the units, dtype and device of
            ``gt_boxes``.
        iou_threshold: matched from here (``>=``).
        low_threshold: if given, priors whose best IoU is from here up to ``iou_threshold`` are ignored.
        force: ``"bipartite"``: the pair of highest IoU is joined first, then the best of the ground
            truths and priors left, so every ground truth gets a prior while priors last (ties: the
            lowest prior, then the lowest ground truth). ``"last"``: each ground truth claims its best
            prior (ties: the lowest); of several that claim one prior the last has it. ``"none"``.
        validate: raise for a ground truth that cannot be matched. This synchronises with the GPU.

    Returns:
        ``[B, P]`` int64: the index of the ground truth within its image, ``-1`` background, ``-2``
        ignored. A ground truth with a non-finite coordinate or without positive area is never matched.

    Raises:
        ValueError: wrong shape, dtype or device; thresholds outside 0..1 or crossed; an unknown
            ``force``; on the CPU, offsets that fall or do not cover ``gt_boxes`` (on a
            GPU, which is not waited for, images from the first offset that falls or leaves 0..G on
            get no match); with ``validate``, a bad ground truth (names image, box and coordinates).

    Source: ``"bipartite"``: Liu et al., SSD (2016), section 2.2 "Matching strategy" and its Caffe code;
    ``"last"``: torchvision's ``SSDMatcher`` and amdegroot's ``ssd.pytorch``.
    """
    boxes, offsets = _rows(gt_boxes, priors)
    low = iou_threshold if low_threshold is None else low_threshold
    matches: Tensor = torch.ops.ssd_ext.match.default(boxes, offsets, priors, iou_threshold, low, _force(force))
    if validate:
        _validate(boxes, None, offsets, None)
    return matches


def assign_targets(
    gt_boxes: Ragged,
    gt_labels: Sequence[Tensor] | Tensor,
    priors: Tensor,
    iou_threshold: float = 0.5,
    low_threshold: float | None = None,
    *,
    force: str = "bipartite",
    variances: tuple[float, float] = (0.1, 0.2),
    validate: bool = False,
    num_classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Training targets of SSD's two heads: :func:`match`, then the label and :func:`encode` of each match.

    Args:
        gt_boxes: as for :func:`match`.
        gt_labels: int64 class of each ground truth, 1 or more (0 is background): a list of ``[G_b]``
            tensors, or ``[G]`` beside ``(boxes, offsets)``.
        priors: ``[P, 4]`` centre and size.
        iou_threshold: as for :func:`match`.
        low_threshold: as for :func:`match`.
        force: as for :func:`match`.
        variances: of centre and size, as for :func:`encode`.
        validate: raise for a ground truth that cannot be matched and for a label below 1 (or not below
            ``num_classes``). This synchronises with the GPU. Without it labels are copied as they are.
        num_classes: classes with background, 2 or more; only with ``validate``.

    Returns:
        ``labels``: ``[B, P]`` int64, 0 background, -1 ignored. ``deltas``: ``[B, P, 4]``, the encoded
        ground truth where matched, else 0. Both constants: no gradient.

    Raises:
        ValueError: as for :func:`match`; labels of wrong shape or dtype; with ``validate``, a label out of
            range (names image, box, label and the range).
        RuntimeError: a gradient is asked for.

    Source: Liu et al., SSD (2016), sections 2.2 and eq. 2; torchvision's ``SSD.compute_loss``.
    """
    if num_classes is not None and not (validate and num_classes >= 2):
        raise ValueError(f"num_classes needs validate=True and must be at least 2, got {num_classes}, {validate=}")
    boxes, offsets = _rows(gt_boxes, priors)
    labels = _labels(gt_labels, gt_boxes, boxes)
    low = iou_threshold if low_threshold is None else low_threshold
    targets: tuple[Tensor, Tensor] = call(
        torch.ops.ssd_ext.assign_targets.default,
        boxes,
        labels,
        offsets,
        priors,
        iou_threshold,
        low,
        _force(force),
        list(variances),
    )
    if validate:
        _validate(boxes, labels, offsets, num_classes)
    return targets


def _force(force: str) -> int:
    if force not in FORCE:
        raise ValueError(f"force must be one of {', '.join(map(repr, FORCE))}, got {force!r}")
    return FORCE[force]


def _is_pair(value: Any) -> TypeGuard[tuple[Tensor, Tensor]]:
    return isinstance(value, tuple) and len(value) == 2 and not value[1].is_floating_point()


def _rows(gt_boxes: Ragged, like: Tensor) -> tuple[Tensor, Tensor]:
    """(boxes [G, 4], offsets [B + 1]) of either form of ragged boxes."""
    if isinstance(gt_boxes, Tensor):
        raise ValueError(
            f"gt_boxes must be a list of [G, 4] tensors or (boxes, offsets), got one tensor {_shape(gt_boxes)}"
        )
    if _is_pair(gt_boxes):
        return gt_boxes
    offsets = [0]
    images: list[Tensor] = []
    for b, boxes in enumerate(gt_boxes):
        if boxes.dim() == 1 and boxes.shape[0] == 0:
            boxes = boxes.reshape(0, 4)
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"gt_boxes[{b}] must be [G, 4], got {_shape(boxes)}")
        offsets.append(offsets[-1] + boxes.shape[0])
        if boxes.shape[0] == 0:
            continue  # torch.tensor([]) is float32 and on the CPU, whatever the other images are
        if images and boxes.dtype != images[0].dtype:
            raise ValueError(f"gt_boxes[{b}] must have the dtype of the others, {images[0].dtype}, got {boxes.dtype}")
        images.append(boxes)
    rows = _joined(images) if images else like.new_empty(0, 4)
    return rows, torch.tensor(offsets).to(rows.device, non_blocking=True)


def _labels(gt_labels: Sequence[Tensor] | Tensor, gt_boxes: Ragged, rows: Tensor) -> Tensor:
    """[G] labels that go with ``rows``."""
    if isinstance(gt_labels, Tensor):
        if not _is_pair(gt_boxes):
            raise ValueError(f"gt_labels must be a list like gt_boxes, got one tensor {_shape(gt_labels)}")
        return gt_labels
    if _is_pair(gt_boxes):
        raise ValueError("gt_labels must be one [G] tensor to go with (boxes, offsets), got a list")
    counts = [len(boxes) for boxes in gt_boxes]
    if [len(labels) for labels in gt_labels] != counts:
        raise ValueError(f"gt_labels must have {counts} entries as gt_boxes, got {[len(x) for x in gt_labels]}")
    # torch.tensor([]) is float32: a list without any label says nothing of its dtype
    full = [labels for labels in gt_labels if len(labels)]
    return _joined(full) if full else torch.empty(0, dtype=torch.int64, device=rows.device)


def _joined(tensors: list[Tensor]) -> Tensor:
    """Their rows; of one tensor without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _validate(boxes: Tensor, labels: Tensor | None, offsets: Tensor, num_classes: int | None) -> None:
    """Raise for the first ground truth that cannot be matched or whose label is out of range."""

    def where(row: int) -> str:
        image = int(torch.searchsorted(offsets, torch.tensor(row, device=offsets.device), right=True)) - 1
        return f"image {image}, box {row - int(offsets[image])}"

    corners = boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes
    extent = corners[:, 2:] - corners[:, :2]
    bad = ~(
        torch.isfinite(corners).all(1) & (extent > 0).all(1) & torch.isfinite(extent.prod(1)) & (extent.prod(1) > 0)
    )
    for row in bad.nonzero().flatten().tolist()[:1]:
        raise ValueError(
            "ground truth must be finite (x1, y1, x2, y2) with x1 < x2, y1 < y2 and an area that its dtype holds, "
            f"got {boxes[row].tolist()} "
            f"({where(row)})"
        )
    if labels is None:
        return
    top = torch.iinfo(torch.int64).max if num_classes is None else num_classes - 1
    for row in ((labels < 1) | (labels > top)).nonzero().flatten().tolist()[:1]:
        valid = "1 or more" if num_classes is None else f"in 1..{top}"
        raise ValueError(f"label must be {valid} (0 is background), got {int(labels[row])} ({where(row)})")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


@fake("match")
def _(
    gt_boxes: Tensor, offsets: Tensor, priors: Tensor, iou_threshold: float, low_threshold: float, force: int
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
    variances: list[float],
) -> tuple[Tensor, Tensor]:
    labels = offsets.new_empty(offsets.shape[0] - 1, priors.shape[0])
    return labels, gt_boxes.new_empty(*labels.shape, 4)


no_gradient("match")
refuse_gradient("assign_targets", "targets are constants (pass gt_boxes.detach())")
for _op in ("match", "assign_targets"):
    autocast_to_float32(_op)
