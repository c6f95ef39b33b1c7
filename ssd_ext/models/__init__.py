"""SSD300, SSD512 and SSDLite, and SSD around any backbone.

>>> from ssd_ext.models import ssdlite320_mobilenet_v2
>>> model = ssdlite320_mobilenet_v2(num_classes=21)
"""

from collections.abc import Callable
from typing import Any

try:
    import torchvision as _  # noqa: F401
except ImportError as _error:
    raise ImportError('ssd_ext.models needs torchvision: pip install "ssd_ext[train]"', name="torchvision") from _error

from ssd_ext.loss import MultiBoxLoss
from ssd_ext.models.backbone import Backbone
from ssd_ext.models.mobilenet import ssdlite320_mobilenet_v2
from ssd_ext.models.ssd import SSD
from ssd_ext.models.vgg import ssd300_vgg16, ssd512_vgg16
from ssd_ext.models.weights import LoadReport, load_weights, stored_spec

MODELS: dict[str, Callable[..., SSD]] = {
    builder.__name__: builder for builder in (ssd300_vgg16, ssd512_vgg16, ssdlite320_mobilenet_v2)
}
__all__ = [
    "MODELS",
    "SSD",
    "Backbone",
    "LoadReport",
    "create",
    "load_weights",
    "ssd300_vgg16",
    "ssd512_vgg16",
    "ssdlite320_mobilenet_v2",
]


def create(name: str, **kwargs: Any) -> SSD:
    """The model of that name, one of ``MODELS``; keywords go to its builder.

    ``create(**model.architecture)`` builds a model again, with new weights and the same priors, also with priors that
    :class:`ssd_ext.priors.PriorSpec` refuses since: then there is a warning.

    Raises:
        ValueError: no such model; as the builder.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    for key, made in (("prior_spec", stored_spec), ("loss", MultiBoxLoss)):
        if isinstance(kwargs.get(key), dict):
            kwargs[key] = made(**kwargs[key])
    return MODELS[name](**kwargs)
