"""Average precision of detections: Pascal VOC's two rules, and COCO's metrics through pycocotools.

Detections are what the models give, one ``{"boxes", "scores", "labels"}`` an image; targets are those of a
:class:`ssd_ext.data.Dataset`, in the same order. Boxes are corners ``(x1, y1, x2, y2)`` in pixels, labels count from 1.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssd_ext import ops

if TYPE_CHECKING:
    from ssd_ext.data import Dataset

Detections = Sequence[Mapping[str, Tensor]]

COCO_METRICS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)


@dataclass(frozen=True)
class Result:
    """What :func:`average_precision` found; entry ``c`` of each is of label ``c + 1``.

    Attributes:
        ap: ``[C - 1]`` float64 in 0..1, NaN for a class without an object to find.
        mAP: their mean without the NaN; NaN if there is none.
        precision: a float64 ``[D_c]`` of each class: of its 1, 2, ... best scored detections.
        recall: likewise.
        scores: ``[D_c]`` of each class, descending: the score from which on those are counted.
        objects: ``[C - 1]`` int64, the objects to find.
        iou_threshold: from which on a detection finds an object.
        rule: ``"area"`` or ``"11point"``.
    """

    ap: Tensor
    mAP: float
    precision: list[Tensor]
    recall: list[Tensor]
    scores: list[Tensor]
    objects: Tensor
    iou_threshold: float
    rule: str


def average_precision(
    detections: Detections, targets: Detections, num_classes: int, iou_threshold: float = 0.5, rule: str = "area"
) -> Result:
    """Average precision of each class by the rules of Pascal VOC.

    A detection stands for the object of its class and image with the largest IoU (of equal ones the first), if that is
    ``iou_threshold`` or more. In the order of scores, over all images, the first detection of an object is right, each
    further one wrong, and so is one without an object. Of equal scores the first counts first, image by image. A
    detection of a difficult object counts neither way; nor does one, without an object, that is in a crowd of its
    class by ``iou_threshold`` of its own area or more.

    Unlike COCO, a detection does not turn to the second best object where the best is taken, all detections of an
    image count, and the area under the curve is exact, not sampled at 101 recalls.

    A detection with a NaN score is left out; one with a NaN or infinite coordinate finds nothing, hence is wrong.

    Args:
        detections: of each image ``boxes [D, 4]``, ``scores [D]``, ``labels [D]`` in ``1..C - 1``; in any order.
        targets: of each image ``boxes [G, 4]``, ``labels [G]``, and where given ``difficult [G]`` and ``crowd [G]``.
        num_classes: ``C``, with the background.
        iou_threshold: above 0, up to 1.
        rule: ``"area"``, under the curve made monotonic (VOC from 2010 on), or ``"11point"``, the mean of the largest
            precision at a recall of 0, 0.1, ... 1 or more (VOC 2007).

    Raises:
        ValueError: lists of different length, a label out of range, another rule or threshold.

    Source: Everingham et al., The PASCAL VOC Challenge (2010), section 4.2, and its development kit's ``VOCevaldet``.
    """
    if rule not in ("area", "11point"):
        raise ValueError(f'rule must be "area" or "11point": got {rule!r}')
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in (0, 1]: got {iou_threshold}")
    _check(detections, targets, num_classes)
    labels, scores, found, ignored, objects = _match(detections, targets, num_classes, iou_threshold)

    order = torch.argsort(scores, descending=True, stable=True)
    labels, scores, found, ignored = (values[order] for values in (labels, scores, found, ignored))
    right = _first_of_each(found)
    counted = ~ignored
    curves = []
    for label in range(1, num_classes):
        mine = counted & (labels == label)
        curves.append((right[mine].cumsum(0), scores[mine]))
    precision = [hits / torch.arange(1, len(hits) + 1, dtype=torch.float64) for hits, _ in curves]
    recall = [hits / total.double() for (hits, _), total in zip(curves, objects, strict=True)]
    ap = torch.full((num_classes - 1,), torch.nan, dtype=torch.float64)
    for index in objects.nonzero()[:, 0].tolist():
        hits = curves[index][0]
        ap[index] = (_area if rule == "area" else _eleven_points)(hits, precision[index], int(objects[index]))
    return Result(
        ap, ap.nanmean().item(), precision, recall, [scores for _, scores in curves], objects, iou_threshold, rule
    )


def coco_metrics(detections: Detections, targets: "Dataset | Detections") -> dict[str, float]:
    """The twelve metrics of COCO, by pycocotools, without its printing.

    Crowds are ignored as COCO does, and difficult objects as crowds are. A detection with a NaN score is left out, one
    with a NaN or infinite coordinate finds nothing. Of an image and class, the 100 best detections count.

    Args:
        detections: of each image.
        targets: a :class:`ssd_ext.data.Dataset`, or a list of its targets, in the same order. The sizes small, medium
            and large go by ``area`` where a target has it, else by its boxes.

    Returns:
        ``AP`` (mean over IoU 0.50:0.05:0.95), ``AP50``, ``AP75``, ``AP_small`` (to 32 x 32 pixels), ``AP_medium``,
        ``AP_large`` (from 96 x 96), the mean recalls ``AR_1``, ``AR_10``, ``AR_100`` (with so many detections an image
        and class), ``AR_small``, ``AR_medium``, ``AR_large``; in 0..1, NaN where there is no object.

    Raises:
        ValueError: lists of different length, a label below 1.
        ImportError: without pycocotools.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError('coco_metrics needs pycocotools: pip install "ssd_ext[train]"', name="pycocotools") from error
    if hasattr(targets, "target"):
        targets = [targets.target(index) for index in range(len(targets))]
    _check(detections, targets)
    images = [{"id": index} for index in range(len(targets))]
    categories = [{"id": label} for label in sorted({label for image in targets for label in image["labels"].tolist()})]

    def database(objects: list[dict[str, Any]]) -> COCO:
        coco = COCO()
        numbered = [thing | {"id": number} for number, thing in enumerate(objects, 1)]  # id 0 would count as no match
        coco.dataset = {"images": images, "categories": categories, "annotations": numbered}
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(database(_coco_targets(targets)), database(_coco_detections(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [float("nan") if value == -1 else float(value) for value in evaluation.stats]
    return dict(zip(COCO_METRICS, values, strict=True))


def coco_results(dataset: "Dataset", detections: Detections) -> list[dict[str, Any]]:
    """Detections in COCO's format of results, ready for ``json.dump``.

    Args:
        dataset: the :class:`ssd_ext.data.Dataset`, whose image and category ids are written.
        detections: of each image, in the same order.

    Returns:
        ``{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`` of each detection, without those that
        have a NaN score.
    """
    return [
        {
            "image_id": dataset.image_ids[row["image_id"]],
            "category_id": dataset.category_ids[row["category_id"] - 1],
            "bbox": row["bbox"],
            "score": row["score"],
        }
        for row in _coco_detections(detections)
    ]


def plot_pr_curves(result: Result, classes: Sequence[str], path: str | Path) -> None:
    """Draw precision over recall of each class into a picture.

    Args:
        result: of :func:`average_precision`.
        classes: names of the labels from 1 on.
        path: of the picture; its suffix gives the format.

    Raises:
        ValueError: another number of names than of classes.
        ImportError: without matplotlib.
    """
    if len(classes) != len(result.ap):
        raise ValueError(f"classes must be {len(result.ap)} names: got {len(classes)}")
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_pr_curves needs matplotlib: pip install "ssd_ext[train]"', name="matplotlib") from error
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot(
        xlim=(0, 1.01),
        ylim=(0, 1.01),
        xlabel="recall",
        ylabel="precision",
        title=f"mAP {result.mAP:.3f} at IoU {result.iou_threshold:g} ({result.rule})",
    )
    shown = result.objects.nonzero()[:, 0].tolist()
    colors = colormaps["tab20" if len(shown) > 10 else "tab10"].colors
    for rank, index in enumerate(sorted(shown, key=lambda index: -result.ap[index])):
        recall, precision = result.recall[index].tolist(), result.precision[index].tolist()
        label = f"{classes[index]} {result.ap[index]:.3f} ({int(result.objects[index])})"
        axes.plot([0, *recall], [*precision[:1], *precision], label=label, color=colors[rank % len(colors)])
    if shown:
        columns = -(-len(shown) // 30)
        axes.legend(title="class, AP (objects)", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, ncols=columns)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _check(detections: Detections, targets: Detections, num_classes: int | None = None) -> None:
    if len(detections) != len(targets):
        raise ValueError(f"detections must be of the {len(targets)} images of targets: got {len(detections)}")
    for kind, images, keys in (
        ("detections", detections, ("boxes", "scores", "labels")),
        ("targets", targets, ("boxes", "labels")),
    ):
        for index, image in enumerate(images):
            shapes = [tuple(image[key].shape) for key in keys]
            if shapes != [(shapes[0][0], 4), *[shapes[0][:1]] * (len(keys) - 1)]:
                raise ValueError(f"{kind}[{index}]: {keys} must be [N, 4], [N], ...: got {shapes}")
            labels = image["labels"]
            wrong = labels[(labels < 1) | (labels >= (num_classes or torch.inf))]
            if len(wrong):
                last = "" if num_classes is None else num_classes - 1
                raise ValueError(f"{kind}[{index}]: labels must be in 1..{last}: got {int(wrong[0])}")


def _flags(target: Mapping[str, Tensor], key: str) -> Tensor:
    """``difficult`` or ``crowd``, which a target may leave out."""
    return target[key].cpu() if key in target else torch.zeros(len(target["labels"]), dtype=torch.bool)


def _match(
    detections: Detections, targets: Detections, num_classes: int, iou_threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All images' detections: labels, scores, the object each stands for (-1: none), ignored; objects of each class."""
    none = torch.empty(0, dtype=torch.int64)
    rows = [(none, none.double(), none, none.bool())]  # there may be no images
    objects = torch.zeros(num_classes, dtype=torch.int64)
    offset = 0
    for image, target in zip(detections, targets, strict=True):
        keep = ~image["scores"].isnan()
        boxes, scores, labels = (image[key][keep].cpu() for key in ("boxes", "scores", "labels"))
        boxes, gt_boxes = (corners.as_subclass(Tensor).cpu().double() for corners in (boxes, target["boxes"]))
        gt_labels, crowd = target["labels"].cpu(), _flags(target, "crowd")
        difficult = _flags(target, "difficult") & ~crowd
        objects += torch.bincount(gt_labels[~crowd & ~difficult], minlength=num_classes)
        found, ignored = torch.full_like(labels, -1), torch.zeros_like(labels, dtype=torch.bool)
        if len(gt_boxes):
            same = labels[:, None] == gt_labels
            best, index = torch.where(same & ~crowd, ops.box_iou(boxes, gt_boxes), 0.0).max(1)
            hit = best >= iou_threshold
            ignored = hit & difficult[index]
            if crowd.any():
                covered = (_share_inside(boxes, gt_boxes) >= iou_threshold) & same & crowd
                ignored |= ~hit & covered.any(1)
            found = torch.where(hit, offset + index, -1)
        rows.append((labels, scores.double(), found, ignored))
        offset += len(gt_boxes)
    labels, scores, found, ignored = (torch.cat(column) for column in zip(*rows, strict=True))
    return labels, scores, found, ignored, objects[1:]


def _share_inside(boxes: Tensor, others: Tensor) -> Tensor:
    """``[N, M]``: how much of each box's own area is in each other; NaN for a box without area."""
    sides = torch.minimum(boxes[:, None, 2:], others[:, 2:]) - torch.maximum(boxes[:, None, :2], others[:, :2])
    return sides.clamp(min=0).prod(2) / (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None]


def _first_of_each(found: Tensor) -> Tensor:
    """True where an index that is not negative occurs for the first time."""
    ordered, position = found.sort(stable=True)
    first = ordered >= 0
    first[1:] &= ordered[1:] != ordered[:-1]
    return torch.empty_like(first).scatter_(0, position, first)


def _area(hits: Tensor, precision: Tensor, total: int) -> float:
    """Every hit adds ``1 / total`` of recall, at the best precision from there on."""
    from_here = precision.flip(0).cummax(0).values.flip(0)
    return from_here[hits.diff(prepend=hits.new_zeros(1)) > 0].sum().item() / total


def _eleven_points(hits: Tensor, precision: Tensor, total: int) -> float:
    # In integers: three objects of ten are a recall of 0.3, which 3 * 0.1 in floating point exceeds.
    best = [precision[10 * hits >= tenth * total] for tenth in range(11)]
    return sum(values.max().item() for values in best if len(values)) / 11


def _coco_rows(images: Detections, scored: bool) -> list[dict[str, Any]]:
    """One dict for each box of each image, whose id is its position."""
    rows = []
    for index, image in enumerate(images):
        corners = image["boxes"].as_subclass(Tensor).cpu().double()
        corners = torch.where(corners.isfinite().all(1, keepdim=True), corners, 0.0)
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
        scores = image["scores"].tolist() if scored else [0.0] * len(boxes)
        for box, label, score in zip(boxes.tolist(), image["labels"].tolist(), scores, strict=True):
            rows.append({"image_id": index, "category_id": label, "bbox": box, "score": score})
    return rows


def _coco_detections(detections: Detections) -> list[dict[str, Any]]:
    rows = _coco_rows(detections, scored=True)
    return [
        row | {"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in rows if row["score"] == row["score"]
    ]


def _coco_targets(targets: Detections) -> list[dict[str, Any]]:
    rows = _coco_rows(targets, scored=False)
    ignore = [flag for image in targets for flag in (_flags(image, "crowd") | _flags(image, "difficult")).tolist()]
    areas = [area for image in targets for area in image.get("area", torch.full(image["labels"].shape, -1.0)).tolist()]
    return [
        row | {"area": area if area >= 0 else row["bbox"][2] * row["bbox"][3], "iscrowd": int(crowd)}
        for row, area, crowd in zip(rows, areas, ignore, strict=True)
    ]
