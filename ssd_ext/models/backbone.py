"""What a backbone is to the trainer and to files of weights: Backbone."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """Base class of backbones: a module from images to feature maps, the first of them the finest.

    :class:`ssd_ext.models.SSD` takes any module with such a ``forward``. Two things need ``features`` as well, the part
    that a classifier's weights are for:

    - ``--freeze N`` (``Recipe(freeze=N)``) leaves the first ``N`` modules of ``features`` as they are;
    - ``backbone_weights`` and :func:`ssd_ext.models.load_weights` set ``features`` from the file of a classifier whose
      ``features`` it is, or set the whole backbone from its own state dict.

    Levels beyond the classifier, such as SSD's extra levels, stand beside ``features``; what mixes the maps of several
    levels, such as a feature pyramid, is a neck: ``SSD(backbone, ..., neck=...)``.

    Attributes:
        features: in the order in which an image passes through.
    """

    features: nn.Sequential

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[B, 3, H, W]`` images, normalised, to maps ``[B, C_k, h_k, w_k]``."""
        raise NotImplementedError
