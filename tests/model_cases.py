"""What the tests of models share: pictures, small detectors, a comparison of detections."""

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from ssd_ext.models import SSD, Backbone
from ssd_ext.priors import PriorSpec

SIZES = ((240, 320), (300, 300), (411, 289))


def photographs(*names):
    """Those of the sample, RGB in 0..1."""
    folder = Path(__file__).resolve().parent.parent / "samples" / "playing_cards" / "JPEGImages"
    return [pil_to_tensor(Image.open(folder / f"{name}.jpg")) / 255 for name in names]


def pictures(sizes=SIZES, seed=0):
    """One picture of each size, smooth with some edges: RGB in 0..1."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for h, w in sizes:
        image = F.interpolate(torch.rand(1, 3, 9, 9, generator=g), (h, w), mode="bicubic")[0].clamp(0, 1)
        image[:, h // 4 : h // 2, w // 5 : w // 2] = torch.rand(3, 1, 1, generator=g)
        out.append(image)
    return out


def targets(sizes=SIZES, num_classes=5, seed=0):
    """Ground truths of each picture, small to large, so that every level of a detector has some."""
    g = torch.Generator().manual_seed(seed)
    extent = torch.tensor([0.06, 0.08, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9])[:, None]
    out = []
    for h, w in sizes:
        corner = torch.rand(len(extent), 2, generator=g) * (1 - extent)
        labels = torch.randint(1, num_classes, (len(extent),), generator=g)
        out.append({"boxes": torch.cat([corner, corner + extent], 1) * torch.tensor([w, h, w, h]), "labels": labels})
    return out


NO_OBJECT = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}


class TwoLevels(nn.Module):
    """Maps of 8 and 12 channels at strides 4 and 8."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)

    def forward(self, x):
        first = F.relu(self.first(x))
        return [first, F.relu(self.second(first))]


class WithFeatures(Backbone):
    """The same maps, of which the second is a level beyond the features."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.extra = nn.Conv2d(8, 12, 3, stride=2, padding=1)

    def forward(self, x):
        first = self.features(x)
        return [first, F.relu(self.extra(first))]


class Pyramid(nn.Module):
    """Both maps in 6 channels, the first with the second, enlarged, added to it."""

    def __init__(self, channels=(8, 12)):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, 6, 1) for count in channels)

    def forward(self, maps):
        first, second = (conv(x) for conv, x in zip(self.lateral, maps, strict=True))
        return [first + F.interpolate(second, first.shape[2:]), second]


SPEC = PriorSpec((32, 32), ((8, 8), (4, 4)), (0.2, 0.5, 0.9), ((2,), (2, 3)))


def small(seed=0, **settings):
    torch.manual_seed(seed)
    return SSD(**{"backbone": TwoLevels(), "prior_spec": SPEC, "num_classes": 4, **settings})


def small_with_neck(seed=0, **settings):
    torch.manual_seed(seed)
    return small(seed, backbone=WithFeatures(), neck=Pyramid(), **settings)


def spread(model, factor=8.0):
    """Widen the scores of an untrained model, so that a few stand out and none lies at a threshold."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class" in name:
                parameter.mul_(factor)
    return model


# How far scores, and boxes in pixels, may be apart.
TOLERANCES = {torch.float32: (1e-5, 1e-2), torch.float64: (1e-13, 1e-10)}


def assert_same_detections(found, expected, share=0.99):
    """Of each image, this share of detections agrees in label, score and box.

    The rest is left to NMS, where the last bit of a score or an IoU decides between neighbours.
    """
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs["scores"]) > 20, "too few detections to compare"
        score, box = TOLERANCES[ours["boxes"].dtype]
        for a, b in ((ours, theirs), (theirs, ours)):
            same = (
                (a["labels"][:, None] == b["labels"])
                & ((a["scores"][:, None] - b["scores"]).abs() < score)
                & ((a["boxes"][:, None] - b["boxes"]).abs().amax(2) < box)
            )
            assert same.any(1).float().mean() >= share
