"""What a backbone is to the trainer and to files of weights: Backbone."""

from torch import nn


class Backbone(nn.Module):
    """Base class of backbones: modules from images to feature maps, the first of them the finest.

    ``forward(x)`` takes ``[B, 3, H, W]`` images, normalised, and returns a list of maps ``[B, C_k, h_k, w_k]``.
    :class:`ssd_ext.models.SSD` takes any module with such a ``forward``. The attribute ``features`` names the part that
    a classifier has, too:

    - ``--freeze N`` (``Recipe(freeze=N)``) does not train the first ``N`` modules of ``features``;
    - :func:`ssd_ext.models.load_weights` sets ``features`` from the file of a classifier with the same ``features``, or
      the whole backbone from its own state dict.

    Levels beyond the classifier, such as SSD's extra levels, are not part of ``features``. A module that mixes the maps
    of several levels, such as a feature pyramid, is a neck: ``SSD(backbone, ..., neck=...)``.

    Attributes:
        features: modules in the order in which an image passes through them.
    """

    features: nn.Sequential
