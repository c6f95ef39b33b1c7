"""SSD300 and SSD512 on VGG16, as in the paper."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd_ext.models.backbone import Backbone
from ssd_ext.models.ssd import CAFFE_MEAN, CAFFE_STD, SSD, name_of, xavier_
from ssd_ext.models.weights import Source, load_into
from ssd_ext.priors import SSD300_COCO, SSD512_COCO, PriorSpec

# Convolutions of each stage, up to the pool that ends it.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
CONV4_3 = 22  # the ReLU of conv4_3 in VGG16.features

# (bottleneck, channels, kernel, stride, padding) of the levels above conv7.
_CONV8_9 = ((256, 512, 3, 2, 1), (128, 256, 3, 2, 1))
SSD300_EXTRAS = (*_CONV8_9, (128, 256, 3, 1, 0), (128, 256, 3, 1, 0))
SSD512_EXTRAS = (*_CONV8_9, (128, 256, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 4, 1, 1))


class VGG16(Backbone):
    """VGG16 up to conv5_3, conv6 and conv7 in place of its fully connected layers, and the extra levels.

    ``features`` has the indices of torchvision's ``vgg16().features``, the last pool apart, and goes on to conv7.

    Args:
        extras: (bottleneck, channels, kernel, stride, padding) of each extra level.

    Source: Liu et al., SSD (2016), section 3 and figure 2; Liu et al., ParseNet (2015), for the scale of conv4_3.
    """

    def __init__(self, extras: tuple[tuple[int, int, int, int, int], ...] = SSD300_EXTRAS):
        """See the class for the arguments."""
        super().__init__()
        self.features = _features()
        self.scale = nn.Parameter(torch.full((512,), 20.0))
        channels = [1024, *(width for _, width, *_ in extras)]
        self.extras = nn.ModuleList(_level(*pair) for pair in zip(channels, extras, strict=False))
        xavier_(self.extras)

    def forward(self, x: Tensor) -> list[Tensor]:
        """conv4_3 (normalised over channels, then scaled), conv7 and the extra levels."""
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i == CONV4_3:
                wide = x.float() if x.dtype == torch.float16 else x  # F.normalize's epsilon is 0 in float16
                maps.append((self.scale.view(1, -1, 1, 1) * F.normalize(wide)).to(x.dtype))
        maps.append(x)
        for block in self.extras:
            x = block(x)
            maps.append(x)
        return maps


def _features() -> nn.Sequential:
    """conv1_1 to conv7."""
    layers, channels = [], 3
    for stage in STAGES:
        for width in stage:
            layers += [_kaiming(nn.Conv2d(channels, width, 3, padding=1)), nn.ReLU(inplace=True)]
            channels = width
        # pool3 rounds up, so that 75 cells of SSD300 make 38
        layers.append(nn.MaxPool2d(2, 2, ceil_mode=width == 256))
    pool5 = nn.MaxPool2d(3, 1, padding=1)
    conv6, conv7 = nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
    xavier_(conv6)
    xavier_(conv7)
    return nn.Sequential(*layers[:-1], pool5, conv6, nn.ReLU(inplace=True), conv7, nn.ReLU(inplace=True))


def _kaiming(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _level(channels: int, extra: tuple[int, int, int, int, int]) -> nn.Sequential:
    bottleneck, width, kernel, stride, padding = extra
    return nn.Sequential(
        nn.Conv2d(channels, bottleneck, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(bottleneck, width, kernel, stride, padding),
        nn.ReLU(inplace=True),
    )


def ssd300_vgg16(
    num_classes: int = 91,
    *,
    weights: Source | None = None,
    backbone_weights: Source | None = None,
    image_size: tuple[int, int] = (300, 300),
    prior_spec: PriorSpec = SSD300_COCO,
    **settings: Any,
) -> SSD:
    """SSD300 of the paper, as torchvision's ``ssd300_vgg16`` builds it.

    Args:
        num_classes: with background.
        weights: a detector's file or state dict; see :func:`ssd_ext.models.load_weights`.
        backbone_weights: a VGG16's file or state dict, trained on ImageNet.
        image_size: ``(H, W)`` in pixels that images are resized to. At other sizes than 300 x 300 the first four levels
            of the default ``prior_spec`` keep their steps of 8, 16, 32 and 64 pixels, and the cells of the last two
            divide the image evenly.
        prior_spec: default: torchvision's.
        **settings: more of :class:`ssd_ext.models.SSD`.

    Raises:
        ValueError: as :class:`ssd_ext.models.SSD` and :func:`ssd_ext.models.load_weights`; a backbone given as
            ``weights``, or a detector as ``backbone_weights``.

    Source: Liu et al., SSD (2016), section 3.
    """
    settings["name"] = name_of("ssd300_vgg16", settings)
    return _ssd_vgg16(VGG16(SSD300_EXTRAS), prior_spec, num_classes, weights, backbone_weights, image_size, settings)


def ssd512_vgg16(
    num_classes: int = 91,
    *,
    weights: Source | None = None,
    backbone_weights: Source | None = None,
    image_size: tuple[int, int] = (512, 512),
    prior_spec: PriorSpec = SSD512_COCO,
    **settings: Any,
) -> SSD:
    """SSD512: :func:`ssd300_vgg16` with one level more.

    Args:
        num_classes: with background.
        weights: a detector's file or state dict; see :func:`ssd_ext.models.load_weights`.
        backbone_weights: a VGG16's file or state dict, trained on ImageNet.
        image_size: ``(H, W)`` in pixels that images are resized to. The cells of every level of the default
            ``prior_spec`` divide an image of any size evenly.
        prior_spec: default: those of the released COCO model.
        **settings: more of :class:`ssd_ext.models.SSD`.

    Raises:
        ValueError: as :func:`ssd300_vgg16`.

    Source: Liu et al., SSD (2016), section 3.3, footnote 5.
    """
    settings["name"] = name_of("ssd512_vgg16", settings)
    return _ssd_vgg16(VGG16(SSD512_EXTRAS), prior_spec, num_classes, weights, backbone_weights, image_size, settings)


def _ssd_vgg16(
    backbone: VGG16,
    prior_spec: PriorSpec,
    num_classes: int,
    weights: Source | None,
    backbone_weights: Source | None,
    image_size: tuple[int, int],
    settings: dict[str, Any],
) -> SSD:
    settings = {"mean": CAFFE_MEAN, "std": CAFFE_STD, **settings}
    model = SSD(backbone, prior_spec, num_classes, image_size=image_size, **settings)
    return load_into(model, weights, backbone_weights)
