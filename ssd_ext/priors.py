"""Default boxes (priors) of SSD: presets, any image size, the paper's scale formula.

>>> from ssd_ext.priors import SSD300_COCO
>>> SSD300_COCO.priors().shape
torch.Size([8732, 4])
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

Sizes = Sequence[tuple[int, int]]


def paper_scales(levels: int, s_min: float = 0.2, s_max: float = 0.9, first: float | None = None) -> tuple[float, ...]:
    """Scales by the paper's formula, ``s_k = s_min + (s_max - s_min) / (m - 1) * (k - 1)`` for ``k = 1 .. m``.

    Args:
        levels: of the detector, with the one that ``first`` speaks of.
        s_min: scale of the lowest level, relative to the image.
        s_max: scale of the highest level.
        first: scale of one level more beneath, which the formula leaves out: the paper gives
            conv4_3 0.1 in SSD300. None: the formula holds for every level.

    Returns:
        ``levels + 1`` scales: the formula goes one step beyond ``s_max``, for the extra box of the
        highest level.

    Raises:
        ValueError: fewer than two levels for the formula.

    Source: Liu et al., SSD (2016), eq. 4 and section 3.1.
    """
    m = levels - (first is not None)
    if m < 2:
        raise ValueError(f"paper_scales: needs two levels at least (three with first), got {levels}")
    scales = tuple(round(s_min + (s_max - s_min) * k / (m - 1), 12) for k in range(m + 1))
    return scales if first is None else (first, *scales)


@dataclass(frozen=True)
class PriorSpec:
    """The priors of a detector, level by level.

    Each cell of level ``k`` has, about its centre and in this order: a square of scale ``s_k``, a
    square of scale ``s' = sqrt(s_k * s_{k+1})``, and for each aspect ratio ``r`` the shapes
    ``(w, h) = (s_k * sqrt(r), s_k / sqrt(r))`` and its transpose. Scales are fractions of the
    image's width for ``w`` and of its height for ``h``: a non-square image stretches the priors.

    Args:
        image_size: ``(H, W)`` in pixels that the spec was made for.
        feature_sizes: ``(rows, columns)`` of each level.
        scales: one for each level and one more.
        aspect_ratios: of each level, without 1 and without reciprocals, which are implied.
        steps: pixels from one centre to the next, of each level; a last cell may centre outside of the
            image, by its own size at most. None: the cells of every level divide the image evenly.
        clip: bounds widths and heights to the image's. (torchvision does so; amdegroot bounds the
            centres too, which moves those of the 10 x 10 level of SSD300.)
        spread: of each level, whether its cells divide an image of any size evenly, whatever its step.
            Default: the levels whose steps do so at ``image_size`` in both directions, such as
            SSD300's last two, 3 x 100 and 1 x 300 pixels, but not its first, 38 x 8. Without ``steps``
            all levels are, whatever is given here.

    Raises:
        ValueError: lists whose lengths do not fit, a value that is not positive, or a step that puts
            centres more than a cell outside of the image.

    Source: Liu et al., SSD (2016), section 2.2; torchvision's ``DefaultBoxGenerator``. Some notes on
    SSD print ``h = s * sqrt(r)`` or ``s' = s_k * s_{k+1}``: the paper does not.
    """

    image_size: tuple[int, int]
    feature_sizes: Sizes
    scales: Sequence[float]
    aspect_ratios: Sequence[Sequence[float]]
    steps: Sequence[float] | None = None
    clip: bool = True
    spread: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        """Refuse what no detector could mean."""
        levels = len(self.feature_sizes)
        for name in ("scales", "aspect_ratios", "steps", "spread"):
            values, expected = getattr(self, name), levels + (name == "scales")
            if values is not None and (not isinstance(values, Sequence) or len(values) != expected):
                raise ValueError(f"PriorSpec: {name} must have {expected} entries for {levels} levels: got {values}")
        if not all(isinstance(one, bool) for one in self.spread or ()):
            raise ValueError(f"PriorSpec: spread must be True or False of each level: got {self.spread}")
        numbers = {"scales": self.scales, "steps": self.steps or ()}
        numbers["aspect_ratios"] = [r for ratios in self.aspect_ratios for r in ratios]
        for name, values in numbers.items():
            if not all(0 < v < math.inf for v in values):
                raise ValueError(f"PriorSpec: {name} must be positive numbers: got {getattr(self, name)}")
        self._check_sizes("image_size", [self.image_size])
        self._check_sizes("feature_sizes", self.feature_sizes)
        self._check_centres(self.image_size, self.feature_sizes)

    @staticmethod
    def _check_sizes(name: str, sizes: Sizes) -> None:
        if not all(len(size) == 2 and min(size) > 0 for size in sizes):
            raise ValueError(f"PriorSpec: {name} must be positive (height, width): got {sizes}")

    def _spread(self) -> Sequence[bool]:
        if self.steps is None:
            return (True,) * len(self.feature_sizes)
        if self.spread is not None:
            return self.spread
        height, width = self.image_size
        cells = zip(self.steps, self.feature_sizes, strict=True)
        return tuple(step * rows == height and step * columns == width for step, (rows, columns) in cells)

    def _cell_sizes(self, image_size: tuple[int, int], feature_sizes: Sizes) -> list[tuple[float, float]]:
        """From one centre to the next of each level, as fractions of the image's height and of its width."""
        height, width = image_size
        steps = self.steps or (0,) * len(feature_sizes)
        levels = zip(self._spread(), steps, feature_sizes, strict=True)
        return [(1 / n, 1 / m) if spread else (step / height, step / width) for spread, step, (n, m) in levels]

    def _check_centres(self, image_size: tuple[int, int], feature_sizes: Sizes) -> None:
        cells = zip(feature_sizes, self._cell_sizes(image_size, feature_sizes), strict=True)
        for k, (counts, sizes) in enumerate(cells):
            if self.steps and any((n - 1.5) * size > 1 for n, size in zip(counts, sizes, strict=True)):
                height, width = image_size
                y, x = ((n - 0.5) * self.steps[k] for n in counts)
                raise ValueError(
                    f"PriorSpec: level {k} has {counts[0]}x{counts[1]} cells of steps[{k}]={self.steps[k]} pixels, so "
                    f"that its last centre, y={y:g} and x={x:g}, is more than a cell outside of an image of "
                    f"{height}x{width}: reduce the step, or give steps=None, by which the cells of every level divide "
                    "the image evenly"
                )

    def _sizes(self, image_size: tuple[int, int] | None, feature_sizes: Sizes | None) -> tuple[tuple[int, int], Sizes]:
        """What is meant where one or both are left out."""
        image = cast("tuple[int, int]", tuple(image_size or self.image_size))
        self._check_sizes("image_size", [image])
        if feature_sizes is None:
            if image == tuple(self.image_size):
                return image, self.feature_sizes
            if self.steps is None:
                raise ValueError(f"PriorSpec: without steps, an image of {image} needs its feature_sizes")
            height, width = image
            return image, [(int(-(-height // step)), int(-(-width // step))) for step in self.steps]
        if len(feature_sizes) != len(self.feature_sizes):
            levels = len(self.feature_sizes)
            raise ValueError(f"PriorSpec: feature_sizes must have {levels} levels: got {feature_sizes}")
        self._check_sizes("feature_sizes", feature_sizes)
        self._check_centres(image, feature_sizes)
        return image, feature_sizes

    def resized(self, image_size: tuple[int, int] | None = None, feature_sizes: Sizes | None = None) -> "PriorSpec":
        """The spec of another image size, which spreads the cells of the same levels as this one.

        Args:
            image_size: as in :meth:`priors`.
            feature_sizes: as in :meth:`priors`.

        Raises:
            ValueError: as :meth:`priors`.
        """
        image, sizes = self._sizes(image_size, feature_sizes)
        if (image, tuple(sizes)) == (tuple(self.image_size), tuple(self.feature_sizes)):
            return self
        return replace(self, image_size=image, feature_sizes=tuple(sizes), spread=self._spread())

    def per_cell(self) -> list[int]:
        """Priors of one cell, of each level: what the heads must predict."""
        return [2 + 2 * len(ratios) for ratios in self.aspect_ratios]

    def counts(self, image_size: tuple[int, int] | None = None, feature_sizes: Sizes | None = None) -> list[int]:
        """Priors of each level; arguments as in :meth:`priors`."""
        _, sizes = self._sizes(image_size, feature_sizes)
        return [rows * columns * n for (rows, columns), n in zip(sizes, self.per_cell(), strict=True)]

    def check(
        self, num_priors: int, image_size: tuple[int, int] | None = None, feature_sizes: Sizes | None = None
    ) -> None:
        """Raise unless the spec has ``num_priors`` priors, as many as the heads predict.

        Args:
            num_priors: ``P`` of the predictions ``[B, P, ...]``.
            image_size: as in :meth:`priors`.
            feature_sizes: as in :meth:`priors`.

        Raises:
            ValueError: another number; the message lists the count of each level.
        """
        image, sizes = self._sizes(image_size, feature_sizes)
        counts = self.counts(image, sizes)
        if num_priors != sum(counts):
            levels = zip(sizes, self.per_cell(), counts, strict=True)
            text = " + ".join(f"{rows}x{columns}x{n} ({count})" for (rows, columns), n, count in levels)
            raise ValueError(
                f"PriorSpec: predictions for {num_priors} priors, but an image of {image[0]}x{image[1]} has "
                f"{text} = {sum(counts)}"
            )

    def priors(
        self,
        image_size: tuple[int, int] | None = None,
        feature_sizes: Sizes | None = None,
        *,
        pixels: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The priors of an image.

        Args:
            image_size: ``(H, W)`` in pixels; default: the spec's.
            feature_sizes: ``(rows, columns)`` of each level, as the network gives them. Default: the
                spec's, or for another image size ``ceil(H / step), ceil(W / step)``, which is what
                padded convolutions give (SSD300's last two levels are not padded).
            pixels: give pixels instead of fractions of the image.
            dtype: of the result; computed in float64.
            device: of the result.

        Returns:
            ``[P, 4]`` centre and size ``(cx, cy, w, h)``; order: level, y, x, aspect.

        Raises:
            ValueError: the wrong number of levels, sizes that are not positive, no way to tell the
                feature sizes, or a step that puts centres more than a cell outside of the image.
        """
        (height, width), sizes = self._sizes(image_size, feature_sizes)
        unit = torch.tensor([width, height, width, height] if pixels else [1, 1, 1, 1], dtype=torch.float64)
        out = []
        cells = self._cell_sizes((height, width), sizes)
        for k, ((rows, columns), (step_y, step_x)) in enumerate(zip(sizes, cells, strict=True)):
            s, s_next = self.scales[k], self.scales[k + 1]
            shapes = [(s, s), ((s * s_next) ** 0.5,) * 2]
            for r in self.aspect_ratios[k]:
                shapes += [(s * r**0.5, s / r**0.5), (s / r**0.5, s * r**0.5)]
            size = torch.tensor(shapes, dtype=torch.float64).reshape(1, -1, 2)
            if self.clip:
                size = size.clamp(max=1)
            y = (torch.arange(rows, dtype=torch.float64) + 0.5) * step_y
            x = (torch.arange(columns, dtype=torch.float64) + 0.5) * step_x
            center = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).reshape(-1, 1, 2)
            out.append(torch.cat(torch.broadcast_tensors(center, size), -1).reshape(-1, 4) * unit)
        return torch.cat(out).to(device=device, dtype=dtype)


def _ssd300(scales: tuple[float, ...]) -> PriorSpec:
    return PriorSpec(
        image_size=(300, 300),
        feature_sizes=((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)),
        scales=scales,
        aspect_ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
        steps=(8, 16, 32, 64, 100, 300),
    )


def _ssd512(scales: tuple[float, ...]) -> PriorSpec:
    return PriorSpec(
        image_size=(512, 512),
        feature_sizes=((64, 64), (32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 1)),
        scales=scales,
        aspect_ratios=((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
        steps=(8, 16, 32, 64, 128, 256, 512),
    )


# Section 3.1 of the paper: conv4_3 apart.
SSD300_VOC = _ssd300(paper_scales(6, first=0.1))
# The models that its authors released, and amdegroot's: their step is rounded down to 0.17.
SSD300_VOC_RELEASED = _ssd300((0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05))
# min_sizes 21 45 99 153 207 261, max_sizes 45 .. 315 of the released model; torchvision's ssd300_vgg16.
SSD300_COCO = _ssd300((0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05))
# Equation 4 for all six levels.
SSD300_PAPER = _ssd300(paper_scales(6))
# min_sizes 35.84 76.8 153.6 230.4 307.2 384 460.8 of the released model.
SSD512_VOC = _ssd512((0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05))
# min_sizes 20.48 51.2 133.12 215.04 296.96 378.88 460.8 of the released model.
SSD512_COCO = _ssd512((0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06))
# torchvision's ssdlite320_mobilenet_v3_large: six levels from 0.2 to 0.95, the cells of a level evenly spread.
SSDLITE320 = PriorSpec(
    image_size=(320, 320),
    feature_sizes=((20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)),
    scales=(0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0),
    aspect_ratios=((2, 3),) * 6,
)
