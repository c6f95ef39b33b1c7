"""SSD around any backbone: heads, loss from images and targets, detections from images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd_ext.loss import MultiBoxLoss
from ssd_ext.ops.detect import detect, unpad
from ssd_ext.priors import PriorSpec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The original VGG16's input: 0..255 less its rounded mean, which torchvision's ssd300_vgg16 keeps.
CAFFE_MEAN, CAFFE_STD = (0.48235, 0.45882, 0.40784), (1 / 255,) * 3

Images = Sequence[Tensor] | Tensor
Targets = Sequence[Mapping[str, Tensor]]


def conv3x3_head(channels: int, outputs: int) -> nn.Module:
    """The paper's head: one 3x3 convolution, Xavier's weights, no bias at first."""
    conv = nn.Conv2d(channels, outputs, 3, padding=1)
    xavier_(conv)
    return conv


def xavier_(module: nn.Module) -> None:
    """Start every convolution in ``module`` with Xavier's uniform weights and a bias of 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


class SSD(nn.Module):
    """A single shot detector: a backbone of several feature maps, two heads on each, priors.

    Images are RGB in 0..1; each is resized to ``image_size`` (bilinear) and
    normalised by ``mean`` and ``std``. Boxes are corners ``(x1, y1, x2, y2)`` in pixels of the images as given;
    labels are int64, 0 being background.

    Args:
        backbone: ``backbone(x[B, 3, H, W]) -> list[Tensor]``, one ``[B, C_k, h_k, w_k]`` for each level of ``priors``.
        channels: ``C_k`` of each.
        priors: their shapes. The feature sizes are those that the backbone gives, whatever the spec says.
        num_classes: ``C``, with background.
        image_size: ``(H, W)`` in pixels that images are resized to; default: that of ``priors``.
        head: ``head(channels, outputs) -> nn.Module``, a map of the same size with ``outputs`` channels; called for
            the boxes, then for the classes of each level.
        mean: of the input, RGB in 0..1.
        std: of the input, RGB in 0..1.
        loss: the training loss; default: :class:`ssd_ext.MultiBoxLoss` with the paper's settings.
        antialias: resize images as :func:`ssd_ext.data.augmentation` does; torchvision's detectors do without, and
            :func:`ssd_ext.models.load_weights` turns it off for weights that were trained so.
        score_threshold: these four as in :func:`ssd_ext.ops.detect`; attributes, to be changed at will.
        iou_threshold: of NMS.
        topk_per_class: candidates of each class.
        max_detections: of an image.
        name: of the builder, one of ``ssd_ext.models.MODELS``; None for a detector of your own.

    Attributes:
        priors: the spec with this model's ``image_size`` and ``feature_sizes``.
        prior_boxes: ``[P, 4]`` centre and size as fractions of the image; a buffer, not in the state.

    Raises:
        ValueError: the backbone's maps do not fit ``priors`` or ``channels``, an image size that is too small for the
            backbone, fewer than two classes.

    Source: Liu et al., SSD (2016), section 2.
    """

    prior_boxes: Tensor
    extent: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        priors: PriorSpec,
        num_classes: int,
        *,
        image_size: tuple[int, int] | None = None,
        head: Callable[[int, int], nn.Module] = conv3x3_head,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        loss: MultiBoxLoss | None = None,
        antialias: bool = True,
        score_threshold: float = 0.01,
        iou_threshold: float = 0.45,
        topk_per_class: int = 400,
        max_detections: int = 200,
        name: str | None = None,
    ):
        """See the class for the arguments."""
        super().__init__()
        self.name = name
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background and must be 2 or more, got {num_classes}")
        self.image_size = cast("tuple[int, int]", tuple(image_size or priors.image_size))
        self.num_classes = num_classes
        shapes = _map_shapes(backbone, self.image_size)
        found, sizes = [c for c, _, _ in shapes], tuple((rows, columns) for _, rows, columns in shapes)
        if found != list(channels):
            raise ValueError(f"channels must be those of the backbone's maps, {found}, got {list(channels)}")
        if len(sizes) != len(priors.feature_sizes):
            raise ValueError(
                f"priors are for {len(priors.feature_sizes)} levels, the backbone has {len(sizes)}: {sizes}"
            )
        self.priors = replace(priors, image_size=self.image_size, feature_sizes=sizes)

        self.backbone = backbone
        levels = list(zip(channels, priors.per_cell(), strict=True))
        self.box_heads = nn.ModuleList(head(c, 4 * n) for c, n in levels)
        self.class_heads = nn.ModuleList(head(c, num_classes * n) for c, n in levels)
        # Convolutions with weights in channels_last give channels_last maps, which _rows reads without a copy.
        self.box_heads.to(memory_format=torch.channels_last)
        self.class_heads.to(memory_format=torch.channels_last)

        self.loss = MultiBoxLoss() if loss is None else loss
        self.antialias = antialias
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.topk_per_class = topk_per_class
        self.max_detections = max_detections
        self.register_buffer("prior_boxes", self.priors.boxes(), persistent=False)
        self.register_buffer("extent", _extent(torch.tensor([self.image_size]).float()), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def architecture(self) -> dict[str, Any]:
        """What :func:`ssd_ext.models.create` takes to build this detector again, in plain values."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "priors": asdict(self.priors),
            "mean": tuple(self.mean.flatten().tolist()),
            "std": tuple(self.std.flatten().tolist()),
            "loss": {**self.loss.matching, **self.loss.loss},
            "antialias": self.antialias,
            "score_threshold": self.score_threshold,
            "iou_threshold": self.iou_threshold,
            "topk_per_class": self.topk_per_class,
            "max_detections": self.max_detections,
        }

    def transform(self, images: Images) -> Tensor:
        """``[B, 3, H, W]``, what :meth:`heads` takes: images normalised, then resized to ``image_size``.

        Args:
            images: a list of ``[3, h, w]``, of any sizes, or ``[B, 3, h, w]``; RGB in 0..1.

        Raises:
            ValueError: an image of another shape, or not of floating point.
        """
        if isinstance(images, Tensor):
            _check_image(images, "images", 4)
            return self._resize((images - self.mean) / self.std)
        for i, image in enumerate(images):
            _check_image(image, f"images[{i}]", 3)
        resized = [self._resize(((image - self.mean) / self.std)[None]) for image in images]
        return torch.cat(resized) if resized else self.mean.new_empty(0, 3, *self.image_size)

    def _resize(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) == self.image_size:
            return images
        return F.interpolate(images, self.image_size, mode="bilinear", align_corners=False, antialias=self.antialias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The raw predictions of a batch from :meth:`transform`.

        Args:
            x: ``[B, 3, H, W]`` normalised.

        Returns:
            ``deltas``: ``[B, P, 4]`` and ``logits``: ``[B, P, C]``, ordered as :attr:`priors`: level, y, x, aspect.
        """
        maps = self.backbone(x)
        return _rows(self.box_heads, maps, 4), _rows(self.class_heads, maps, self.num_classes)

    def predict(self, batch: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detections of fixed shape, without a wait for the GPU: what to compile, export or capture in a graph.

        Args:
            batch: ``[B, 3, H, W]`` from :meth:`transform`.
            sizes: as :meth:`detections`.

        Returns:
            As :meth:`detections`.

        Raises:
            ValueError: as :meth:`detections`.
        """
        return self.detections(*self.heads(batch), sizes)

    def detections(
        self, deltas: Tensor, logits: Tensor, sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detections of fixed shape from what :meth:`heads` gave.

        Args:
            deltas: ``[B, P, 4]``.
            logits: ``[B, P, C]``.
            sizes: ``[B, 2]`` ``(h, w)`` in pixels of the images that boxes are meant for, on the model's
                device; default: ``image_size``.

        Returns:
            ``boxes [B, K, 4]``, ``scores [B, K]``, ``labels [B, K]``, ``counts [B]``; ``K`` is ``max_detections``. See
            :func:`ssd_ext.ops.detect`. Boxes are clipped to the image.

        Raises:
            ValueError: predictions for another number of priors than :attr:`priors` has.
        """
        self.priors.check(deltas.shape[1])
        boxes, scores, labels, counts = detect(
            deltas,
            logits,
            self.prior_boxes,
            self.score_threshold,
            self.iou_threshold,
            self.topk_per_class,
            self.max_detections,
            variances=self.loss.matching["variances"],
            window=(0.0, 0.0, 1.0, 1.0),
        )
        extent = self.extent if sizes is None else _extent(sizes)
        return boxes * extent.to(boxes)[:, None], scores, labels, counts

    @overload
    def forward(self, images: Images, targets: None = None) -> list[dict[str, Tensor]]: ...

    @overload
    def forward(self, images: Images, targets: Targets) -> dict[str, Tensor]: ...

    def forward(self, images: Images, targets: Targets | None = None) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """The losses where there are targets, else the detections.

        Args:
            images: a list of ``[3, h, w]``, of any sizes, or ``[B, 3, h, w]``; RGB in 0..1.
            targets: of each image ``{"boxes": [G, 4], "labels": [G]}``; an image may have none. Labels 1..C-1.

        Returns:
            With targets ``{"bbox_regression": scalar, "classification": scalar}``, to be added up; NaN or infinite
            where the predictions are. Without, of each image ``{"boxes": [N, 4], "scores": [N], "labels": [N]}`` by
            falling score.

        Raises:
            ValueError: as :meth:`transform`; targets that do not go with the images, or none in training mode;
                as :class:`ssd_ext.MultiBoxLoss` does.
        """
        if targets is None and self.training:
            raise ValueError("targets must be given in training mode; call eval() to detect")
        if targets is not None and len(targets) != len(images):
            raise ValueError(f"targets must be as many as images, {len(images)}, got {len(targets)}")
        batch = self.transform(images)
        sizes = torch.tensor([image.shape[-2:] for image in images]).view(-1, 2).to(batch.device, non_blocking=True)
        if targets is None:
            return unpad(*self.predict(batch, sizes))
        return self.losses(*self.heads(batch), targets, sizes)

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's is of any arguments and any result

    def losses(self, deltas: Tensor, logits: Tensor, targets: Targets, sizes: Tensor) -> dict[str, Tensor]:
        """The losses from what :meth:`heads` gave.

        Args:
            deltas: ``[B, P, 4]``.
            logits: ``[B, P, C]``.
            targets: as :meth:`forward` takes them.
            sizes: ``[B, 2]`` ``(h, w)`` in pixels of the images that the targets' boxes are in.

        Returns:
            As :meth:`forward`.

        Raises:
            ValueError: as :meth:`detections`, and as :meth:`forward` of targets.
        """
        self.priors.check(deltas.shape[1])
        extents = _extent(sizes).to(self.prior_boxes)
        boxes = [_boxes(target["boxes"], i).to(extents) for i, target in enumerate(targets)]
        relative = [of_image / extent for of_image, extent in zip(boxes, extents, strict=True)]
        loc, conf = self.loss(deltas, logits, relative, [target["labels"] for target in targets], self.prior_boxes)
        return {"bbox_regression": loc, "classification": conf}

    def extra_repr(self) -> str:
        """Sizes and settings, for ``print``."""
        names = ("image_size", "num_classes", "score_threshold", "iou_threshold", "topk_per_class", "max_detections")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _rows(heads: nn.ModuleList, maps: Sequence[Tensor], columns: int) -> Tensor:
    """``[B, P, columns]``: what the heads predict, cell by cell.

    Of channels_last maps the rows are a view, so that joining the levels is the only copy. Half the time of
    gathering rows from contiguous maps first.
    """
    outputs = (head(x).permute(0, 2, 3, 1) for head, x in zip(heads, maps, strict=True))
    return torch.cat([y.unflatten(3, (-1, columns)).flatten(1, 3) for y in outputs], 1)


def _extent(sizes: Tensor) -> Tensor:
    """``(w, h, w, h)`` of ``(h, w)``: what relative corners are multiplied by."""
    return sizes.flip(-1).repeat(1, 2)


def _boxes(boxes: Tensor, image: int) -> Tensor:
    boxes = boxes.reshape(0, 4) if boxes.shape == (0,) else boxes
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes of targets[{image}] must be [G, 4], got {list(boxes.shape)}")
    return boxes


def _check_image(image: Tensor, name: str, dims: int) -> None:
    if image.dim() != dims or image.shape[-3] != 3:
        expected = "[3, h, w]" if dims == 3 else "[B, 3, h, w]"
        raise ValueError(f"{name} must be {expected}, got {list(image.shape)}")
    if not image.is_floating_point():
        raise ValueError(f"{name} must be RGB in 0..1 of floating point, got {image.dtype} (divide bytes by 255)")


def _map_shapes(backbone: nn.Module, image_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """``(channels, rows, columns)`` of the backbone's maps, without computing them."""
    if min(image_size) < 1:  # which torch 2.11 convolves
        raise ValueError(f"image_size {image_size} does not suit the backbone: it must be positive")
    state = {name: t.to("meta") for name, t in [*backbone.named_parameters(), *backbone.named_buffers()]}
    try:
        # two images: of one, batch normalisation refuses a map of a single cell
        maps = torch.func.functional_call(backbone, state, torch.empty(2, 3, *image_size, device="meta"))
    except RuntimeError as error:
        raise ValueError(f"image_size {image_size} does not suit the backbone: {error}") from error
    return [(channels, rows, columns) for _, channels, rows, columns in (x.shape for x in maps)]
