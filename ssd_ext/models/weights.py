"""Weights from files of several layouts: load_weights, LoadReport."""

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ssd_ext import checkpoint
from ssd_ext.models.ssd import CAFFE_MEAN, CAFFE_STD, IMAGENET_MEAN, IMAGENET_STD, SSD
from ssd_ext.priors import SSD300_VOC_RELEASED, PriorSpec, Sizes

Source = str | os.PathLike[str] | Mapping[str, Tensor]
_FEATURES = "backbone.features."  # of a Backbone: what a classifier's weights are for

# What a VGG16's first convolution was trained on: order of the channels, mean and std as RGB in 0..1.
CONVENTIONS = {
    "rgb": ("RGB", IMAGENET_MEAN, IMAGENET_STD),
    "rgb255": ("RGB", CAFFE_MEAN, CAFFE_STD),
    "bgr255": ("BGR", (123.68 / 255, 116.779 / 255, 103.939 / 255), CAFFE_STD),
}


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_weights` found and did.

    Attributes:
        format: the layout, in words.
        loaded: names of the model's tensors that were set.
        skipped: keys of the file that were not used.
        detector: the file has heads; else it is a backbone, and the model's heads are as before.
    """

    format: str
    loaded: list[str]
    skipped: list[str]
    detector: bool

    def __str__(self) -> str:
        """One line for the user."""
        text = f"{self.format}: {len(self.loaded)} tensors loaded"
        return text + (f", {len(self.skipped)} skipped: {', '.join(self.skipped)}" if self.skipped else "")


@dataclass(frozen=True)
class _Layout:
    """How another project names what our models have.

    ``marker`` is found at the start of a key in no other layout. A rule turns a whole key into the model's name.
    """

    name: str
    marker: str
    rules: Sequence[tuple[str, str | Callable[[re.Match[str]], str | None]]]
    detector: bool = True
    convention: str | None = None  # None: the model's own

    def rename(self, key: str) -> str | None:
        for pattern, name in self.rules:
            if match := re.fullmatch(pattern, key):
                return match.expand(name) if isinstance(name, str) else name(match)
        return None


_LAYOUTS = (
    _Layout("ssd_ext detector", r"box_heads\.", [(r".+", r"\g<0>")]),
    _Layout(
        "torchvision detector",
        r"head\.classification_head\.",
        [
            (r"backbone\.extra\.0\.7\.(\d+)(\..+)", lambda m: f"backbone.features.{30 + int(m[1])}{m[2]}"),
            (r"backbone\.extra\.0\.(\d+)(\..+)", lambda m: f"backbone.features.{23 + int(m[1])}{m[2]}"),
            (r"backbone\.extra\.(\d+)(\..+)", lambda m: f"backbone.extras.{int(m[1]) - 1}{m[2]}"),
            (r"backbone\.features\..+", r"\g<0>"),
            (r"backbone\.scale_weight", "backbone.scale"),
            (r"head\.classification_head\.module_list(\..+)", r"class_heads\1"),
            (r"head\.regression_head\.module_list(\..+)", r"box_heads\1"),
        ],
    ),
    _Layout(
        "amdegroot detector",
        r"loc\.0\.",
        [
            (r"vgg(\..+)", r"backbone.features\1"),
            (r"extras\.(\d+)(\..+)", lambda m: f"backbone.extras.{int(m[1]) // 2}.{int(m[1]) % 2 * 2}{m[2]}"),
            (r"L2Norm\.weight", "backbone.scale"),
            (r"loc(\..+)", r"box_heads\1"),
            (r"conf(\..+)", r"class_heads\1"),
        ],
        # its data set reads BGR and subtracts the mean, but then turns the channels round
        convention="rgb255",
    ),
    _Layout("MobileNetV2 backbone", r"features\.0\.0\.", [(r"features\..+", r"backbone.\g<0>")], detector=False),
    _Layout(
        "VGG16 backbone",
        r"features\.0\.weight",
        [(r"features\..+", r"backbone.\g<0>")],
        detector=False,
        convention="rgb",
    ),
    _Layout(
        "amdegroot VGG16 backbone",
        r"0\.weight",
        [(r"\d+\..+", r"backbone.features.\g<0>")],
        detector=False,
        convention="rgb255",
    ),
)
# The first biases of the original VGG16 of Oxford, and of what was made from it. Its first weights
# (0.43, 0.55, 0.48) come in the order of the channels: rising from first to last, they are blue's to red's.
_ORIGINAL_BIAS = (0.734, 0.093, 0.068, 0.886)
# What an ImageNet classifier may lack of a backbone's features: conv6 and conv7, which are made of its fc6 and fc7.
_CONV6_CONV7 = re.compile(r"backbone\.features\.3[13]\b")


def load_weights(model: SSD, source: Source, *, convention: str | None = None) -> LoadReport:
    """Load a file of weights, whose layout is recognised.

    - a state dict of ours, or a checkpoint with one under ``"model"``;
    - torchvision's ``ssd300_vgg16``;
    - amdegroot's ``ssd.pytorch`` (``vgg.*``, ``extras.*``, ``loc.*``, ``conf.*``, ``L2Norm.weight``). The released VOC
      weights want ``prior_spec=SSD300_VOC_RELEASED``; they bound centres to the image too, which ours do not;
    - a backbone alone: torchvision's ``mobilenet_v2``; ``vgg16`` under torchvision's names, or amdegroot's
      ``vgg16_reducedfc``. fc6 and fc7 become conv6 and conv7, every fourth channel and every third cell;
    - the state dict of a whole backbone; of a backbone of your own also that of its ``features``, or of a classifier
      with such ``features``: see :class:`ssd_ext.models.Backbone`.

    A detector of another number of classes leaves the model's class heads as they are; ``skipped`` lists its own.
    Either all of this is possible, or the model is unchanged. Detectors of torchvision and amdegroot turn the model's
    ``antialias`` off: they were trained on images resized without. The model keeps its priors: there is a warning if a
    checkpoint was trained with others for the same image size.

    Args:
        model: one of :data:`ssd_ext.models.MODELS`, or of another backbone for files of ours.
        source: a path (``.safetensors``, else a file of ``torch.save``, read with ``weights_only=True``) or a state
            dict.
        convention: the input that a VGG16 was trained on: ``"rgb"`` (0..1, ImageNet's mean and deviation),
            ``"rgb255"`` (0..255 less (123, 117, 104)) or ``"bgr255"`` (0..255 less (103.939, 116.779, 123.68)). The
            first convolution is converted to the model's input, exactly but for images' borders, which it pads with
            0, that is with the mean. Default: by the layout; the original VGG16 is recognised by its first biases.

    Raises:
        ValueError: an unreadable file, an unknown layout, tensors that do not fit the model, an unknown
            ``convention`` or one where no VGG16 is loaded.
        OSError: no such file.
        ImportError: a ``.safetensors`` file without that package.

    Source: Liu et al., SSD (2016), section 3 (subsampled fc6 and fc7); https://github.com/amdegroot/ssd.pytorch.
    """
    if convention not in (None, *CONVENTIONS):
        raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
    where = "state dict" if isinstance(source, Mapping) else os.fspath(source)
    loaded = source if isinstance(source, Mapping) else checkpoint.load(source)
    state = _tensors(loaded, where)
    layout = _own_backbone(model, state) or _known_layout(state)
    if layout is None:
        raise ValueError(f"{where}: not the weights of a known layout, with keys {_some(state)}")
    state = _atrous(state) if layout.name == "VGG16 backbone" else state
    ours, skipped = _fit(layout, state, model, where)
    convention = convention or _convention(layout, ours)
    if convention:
        _convert(ours, convention, model, where, is_vgg16=layout.name != "backbone")
    model.load_state_dict(ours, strict=False)
    if layout.name in ("torchvision detector", "amdegroot detector"):
        model.antialias = False
    _warn_of_priors(layout, model, loaded, where)
    return LoadReport(
        f"{layout.name}, {convention}" if convention else layout.name, list(ours), skipped, layout.detector
    )


def _known_layout(state: Mapping[str, Tensor]) -> _Layout | None:
    return next((known for known in _LAYOUTS if any(re.match(known.marker, key) for key in state)), None)


def _own_backbone(model: SSD, state: Mapping[str, Tensor]) -> _Layout | None:
    """The layout of a file for a backbone of the user's own: of all of it, or of its features, or of a classifier."""
    names = model.state_dict().keys()
    is_ours = type(model.backbone).__module__.startswith("ssd_ext.")  # a classifier's file has one of _LAYOUTS
    if is_ours and state.keys() != model.backbone.state_dict().keys():
        return None
    features = {name for name in names if name.startswith(_FEATURES)}
    found = {prefix: len(features & {prefix + key for key in state}) for prefix in ("backbone.", _FEATURES)}
    prefix = max(found, key=found.__getitem__)

    def rename(match: re.Match[str]) -> str | None:
        return prefix + match[0] if prefix + match[0] in names else None

    return _Layout("backbone", "", [(r".+", rename)], detector=False) if found[prefix] else None


def load_into(model: SSD, weights: Source | None, backbone_weights: Source | None) -> SSD:
    """The model with what a builder was given: a detector as ``weights``, a backbone as ``backbone_weights``."""
    for name, source, detector in (("backbone_weights", backbone_weights, False), ("weights", weights, True)):
        if source is None:
            continue
        report = load_weights(model, source)
        if report.detector != detector:
            other = "weights" if name == "backbone_weights" else "backbone_weights"
            raise ValueError(f"{name} holds a {report.format}: give it as {other}")
    return model


def _tensors(loaded: object, where: str) -> dict[str, Tensor]:
    """The state dict in what a file holds, without the prefixes of DDP and ``torch.compile``."""
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        loaded = loaded["model"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        held = f"a dict of {_some(loaded)}" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ValueError(f"{where}: expected tensors by name, or a checkpoint with them under 'model', got {held}")
    state = {key: value.cpu() for key, value in loaded.items()}
    for prefix in ("module.", "_orig_mod."):
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def _atrous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """conv6 and conv7 subsampled from fc6 and fc7, where these are there and whole.

    torchvision's ``IMAGENET1K_FEATURES`` holds NaN in their place.
    """
    state = dict(state)
    for fc, conv, view, step in (
        ("classifier.0", "features.31", (4096, 512, 7, 7), (4, 1, 3, 3)),
        ("classifier.3", "features.33", (4096, 4096, 1, 1), (4, 4, 1, 1)),
    ):
        weight, bias = state.get(f"{fc}.weight"), state.get(f"{fc}.bias")
        if weight is None or bias is None or not weight.isfinite().all():
            continue
        del state[f"{fc}.weight"], state[f"{fc}.bias"]
        state[f"{conv}.weight"] = weight.view(view)[tuple(slice(None, None, s) for s in step)]
        state[f"{conv}.bias"] = bias[::4]
    return state


def _fit(
    layout: _Layout, state: dict[str, Tensor], model: nn.Module, where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` under the model's names, and the keys to skip."""
    target = model.state_dict()
    ours, skipped, faults, seen = {}, [], [], set()
    for key, value in state.items():
        name = layout.rename(key)
        seen.add(name)
        if name is None and not layout.detector:
            skipped.append(key)  # the classifier
        elif name not in target:
            faults.append(f"{key} is not in the model")
        elif value.shape == target[name].shape:
            ours[name] = value
        elif name.startswith("class_heads.") and value.shape[1:] == target[name].shape[1:]:
            skipped.append(key)
        else:
            faults.append(f"{key} is {list(value.shape)}, the model's {name} {list(target[name].shape)}")
    missing = target.keys() - seen
    if not layout.detector:  # a classifier holds no more than the features
        part = _FEATURES if all(name.startswith(_FEATURES) for name in ours) else "backbone."
        from_fc = _CONV6_CONV7 if "VGG16" in layout.name else None
        missing = {name for name in missing if name.startswith(part) and not (from_fc and from_fc.match(name))}
    faults += [f"{name} is missing" for name in target if name in missing]
    if faults:
        raise ValueError(f"{where}: this {layout.name} does not fit the model: {_some(faults, '; ')}")
    return ours, skipped


def _some(items: Iterable[object], separator: str = ", ") -> str:
    """A few of them, and how many more."""
    texts = list(map(str, items))
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return separator.join(texts[:4]) + more or "none"


def _convention(layout: _Layout, ours: dict[str, Tensor]) -> str | None:
    """The input that a file's first convolution expects, by its layout or by its values."""
    if layout.name != "VGG16 backbone":
        return layout.convention
    bias, first = ours["backbone.features.0.bias"][:4].float(), ours["backbone.features.0.weight"][0, :, 0, 0]
    if not torch.allclose(bias, torch.tensor(_ORIGINAL_BIAS), atol=0.02):
        return layout.convention
    return "bgr255" if first[0] < first[2] else "rgb255"


def _convert(ours: dict[str, Tensor], convention: str, model: SSD, where: str, is_vgg16: bool) -> None:
    """Make the first convolution of ``ours`` take the model's input: its order, scale and mean."""
    weight, bias = (ours.get(f"backbone.features.0.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None or not is_vgg16:
        raise ValueError(f"{where}: convention={convention!r} is for a VGG16")
    order, *statistics = CONVENTIONS[convention]
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in statistics)
    weight = weight.double().flip(1) if order == "BGR" else weight.double()
    per_colour = weight / std
    model_mean, model_std = (t.double().cpu() for t in (model.mean, model.std))
    ours["backbone.features.0.weight"] = per_colour * model_std
    ours["backbone.features.0.bias"] = bias.double() + (per_colour * (model_mean - mean)).sum((1, 2, 3))


class _StoredSpec(PriorSpec):
    """A spec that weights were trained with, which is kept wherever it puts centres."""

    def _check_centres(self, image_size: tuple[int, int], feature_sizes: Sizes) -> None:
        pass


def stored_spec(**values: Any) -> PriorSpec:
    """The spec of a checkpoint, with a warning if :class:`ssd_ext.priors.PriorSpec` refuses it for its centres."""
    kept = _StoredSpec(**values)
    try:
        return PriorSpec(**values)
    except ValueError as error:
        warnings.warn(f"{error}. It is kept here, because weights were trained with these priors", stacklevel=3)
        return kept


def _trained_priors(loaded: Mapping[str, Any], image_size: tuple[int, int]) -> Tensor | None:
    """What a checkpoint of this image size was trained with; None if it does not tell."""
    architecture = loaded.get("architecture")
    if not isinstance(architecture, Mapping):
        return None
    values = architecture.get("prior_spec", architecture.get("priors"))  # the latter in 0.1.0
    try:
        spec = _StoredSpec(**values)
    except (TypeError, ValueError):  # another project's file, or of a later version
        return None
    return spec.priors() if tuple(spec.image_size) == image_size else None


def _warn_of_priors(layout: _Layout, model: SSD, loaded: Mapping[str, Any], where: str) -> None:
    released = SSD300_VOC_RELEASED.scales
    if layout.name == "amdegroot detector" and model.num_classes == 21 and tuple(model.prior_spec.scales) != released:
        warnings.warn(
            f"amdegroot's VOC weights were trained with priors of the scales {released} (SSD300_VOC_RELEASED), "
            f"the model has {tuple(model.prior_spec.scales)}",
            stacklevel=3,
        )
    trained = _trained_priors(loaded, model.image_size) if layout.detector else None
    if trained is not None and not torch.equal(trained.to(model.priors), model.priors):
        warnings.warn(
            f"{where}: trained with other priors of an image of {model.image_size} than the model's; "
            "ssd_ext.inference.load_detector builds the model with those of the file",
            stacklevel=3,
        )
