"""Draws the pictures of these pages, with the ops themselves on samples/playing_cards.

python docs/figures.py [FOLDER]
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ssd_ext import GroundTruth, ops
from ssd_ext.data import load_dataset
from ssd_ext.priors import SSD300_COCO

ROOT = Path(__file__).resolve().parent.parent
COLORS = ("#d1495b", "#2e5e8c", "#c47f00", "#3c8d7d")
INK, GREY = "#22272e", "#6b7280"
WIDTH, DPI = 9.0, 110  # inches


def photograph(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``image [h, w, 3]``, its boxes as fractions of it, their labels, and ``(w, h, w, h)``."""
    dataset = load_dataset(ROOT / "samples" / "playing_cards", check_images=False)
    image, target = next(item for item in dataset if item[1]["name"] == name)
    height, width = image.shape[1:]
    extent = torch.tensor([width, height, width, height])
    return image.permute(1, 2, 0), target["boxes"].as_subclass(Tensor) / extent, target["labels"], extent


def show(ax, image: Tensor, title: str) -> None:
    """The photograph, greyish and pale, so that what is drawn on it stands out."""
    height, width = image.shape[:2]
    light = image.float() / 255
    ax.imshow(((0.6 * light + 0.4 * light.mean(-1, keepdim=True)) * 0.5 + 0.5).numpy())
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.set_title(title, fontsize=10, color=INK)
    ax.spines[:].set_visible(False)


def panels(image: Tensor, titles: list[str]):
    """A row of pictures of one photograph."""
    height, width = image.shape[:2]
    size = WIDTH, WIDTH / len(titles) * height / width + 0.22
    figure, axes = plt.subplots(1, len(titles), figsize=size, layout="constrained")
    for ax, title in zip(axes, titles, strict=True):
        show(ax, image, title)
    return figure, axes


def draw_boxes(ax, boxes: Tensor, color: str, **style) -> None:
    """Outlines of ``[N, 4]`` corners in pixels; what hangs over the edge of the photograph is cut off."""
    for x1, y1, x2, y2 in boxes.tolist():
        ax.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, **style))


def corners(priors: Tensor) -> Tensor:
    """``[P, 4]`` of ``(cx, cy, w, h)``: a prior is what deltas of 0 decode to."""
    return ops.decode(torch.zeros_like(priors), priors)


def default_boxes():
    """The boxes of one cell, of three levels."""
    image, _, _, extent = photograph("IMG_2383")
    priors, counts, per_cell = SSD300_COCO.priors(), SSD300_COCO.counts(), SSD300_COCO.per_cell()
    shown = {1: (9, 9), 2: (4, 4), 3: (2, 2)}  # level: row and column of a cell near the card's centre
    sizes = [SSD300_COCO.feature_sizes[level] for level in shown]
    titles = [f"{rows} x {columns}, {per_cell[k]} a cell" for k, (rows, columns) in zip(shown, sizes, strict=True)]
    figure, axes = panels(image, titles)
    for ax, (level, (y, x)), (_, columns) in zip(axes, shown.items(), sizes, strict=True):
        first = sum(counts[:level])
        centers = priors[first : first + counts[level] : per_cell[level], :2] * extent[:2]
        ax.scatter(*centers.T.numpy(), s=3, color=GREY, linewidths=0)
        cell = first + (y * columns + x) * per_cell[level]
        for i, box in enumerate(corners(priors[cell : cell + per_cell[level]]) * extent):
            draw_boxes(ax, box[None], COLORS[0 if i < 2 else 1 if i < 4 else 2], linewidth=1.5)
    return figure


def matching():
    """Which priors each card gets, by the threshold and by force."""
    image, boxes, _, extent = photograph("cam_image45")
    priors = SSD300_COCO.priors()
    drawn = corners(priors) * extent
    figure, axes = panels(image, ['force="none": IoU of 0.5 or more', 'force="bipartite": and one for every card'])
    cards = GroundTruth.from_lists([boxes])
    by_threshold = ops.match(cards, priors, force="none")[0]
    for ax, matches in zip(axes, (by_threshold, ops.match(cards, priors)[0]), strict=True):
        for g, color in enumerate(COLORS):
            draw_boxes(ax, boxes[g : g + 1] * extent, color, linewidth=3)
            draw_boxes(ax, drawn[(matches == g) & (by_threshold == g)], color, linewidth=1)
            draw_boxes(ax, drawn[(matches == g) & (by_threshold != g)], color, linewidth=1.6, linestyle=(0, (3, 2)))
            middle = (boxes[g, 0] + boxes[g, 2]).item() / 2 * image.shape[1]
            count = int((matches == g).sum())
            text = f"{count} prior{'s' * (count != 1)}"
            ax.text(middle, 16, text, color=color, fontsize=9, weight="bold", ha="center")
    return figure


def mining():
    """The hardest negatives of a classifier that takes a prior for a card the more they overlap."""
    image, boxes, labels, extent = photograph("cam_image54")
    priors = SSD300_COCO.priors()
    _, target_labels = ops.assign_targets(GroundTruth.from_lists([boxes], [labels]), priors)
    positive, negative = target_labels[0] > 0, target_labels[0] == 0
    overlap = ops.box_iou(boxes, corners(priors)).amax(0)
    noise = torch.randn(len(priors), generator=torch.Generator().manual_seed(0))
    card = 10 * overlap - 6 + 0.7 * noise  # the logit of a card against that of background
    loss = F.binary_cross_entropy_with_logits(card, positive.float(), reduction="none")
    hard = ops.hard_negatives(loss[None], target_labels)[0]

    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.1), layout="constrained", width_ratios=(1.6, 1))
    show(left, image, "centres of priors")
    groups = (
        (negative & ~hard, "#9aa3af", 2, f"{int((negative & ~hard).sum())} other negatives"),
        (hard, COLORS[1], 12, f"{int(hard.sum())} hard negatives"),
        (positive, COLORS[0], 12, f"{int(positive.sum())} positives"),
    )
    for members, color, size, name in groups:
        left.scatter(*(priors[members, :2] * extent[:2]).T.numpy(), s=size, color=color, linewidths=0, label=name)
    draw_boxes(left, boxes * extent, INK, linewidth=1.2)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, frameon=False, fontsize=9, handletextpad=0.1)

    marked = int(hard.sum())
    losses = loss[negative].sort(descending=True).values[: 5 * marked].tolist()
    right.fill_between(range(marked), losses[:marked], color=COLORS[1], linewidth=0)
    right.fill_between(range(marked - 1, len(losses)), losses[marked - 1 :], color="#c3c9d1", linewidth=0)
    right.set(xlim=(0, len(losses)), ylim=(0, None))
    right.set_title("losses of the negatives, falling", fontsize=10, color=INK)
    right.text(1.15 * marked, 0.85 * losses[0], f"the first 3 x {int(positive.sum())}", color=COLORS[1], fontsize=9)
    right.set_xlabel("rank", fontsize=9, color=INK)
    right.set_ylabel("cross-entropy", fontsize=9, color=INK)
    right.tick_params(labelsize=8, colors=GREY)
    right.spines[["top", "right"]].set_visible(False)
    return figure


def suppression():
    """Boxes jittered about each card: before, after NMS, after Soft-NMS. The fainter, the lower the score."""
    image, boxes, labels, extent = photograph("IMG_2626")
    card = torch.arange(len(boxes)).repeat_interleave(12)
    side = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[card]
    jitter = torch.randn(side.shape, generator=torch.Generator().manual_seed(1))
    found = boxes[card] + 0.07 * side * jitter
    scores = ops.box_iou(found, boxes).amax(1)

    hard = ops.batched_nms(found, scores, labels[card], 0.45)
    soft, soft_scores = ops.soft_nms(found, scores, method="gaussian", score_threshold=0.05)
    every = torch.arange(len(found))
    results = {"before": (every, scores), "batched_nms": (hard, scores[hard]), "soft_nms": (soft, soft_scores)}
    titles = [f"{name}: {len(keep)} boxes" for name, (keep, _) in results.items()]
    figure, axes = panels(image[:260], titles)  # below is nothing but table
    for ax, (keep, left) in zip(axes, results.values(), strict=True):
        for i, score in zip(keep.tolist(), left.tolist(), strict=True):
            draw_boxes(ax, found[i : i + 1] * extent, COLORS[int(card[i])], linewidth=1.6, alpha=score)
    return figure


FIGURES = (default_boxes, matching, mining, suppression)


def write(figure, file: Path) -> None:
    """A PNG of few colours: a third of the size of one in all. Maximum coverage spares the rare, bright ones."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, facecolor="white")
    plt.close(figure)
    image = Image.open(buffer).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, optimize=True)


def main(folder: Path) -> None:
    """All of them into ``folder``."""
    for draw in FIGURES:
        with plt.rc_context({"font.family": "DejaVu Sans", "text.color": INK}):
            write(draw(), folder / f"{draw.__name__}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "figures")
