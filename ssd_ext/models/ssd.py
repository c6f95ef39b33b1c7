"""SSD around any backbone: heads, loss from images and targets, detections from images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd_ext import ops
from ssd_ext._buffers import FloatBuffers
from ssd_ext.ground_truth import GroundTruth, Targets, as_ground_truth
from ssd_ext.loss import MultiBoxLoss
from ssd_ext.priors import PriorSpec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The original VGG16's input: 0..255 less its rounded mean, which torchvision's ssd300_vgg16 keeps.
CAFFE_MEAN, CAFFE_STD = (0.48235, 0.45882, 0.40784), (1 / 255,) * 3

Images = Sequence[Tensor] | Tensor


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


def name_of(builder: str, settings: Mapping[str, Any]) -> str | None:
    """The name of a builder's detector, by which :func:`ssd_ext.models.create` can build it again, or None."""
    return None if {"head", "neck"} & settings.keys() else builder


class SSD(FloatBuffers):
    """A single shot detector: a backbone of several feature maps, perhaps a neck, two heads on each map, priors.

    Images are RGB in 0..1; each is resized to ``image_size`` (bilinear) and
    normalised by ``mean`` and ``std``. Boxes are corners ``(x1, y1, x2, y2)`` in pixels of the images as given;
    labels are int64, 0 being background.

    ``half()``, ``bfloat16()`` and ``to(dtype)`` change the weights: images, of any floating dtype, are cast to theirs
    once they are resized. Priors, ``mean`` and ``std`` stay float32 then, as do matching and detections.

    Args:
        backbone: ``backbone(x[B, 3, H, W]) -> list[Tensor]``, feature maps ``[B, C_k, h_k, w_k]``; a
            :class:`ssd_ext.models.Backbone`, or any module.
        prior_spec: the shapes of the priors, level by level. The feature sizes are those of the maps, whatever the spec
            says.
        num_classes: ``C``, with background.
        neck: ``neck(list[Tensor]) -> list[Tensor]``, from the backbone's maps to one map for each level of
            ``prior_spec``, such as a feature pyramid. None: the backbone's maps are the levels.
        image_size: ``(H, W)`` in pixels that images are resized to; default: that of ``prior_spec``. At another size
            the levels whose cells divide the image of the spec evenly do so too, the others keep their steps in pixels.
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
        name: of the builder, one of ``ssd_ext.models.MODELS``, without a neck or head of your own; else None.

    Attributes:
        prior_spec: the spec as :meth:`ssd_ext.priors.PriorSpec.resized` to this model's ``image_size`` and maps.
        priors: ``[P, 4]`` centre and size as fractions of the image; a buffer, not in the state. float32, or float64
            after ``double()``.

    Raises:
        ValueError: another number of maps than ``prior_spec`` has levels, an image size that is too small for the
            backbone, steps that put centres more than a cell outside of the image, fewer than two classes.

    Source: Liu et al., SSD (2016), section 2.
    """

    priors: Tensor
    extent: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        prior_spec: PriorSpec,
        num_classes: int,
        *,
        neck: nn.Module | None = None,
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
        self.image_size = cast("tuple[int, int]", tuple(image_size or prior_spec.image_size))
        self.num_classes = num_classes
        self.backbone = backbone
        self.neck = neck
        shapes = _map_shapes(backbone, neck, self.image_size)
        sizes = tuple((rows, columns) for _, rows, columns in shapes)
        if len(sizes) != len(prior_spec.feature_sizes):
            raise ValueError(
                f"prior_spec has {len(prior_spec.feature_sizes)} levels, but there are {len(sizes)} maps: {sizes}"
            )
        self.prior_spec = prior_spec.resized(self.image_size, sizes)

        levels = [(channels, n) for (channels, _, _), n in zip(shapes, prior_spec.per_cell(), strict=True)]
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
        self.register_buffer("priors", self.prior_spec.priors(), persistent=False)
        height, width = self.image_size
        extent = torch.tensor([[width, height] * 2], dtype=torch.float32)
        self.register_buffer("extent", extent, persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def architecture(self) -> dict[str, Any]:
        """Plain values from which :func:`ssd_ext.models.create` builds this detector again, unless ``name`` is None."""
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "prior_spec": asdict(self.prior_spec),
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
        """``[B, 3, H, W]``, what :meth:`heads` takes: normalised, resized to ``image_size``, in the weights' type.

        Args:
            images: a list of ``[3, h, w]``, of any sizes, or ``[B, 3, h, w]``; RGB in 0..1.

        Raises:
            ValueError: an image of another shape, or not of floating point.
        """
        if isinstance(images, Tensor):
            _check_image(images, "images", 4)
            return self._prepare(images).to(self._dtype)
        for i, image in enumerate(images):
            _check_image(image, f"images[{i}]", 3)
        prepared = [self._prepare(image[None]) for image in images]
        batch = torch.cat(prepared) if prepared else self.mean.new_empty(0, 3, *self.image_size)
        return batch.to(self._dtype)

    def _prepare(self, images: Tensor) -> Tensor:
        """Normalised and resized, never in half precision, which torch does not resize with antialiasing on a CPU."""
        images = (images - self.mean) / self.std
        if tuple(images.shape[-2:]) == self.image_size:
            return images
        return F.interpolate(images, self.image_size, mode="bilinear", align_corners=False, antialias=self.antialias)

    @property
    def _dtype(self) -> torch.dtype:
        """That of the weights which images meet first."""
        return next((weights.dtype for weights in self.parameters() if weights.is_floating_point()), self.mean.dtype)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The raw predictions of a batch from :meth:`transform`.

        Args:
            x: ``[B, 3, H, W]`` normalised.

        Returns:
            ``deltas``: ``[B, P, 4]`` and ``logits``: ``[B, P, C]``, ordered as :attr:`priors`: level, y, x, aspect.
        """
        maps = self.maps(x)
        return _rows(self.box_heads, maps, 4), _rows(self.class_heads, maps, self.num_classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The feature maps that the heads look at: the backbone's, through the neck if there is one."""
        maps: list[Tensor] = self.backbone(x)
        return maps if self.neck is None else self.neck(maps)

    def predict(self, images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detections of fixed shape, without a wait for the GPU.

        Args:
            images: as for :meth:`transform`. Of one tensor ``[B, 3, h, w]`` this can be compiled, exported and
                captured in a CUDA graph.

        Returns:
            As :meth:`postprocess`, in pixels of the images as given. :func:`ssd_ext.ops.unpad` makes a list of them.

        Raises:
            ValueError: as :meth:`transform`.
        """
        return self.postprocess(*self.heads(self.transform(images)), self._sizes(images))

    def postprocess(
        self, deltas: Tensor, logits: Tensor, sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detections of fixed shape from what :meth:`heads` gave.

        Args:
            deltas: ``[B, P, 4]``.
            logits: ``[B, P, C]``.
            sizes: ``(h, w)`` in pixels of the images that boxes are meant for, on the model's device: ``[B, 2]``, or
                ``[1, 2]`` if all have one size; default: ``image_size``.

        Returns:
            ``boxes [B, K, 4]``, ``scores [B, K]``, ``labels [B, K]``, ``counts [B]``; ``K`` is ``max_detections``. See
            :func:`ssd_ext.ops.detect`. Boxes are clipped to the image.

        Raises:
            ValueError: predictions for another number of priors than :attr:`prior_spec` has.
        """
        self.prior_spec.check(deltas.shape[1])
        boxes, scores, labels, counts = ops.detect(
            deltas,
            logits,
            self.priors,
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            topk_per_class=self.topk_per_class,
            max_detections=self.max_detections,
            variances=self.loss.matching["variances"],
            window=(0.0, 0.0, 1.0, 1.0),
        )
        return boxes * self._extents(sizes).to(boxes)[:, None], scores, labels, counts

    @overload
    def forward(self, images: Images, targets: None = None) -> list[dict[str, Tensor]]: ...

    @overload
    def forward(self, images: Images, targets: GroundTruth | Targets) -> dict[str, Tensor]: ...

    def forward(
        self, images: Images, targets: GroundTruth | Targets | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """The losses where there are targets, else the detections.

        Args:
            images: a list of ``[3, h, w]``, of any sizes, or ``[B, 3, h, w]``; RGB in 0..1.
            targets: the objects of the images, boxes in pixels of the images as given, labels 1..C-1, or -1 for a
                region to ignore: a :class:`ssd_ext.GroundTruth`, or a list with a dict ``{"boxes": [G, 4], "labels":
                [G]}`` for each image. An image may have none.

        Returns:
            With targets ``{"bbox_regression": scalar, "classification": scalar}``, to be added up; NaN or infinite
            where the predictions are. Without, of each image ``{"boxes": [N, 4], "scores": [N], "labels": [N]}`` by
            descending score.

        Raises:
            ValueError: as :meth:`transform`; targets that do not go with the images, or none in training mode;
                as :class:`ssd_ext.MultiBoxLoss` does.
        """
        if targets is None:
            if self.training:
                raise ValueError("targets must be given in training mode; call eval() to detect")
            return ops.unpad(*self.predict(images))
        ground_truth = as_ground_truth(targets)
        if ground_truth.num_images != len(images):
            raise ValueError(
                f"targets must be of the {len(images)} images given, got those of {ground_truth.num_images}"
            )
        return self.losses(*self.heads(self.transform(images)), ground_truth, self._sizes(images))

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's is of any arguments and any result

    def losses(
        self, deltas: Tensor, logits: Tensor, ground_truth: GroundTruth | Targets, sizes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses from what :meth:`heads` gave.

        Args:
            deltas: ``[B, P, 4]``.
            logits: ``[B, P, C]``.
            ground_truth: as the targets of :meth:`forward`.
            sizes: as for :meth:`postprocess`, of the images that the boxes are in.

        Returns:
            As :meth:`forward`.

        Raises:
            ValueError: as :meth:`postprocess`, and as :class:`ssd_ext.MultiBoxLoss` does.
        """
        self.prior_spec.check(deltas.shape[1])
        extents = self._extents(sizes).to(self.priors)
        relative = as_ground_truth(ground_truth).to(extents.device).normalized(extents)
        loc, conf = self.loss(deltas, logits, relative, self.priors)
        return {"bbox_regression": loc, "classification": conf}

    def _sizes(self, images: Images) -> Tensor | None:
        """``(h, w)`` of the images, ``[B, 2]``, or ``[1, 2]`` if all have one size; None for ``image_size``."""
        shapes = [tuple(images.shape[-2:])] if isinstance(images, Tensor) else [tuple(x.shape[-2:]) for x in images]
        if all(shape == self.image_size for shape in shapes):
            return None
        if len(set(shapes)) > 1:
            return torch.tensor(shapes).to(self.mean.device, non_blocking=True)
        # Filled where they are needed: copying them from the host would not fit into a CUDA graph.
        return torch.stack([torch.full((1,), n, dtype=torch.float32, device=self.mean.device) for n in shapes[0]], 1)

    def _extents(self, sizes: Tensor | None) -> Tensor:
        """``(w, h, w, h)`` in pixels: what relative corners are multiplied by."""
        return self.extent if sizes is None else sizes.flip(-1).repeat(1, 2)

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


def _check_image(image: Tensor, name: str, dims: int) -> None:
    if image.dim() != dims or image.shape[-3] != 3:
        expected = "[3, h, w]" if dims == 3 else "[B, 3, h, w]"
        raise ValueError(f"{name} must be {expected}, got {list(image.shape)}")
    if not image.is_floating_point():
        raise ValueError(f"{name} must be RGB in 0..1 of floating point, got {image.dtype} (divide bytes by 255)")


def _map_shapes(backbone: nn.Module, neck: nn.Module | None, image_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """``(channels, rows, columns)`` of the maps that the heads look at, without computing them."""
    if min(image_size) < 1:  # which torch 2.11 convolves
        raise ValueError(f"image_size {image_size} does not suit the backbone: it must be positive")
    try:
        # two images: of one, batch normalisation refuses a map of a single cell
        maps = _on_meta(backbone, torch.empty(2, 3, *image_size, device="meta"))
    except RuntimeError as error:
        raise ValueError(f"image_size {image_size} does not suit the backbone: {error}") from error
    if neck is not None:
        try:
            maps = _on_meta(neck, maps)
        except RuntimeError as error:
            shapes = ", ".join(str(list(x.shape[1:])) for x in maps)
            raise ValueError(f"neck does not take the backbone's maps, {shapes}: {error}") from error
    return [(channels, rows, columns) for _, channels, rows, columns in (x.shape for x in maps)]


def _on_meta(module: nn.Module, x: Any) -> list[Tensor]:
    state = {name: t.to("meta") for name, t in [*module.named_parameters(), *module.named_buffers()]}
    maps: list[Tensor] = torch.func.functional_call(module, state, (x,))
    return maps
