"""SSDLite on MobileNetV2, for CPUs."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.ops import Conv2dNormActivation

from ssd_ext.models.backbone import Backbone
from ssd_ext.models.ssd import SSD, name_of
from ssd_ext.models.weights import Source, load_into
from ssd_ext.priors import SSDLITE320, PriorSpec

EXPANSION = 14  # the block whose expansion is the first level: 576 channels at stride 16
EXTRAS = (512, 256, 256, 128)

_norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
_conv = partial(Conv2dNormActivation, norm_layer=_norm, activation_layer=nn.ReLU6)


class MobileNetV2(Backbone):
    """torchvision's MobileNetV2 up to its 1280 channels at stride 32, and four extra levels.

    Source: Sandler et al., MobileNetV2 (2018), section 6.2.
    """

    def __init__(self) -> None:
        """Kaiming's weights in MobileNetV2, as torchvision's; normal ones in the extra levels."""
        super().__init__()
        # eps stays that of the ImageNet weights: with 0.001, as in torchvision's SSDLite on MobileNetV3, they
        # compute something else (a third of their variances are below 0.001).
        features: Any = mobilenet_v2(norm_layer=partial(nn.BatchNorm2d, momentum=0.03)).features
        self.features = features
        channels = [features[-1].out_channels, *EXTRAS]
        self.extras = nn.ModuleList(_extra(*pair) for pair in zip(channels, EXTRAS, strict=False))
        normal_(self.extras)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The expansion of block 14, the last map and the extra levels."""
        blocks: list[Any] = list(self.features)
        for block in blocks[:EXPANSION]:
            x = block(x)
        expand, *rest = blocks[EXPANSION].conv
        x = expand(x)
        maps = [x]
        for layer in (*rest, *blocks[EXPANSION + 1 :]):
            x = layer(x)
        maps.append(x)
        for block in self.extras:
            x = block(x)
            maps.append(x)
        return maps


def _extra(channels: int, width: int) -> nn.Module:
    """Half the size: 1x1 to half the channels, 3x3 depthwise of stride 2, 1x1."""
    half = width // 2
    return nn.Sequential(
        _conv(channels, half, kernel_size=1),
        _conv(half, half, kernel_size=3, stride=2, groups=half),
        _conv(half, width, kernel_size=1),
    )


def separable_head(channels: int, outputs: int) -> nn.Module:
    """SSDLite's head: 3x3 depthwise, batch normalisation, ReLU6, 1x1; normal weights."""
    head = nn.Sequential(
        _conv(channels, channels, kernel_size=3, groups=channels),
        nn.Conv2d(channels, outputs, 1),
    )
    normal_(head)
    return head


def normal_(module: nn.Module) -> None:
    """Start every convolution in ``module`` with normal weights of deviation 0.03 and a bias of 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=0.03)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


def ssdlite320_mobilenet_v2(
    num_classes: int = 91,
    *,
    weights: Source | None = None,
    backbone_weights: Source | None = None,
    image_size: tuple[int, int] = (320, 320),
    prior_spec: PriorSpec = SSDLITE320,
    **settings: Any,
) -> SSD:
    """SSDLite on MobileNetV2. Training needs two images or more in a batch, for batch normalisation.

    Args:
        num_classes: with background.
        weights: a detector's file or state dict; see :func:`ssd_ext.models.load_weights`.
        backbone_weights: file or state dict of torchvision's ``mobilenet_v2``, trained on ImageNet.
        image_size: ``(H, W)`` in pixels that images are resized to. The cells of every level of the default
            ``prior_spec`` divide an image of any size evenly.
        prior_spec: default: those of torchvision's ``ssdlite320_mobilenet_v3_large``.
        **settings: more of :class:`ssd_ext.models.SSD`.

    Raises:
        ValueError: as :func:`ssd_ext.models.ssd300_vgg16`.

    Source: Sandler et al., MobileNetV2 (2018), section 6.2; torchvision's ``ssdlite320_mobilenet_v3_large``.
    """
    backbone = MobileNetV2()
    settings = {"head": separable_head, **settings, "name": name_of("ssdlite320_mobilenet_v2", settings)}
    model = SSD(backbone, prior_spec, num_classes, image_size=image_size, **settings)
    return load_into(model, weights, backbone_weights)
