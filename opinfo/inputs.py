"""Inputs that several ops share: priors, synthetic and real ground truth, candidates."""

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from ssd_ext import priors as _priors

DATA = Path(__file__).resolve().parent / "data"


@functools.cache
def ssd300_priors() -> Tensor:
    """``[8732, 4]`` centre and size, relative."""
    return _priors.SSD300_COCO.priors()


def random_boxes(n: int, g: torch.Generator, low: float = 0.02, high: float = 0.5) -> Tensor:
    """``[n, 4]`` corners: centres uniform in the unit square, sides uniform in ``low..high``."""
    center = torch.rand(n, 2, generator=g)
    size = low + (high - low) * torch.rand(n, 2, generator=g)
    return torch.cat([center - size / 2, center + size / 2], 1)


# From where float32 does not hold the area any more (0 up to 2.6e-23; infinite from 1.85e19, that of a sum of two from
# 1.31e19), or only as a subnormal number (below 1.1e-19), on to where it does.
EXTREME_SIDES = (
    1e-23,
    2.6e-23,
    2.7e-23,
    4e-23,
    1e-22,
    1e-20,
    1.2e-19,
    1.0,
    1e19,
    1.3e19,
    1.31e19,
    1.84e19,
    1.85e19,
    1e38,
)


def extreme_boxes() -> Tensor:
    """``[48, 4]`` corners of finite sides: squares of these, each with one of half its width and one shifted."""
    rows = [[0, 0, s, s] for s in EXTREME_SIDES] + [[0, 0, s / 2, s] for s in EXTREME_SIDES]
    rows += [[s / 8, 0, s + s / 8, s] for s in EXTREME_SIDES]
    rows += [[0, 0, 1e-30, 1e30], [0, 0, 1e30, 1e-30], [0, 0, 1e30, 1e10], [-1e19, -1e19, 1e19, 1e19]]
    return torch.tensor([*rows, [0, 0, 3e38, 1e-38], [-1e38, 0, 1e38, 1]])


def synthetic_gts(batch: int, g: torch.Generator, most: int = 60, mean: float = 7) -> tuple[list[Tensor], list[Tensor]]:
    """COCO-like ground truth: 1 to ``most`` boxes an image, geometric with about ``mean``; labels 1..80."""
    counts = torch.empty(batch).geometric_(1 / mean, generator=g).clamp(max=most).long().tolist()
    boxes = [random_boxes(n, g) for n in counts]
    labels = [torch.randint(1, 81, (n,), generator=g) for n in counts]
    return boxes, labels


@functools.cache
def _coco() -> dict:
    return json.loads((DATA / "coco_boxes.json").read_text())


def coco_gts(batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """Ground truth of real photographs (COCO 2017, see opinfo/data/SOURCE.md), repeated to ``batch`` images."""
    images = _coco()["images"]
    chosen = [images[i % len(images)] for i in range(batch)]
    boxes = [torch.tensor(image["boxes"], dtype=torch.float32).reshape(-1, 4) for image in chosen]
    labels = [torch.tensor(image["labels"], dtype=torch.int64) for image in chosen]
    return boxes, labels


def distinct_scores(n: int, g: torch.Generator, low: float = 0.01) -> Tensor:
    """``[n]`` scores spread evenly over ``low..1`` in random order. All differ: peers order ties as they like."""
    return low + (1 - low) * (torch.randperm(n, generator=g) + 1) / max(n, 1)


def detector_candidates(n: int, g: torch.Generator, per_object: int = 20) -> tuple[Tensor, Tensor]:
    """What a detector hands to NMS: boxes jittered about ``n / per_object`` objects, scores over 0.01..1."""
    objects = random_boxes(max(1, n // per_object), g)
    boxes = objects[torch.randint(len(objects), (n,), generator=g)]
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + torch.randn(n, 4, generator=g) * 0.1 * size
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    return boxes, distinct_scores(n, g)


def share_of_positives(batch: int, g: torch.Generator) -> Tensor:
    """``[batch, 1]``, as COCO has positives in an image: 0.3 to 3 % of the priors, 1.3 % in the middle."""
    return 0.003 + 0.027 * torch.rand(batch, 1, generator=g) ** 1.5
