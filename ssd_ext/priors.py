"""Default boxes (priors) of SSD: presets, any image size, the paper's scale formula."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PriorSpec:
    """Priors of a detector, level by level (see the module's presets)."""

    image_size: tuple[int, int]
    feature_sizes: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    aspect_ratios: tuple[tuple[float, ...], ...]

    def boxes(self) -> Tensor:
        """``[P, 4]`` centre and size, relative to the image; order: level, y, x, aspect."""
        out = []
        for k, (rows, columns) in enumerate(self.feature_sizes):
            s, s_next = self.scales[k], self.scales[k + 1]
            shapes = [(s, s), ((s * s_next) ** 0.5,) * 2]
            for r in self.aspect_ratios[k]:
                shapes += [(s * r**0.5, s / r**0.5), (s / r**0.5, s * r**0.5)]
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            center = torch.stack([(x + 0.5) / columns, (y + 0.5) / rows], -1).reshape(-1, 1, 2)
            size = torch.tensor(shapes).reshape(1, -1, 2)
            out.append(torch.cat(torch.broadcast_tensors(center, size), -1).reshape(-1, 4))
        return torch.cat(out)


SSD300_COCO = PriorSpec(
    image_size=(300, 300),
    feature_sizes=((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)),
    scales=(0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
    aspect_ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
)
