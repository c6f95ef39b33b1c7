"""torchvision's detectors on the ops of ``ssd_ext``: :func:`accelerate` and :func:`restore`.

>>> from torchvision.models.detection import ssd300_vgg16
>>> from ssd_ext.integrations.torchvision import accelerate
>>> model = accelerate(ssd300_vgg16(weights=None, weights_backbone=None))

What is replaced, and what stays torchvision's:

- SSD: post-processing (:func:`ssd_ext.ops.detect`) and the loss (:func:`ssd_ext.ops.multibox_loss`). Matching stays: it
  is part of torchvision's ``forward``.
- RetinaNet: post-processing (``detect``, ``batched_nms``) and the IoUs of matching (``box_iou``). The losses stay.
- FCOS: NMS (``batched_nms``). Matching by centres, the losses and the choice of candidates stay.
- FasterRCNN, so also MaskRCNN and KeypointRCNN: NMS of proposals and of detections, decoding (of candidates alone), the
  IoUs of matching in the RPN and the RoI heads. Sampling and losses stay.

Detections, losses and gradients are torchvision's but for rounding, and for these:

- torchvision's ``batched_nms`` of up to 1000 boxes (on a GPU 25,000) moves those of class ``k`` by ``k`` times the
  largest coordinate, at the cost of bits of their IoUs. Here ids are compared.
- torchvision leaves the order of equal scores, and of equal losses in mining, to its sort. Here the lowest index
  wins: in ``detect`` the lowest class, then the lowest anchor.
- On a CPU, torchvision's NMS compares a float32 IoU with a float64 threshold: an IoU of exactly 6 / 10 is above 0.6,
  as of some other thresholds that float32 rounds up. Here both are float32.
- Where an image has fewer negatives than SSD's mining asks for, torchvision counts positives twice. Here nothing is
  counted twice. An object of label 0, the background, has no part in SSD's box loss, nor in the number of objects that
  both losses are divided by; on a GPU nor has one of a negative label, an error of torchvision.
- ``detect`` and ``multibox_loss`` compute halves in float32. Losses of SSD, and detections of SSD and RetinaNet, are
  float32 at least, in a model in half precision, too. Its anchors are taken as its generator gives them, which has
  rounded them already, not rounded again to the type of the heads.
- Detections of SSD and RetinaNet have no gradient: asking for one is an error.
- SSD's losses have the type of its predictions, whatever that of the boxes of the ground truth.

torchvision's own code runs where the ops do not take a setting: a threshold outside 0..1; no candidates or detections
to keep; negatives for each positive of SSD in a number that is not whole; a coder, similarity or generator of anchors
of your own, or images of several sizes in an SSD. ``torch.jit``, and an export to ONNX by it, take a restored model
only; ``torch.onnx.export(dynamo=True)`` takes an accelerated one with :func:`ssd_ext.export.onnx_translations`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
    from torchvision.models.detection.roi_heads import RoIHeads
    from torchvision.models.detection.rpn import RegionProposalNetwork
    from torchvision.models.detection.ssd import SSD
    from torchvision.ops import box_convert, box_iou, clip_boxes_to_image, remove_small_boxes
except ImportError as _error:
    raise ImportError(
        'ssd_ext.integrations.torchvision needs torchvision 0.26 or newer: pip install "ssd_ext[train]"',
        name="torchvision",
    ) from _error

from ssd_ext import ops

Model = TypeVar("Model", bound=nn.Module)
# What torchvision passes: (h, w) of each image; its targets or detections
Sizes = list[tuple[int, int]]
Images = list[dict[str, Tensor]]


def accelerate(model: Model) -> Model:
    """Let a detector of torchvision compute on the ops of ``ssd_ext``, in place; :func:`restore` undoes it.

    Weights, state, settings, mode, inputs and outputs stay what they are, and so do other models: the class of this
    instance (in a FasterRCNN those of its ``rpn`` and ``roi_heads``) becomes one derived from its own, of the same
    name. It can be copied and pickled; settings may be changed later. Twice is as once.

    Args:
        model: an ``SSD``, ``RetinaNet``, ``FCOS`` or ``FasterRCNN`` of ``torchvision.models.detection``, or of a class
            derived from one; on any device. Of a wrapped or compiled model, give the inner one.

    Returns:
        ``model``.

    Raises:
        TypeError: another model, or one with a version of its own, in its class or on the instance, of a method that
            would be replaced. It is unchanged then.
    """
    parts = [part for part in _parts(model) if not isinstance(part, _OnOps)]
    for part in parts:
        _refuse_own_methods(part)
    for part in parts:
        part.__class__ = _class_on_ops(part.__class__)
    return model


def restore(model: Model) -> Model:
    """Let a detector compute as torchvision made it, in place: undoes :func:`accelerate`.

    Args:
        model: as for :func:`accelerate`; one that is not accelerated stays as it is.

    Returns:
        ``model``.

    Raises:
        TypeError: another model, or one whose class something else, such as FSDP, has replaced since. It is unchanged
            then.
    """
    parts = [part for part in _parts(model) if isinstance(part, _OnOps)]
    for part in parts:
        if not _made_here(type(part)):
            raise TypeError(f"the class of this {type(part).__name__} was replaced after accelerate: undo that first")
    for part in parts:
        part.__class__ = type(part)._original
    return model


def _parts(model: nn.Module) -> list[Any]:
    """The modules whose methods are replaced."""
    if isinstance(model, FasterRCNN):
        for name, kind in (("rpn", RegionProposalNetwork), ("roi_heads", RoIHeads)):
            if not isinstance(getattr(model, name), kind):
                raise TypeError(f"model.{name} must be a {kind.__name__}, got {type(getattr(model, name)).__name__}")
        return [model.rpn, model.roi_heads]
    if isinstance(model, SSD | RetinaNet | FCOS):
        return [model]
    raise TypeError(
        "model must be an SSD, RetinaNet, FCOS or FasterRCNN of torchvision (of a wrapped or compiled model the inner "
        f"one), got {type(model).__name__}"
    )


def _refuse_own_methods(part: nn.Module) -> None:
    replacement = _replacement(type(part))
    for name in vars(replacement):
        if name.startswith("__"):
            continue
        own_class = getattr(type(part), name) is not getattr(replacement.__bases__[-1], name)
        if own_class or name in vars(part):
            raise TypeError(f"this {type(part).__name__} has a {name} of its own, which accelerate would replace")


class _OnOps:
    """Base of the classes below, and so of those that :func:`_class_on_ops` makes."""

    _original: type  # torchvision's class, or one derived from it, that was replaced

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        # pickle and deepcopy cannot find a class that was made at run time
        return (_new, (type(self)._original,), *reduced[2:]) if _made_here(type(self)) else reduced


class _SSD(_OnOps, SSD):
    def compute_loss(
        self, targets: Images, head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        coding = _coding(self.box_coder)
        if not (coding and type(self.anchor_generator) is DefaultBoxGenerator and _whole(self.neg_to_pos_ratio)):
            return super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        # A row of zeros at the end is what the unmatched, of index -1, take: label 0 and a box that is not read.
        matches = [matched.clamp(min=-1) for matched in matched_idxs]
        labels = torch.stack([_padded(target["labels"])[of] for target, of in zip(targets, matches, strict=False)])
        if labels.device.type == "cpu" and (labels < 0).any():  # which torchvision refuses, and the op ignores
            return super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        boxes = torch.stack([_padded(target["boxes"])[of] for target, of in zip(targets, matches, strict=False)])
        loc, conf = ops.multibox_loss(
            head_outputs["bbox_regression"],
            head_outputs["cls_logits"],
            ops.encode(boxes, _priors(anchors[0]), variances=coding["variances"]),
            labels,
            neg_to_pos_ratio=self.neg_to_pos_ratio,
        )
        return {"bbox_regression": loc, "classification": conf}

    def postprocess_detections(
        self, head_outputs: dict[str, Tensor], image_anchors: list[Tensor], image_shapes: Sizes
    ) -> Images:
        coding = _coding(self.box_coder)
        if not (coding and _detect_suits(self, DefaultBoxGenerator) and len(set(image_shapes)) == 1):
            return super().postprocess_detections(head_outputs, image_anchors, image_shapes)
        logits = head_outputs["cls_logits"]
        height, width = image_shapes[0]
        found = ops.detect(
            head_outputs["bbox_regression"],
            logits,
            _priors(image_anchors[0]),
            score_threshold=self.score_thresh,
            iou_threshold=self.nms_thresh,
            topk_per_class=self.topk_candidates,
            max_detections=min(self.detections_per_img, logits[0].numel()),
            window=(0, 0, width, height),
            **coding,
        )
        return ops.unpad(*found)


class _RetinaNet(_OnOps, RetinaNet):
    def compute_loss(
        self, targets: Images, head_outputs: dict[str, list[Tensor]], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        matches = [
            _match(self.proposal_matcher, target["boxes"], of_image)
            for target, of_image in zip(targets, anchors, strict=False)
        ]
        return self.head.compute_loss(targets, head_outputs, anchors, matches)

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: Sizes
    ) -> Images:
        coding = _coding(self.box_coder)
        if not (coding and _detect_suits(self, AnchorGenerator)):
            return super().postprocess_detections(head_outputs, anchors, image_shapes)
        levels = []
        for deltas, logits, of_level in zip(
            head_outputs["bbox_regression"], head_outputs["cls_logits"], anchors[0], strict=True
        ):
            # A level's best of all classes: no IoU is above 1, so nothing is suppressed yet.
            best = min(self.topk_candidates, logits[0].numel())
            levels.append(
                ops.detect(
                    deltas,
                    logits,
                    _priors(of_level),
                    score_threshold=self.score_thresh,
                    iou_threshold=1.0,
                    topk_per_class=best,
                    max_detections=best,
                    activation="sigmoid",
                    **coding,
                )
            )
        boxes, scores, labels = (torch.cat(of_levels, 1) for of_levels in list(zip(*levels, strict=True))[:3])
        scores = scores.masked_fill(labels < 0, torch.nan)  # the padding
        return [
            # torchvision's labels are columns of the logits, which count from 0
            _detections(self, clip_boxes_to_image(boxes[i], shape), scores[i], labels[i] - 1)
            for i, shape in enumerate(image_shapes)
        ]


class _FCOS(_OnOps, FCOS):
    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: Sizes
    ) -> Images:
        if not 0 <= self.nms_thresh <= 1:
            return super().postprocess_detections(head_outputs, anchors, image_shapes)
        found = []
        for i, shape in enumerate(image_shapes):
            levels = []
            for deltas, logits, centerness, of_level in zip(
                head_outputs["bbox_regression"],
                head_outputs["cls_logits"],
                head_outputs["bbox_ctrness"],
                anchors[i],
                strict=True,
            ):
                scores = torch.sqrt(torch.sigmoid(logits[i]) * torch.sigmoid(centerness[i]))
                rows, labels = torch.where(scores > self.score_thresh)
                best, order = scores[rows, labels].topk(min(self.topk_candidates, len(rows)))
                rows = rows[order]
                levels.append((self.box_coder.decode(deltas[i][rows], of_level[rows]), best, labels[order]))
            boxes, scores, labels = (torch.cat(of_levels) for of_levels in zip(*levels, strict=True))
            found.append(_detections(self, clip_boxes_to_image(boxes, shape), scores, labels))
        return found


class _RPN(_OnOps, RegionProposalNetwork):
    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: Images) -> tuple[list[Tensor], list[Tensor]]:
        if self.box_similarity is not box_iou:
            return super().assign_targets_to_anchors(anchors, targets)
        labels, matched_boxes = [], []
        for of_image, target in zip(anchors, targets, strict=False):
            matched = _match(self.proposal_matcher, target["boxes"], of_image)
            labels.append((matched + 1).clamp(max=1).to(torch.float32))  # 1, 0 background, -1 between the thresholds
            matched_boxes.append(_padded(target["boxes"])[matched.clamp(min=0)])
        return labels, matched_boxes

    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: Sizes, num_anchors_per_level: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not 0 <= self.nms_thresh <= 1:
            return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        objectness = objectness.detach().reshape(len(proposals), -1)
        top = self._get_top_n_idx(objectness, num_anchors_per_level)
        scores = torch.sigmoid(objectness.gather(1, top))
        proposals = proposals.gather(1, top[..., None].expand(-1, -1, 4))
        levels = torch.cat([top.new_full((n,), level) for level, n in enumerate(num_anchors_per_level)])[top]
        kept_boxes, kept_scores = [], []
        for i, shape in enumerate(image_shapes):
            boxes = clip_boxes_to_image(proposals[i], shape)
            wanted = (boxes[:, 2:] - boxes[:, :2] >= self.min_size).all(1) & (scores[i] >= self.score_thresh)
            # NMS never keeps a NaN
            ranked = scores[i].where(wanted, torch.nan)
            keep = ops.batched_nms(boxes, ranked, levels[i], self.nms_thresh)[: self.post_nms_top_n()]
            kept_boxes.append(boxes[keep])
            kept_scores.append(scores[i][keep])
        return kept_boxes, kept_scores


class _RoIHeads(_OnOps, RoIHeads):
    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        matched_idxs, labels = [], []
        for of_image, boxes, classes in zip(proposals, gt_boxes, gt_labels, strict=True):
            matched = _match(self.proposal_matcher, boxes, of_image)
            matched_idxs.append(matched.clamp(min=0))
            # 0 background, -1 between the thresholds
            labels.append(torch.where(matched >= 0, _padded(classes)[matched_idxs[-1]], matched + 1))
        return matched_idxs, labels

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: Sizes
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        if not (type(self.box_coder) is BoxCoder and 0 <= self.nms_thresh <= 1):
            return super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        counts = [len(of_image) for of_image in proposals]
        scores = F.softmax(class_logits, -1)
        deltas = box_regression.reshape(*scores.shape, 4)
        found = []
        for of_image, score, delta, shape in zip(
            proposals, scores.split(counts), deltas.split(counts), image_shapes, strict=True
        ):
            rows, labels = torch.where(score[:, 1:] > self.score_thresh)
            labels = labels + 1
            boxes = self.box_coder.decode_single(delta[rows, labels], of_image[rows])
            boxes = clip_boxes_to_image(boxes, shape)
            large = remove_small_boxes(boxes, 1e-2)
            found.append(_detections(self, boxes[large], score[rows, labels][large], labels[large]))
        return (
            [of_image["boxes"] for of_image in found],
            [of_image["scores"] for of_image in found],
            [of_image["labels"] for of_image in found],
        )


_REPLACEMENTS = (_SSD, _RetinaNet, _FCOS, _RPN, _RoIHeads)


def _replacement(original: type) -> type:
    return next(made for made in _REPLACEMENTS if issubclass(original, made.__bases__[-1]))


@cache
def _class_on_ops(original: type) -> type[nn.Module]:
    names = {"__doc__": original.__doc__, "_original": original}
    return type(original.__name__, (_replacement(original), original), names)


def _made_here(kind: type) -> bool:
    """Whether it is a class of :func:`_class_on_ops`, not one that was derived from it later."""
    return "_original" in vars(kind)


def _new(original: type) -> nn.Module:
    made = _class_on_ops(original)
    return made.__new__(made)


def _coding(coder: Any) -> dict[str, Any] | None:
    """The arguments by which ops decode as ``coder`` does; None where they cannot."""
    if type(coder) is not BoxCoder:
        return None
    x, y, width, height = coder.weights
    if (x, width) != (y, height):
        return None
    return {"variances": (1 / x, 1 / width), "bbox_xform_clip": coder.bbox_xform_clip}


def _detect_suits(model: SSD | RetinaNet, generator: type) -> bool:
    """Whether ``detect`` takes the thresholds and counts, and all images have the same anchors, which it expects."""
    return (
        type(model.anchor_generator) is generator
        and 0 <= model.score_thresh <= 1
        and 0 <= model.nms_thresh <= 1
        and min(model.topk_candidates, model.detections_per_img) >= 1
    )


def _whole(ratio: float) -> bool:
    """Of a part of a negative torchvision makes a whole one, ``multibox_loss`` none."""
    return ratio >= 0 and float(ratio).is_integer()


def _priors(corners: Tensor) -> Tensor:
    """Centre and size, float32 at least: the coder of torchvision rounds anchors to the type of the heads."""
    return box_convert(corners.to(torch.promote_types(corners.dtype, torch.float32)), "xyxy", "cxcywh")


def _padded(rows: Tensor) -> Tensor:
    """With one more row, of zeros, so that there is one to take where an image has no object."""
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])


def _match(matcher: Callable[[Tensor], Tensor], gt_boxes: Tensor, anchors: Tensor) -> Tensor:
    """``[P]`` int64: what the model's matcher makes of the IoUs, the same bits as torchvision's; without objects -1."""
    if len(gt_boxes) == 0:
        return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    dtype = torch.promote_types(torch.promote_types(gt_boxes.dtype, anchors.dtype), torch.float32)
    iou = ops.box_iou(gt_boxes.to(dtype), anchors.to(dtype))
    # There box_iou gives 0; as torchvision does, let a NaN reach the loss, where it is seen.
    return matcher(iou.masked_fill_(gt_boxes.isnan().any(1, keepdim=True), torch.nan))


def _detections(model: RetinaNet | FCOS | RoIHeads, boxes: Tensor, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of an image's candidates those that NMS keeps, the best first."""
    keep = ops.batched_nms(boxes, scores, labels, model.nms_thresh)[: model.detections_per_img]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
