"""Ground truth of a batch, in one form from the loader to the kernels: GroundTruth."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_ext._arguments import described, is_plain

# As torchvision's detectors take them: of each image {"boxes": [G_b, 4], "labels": [G_b]}.
Targets = Sequence[Mapping[str, Tensor]]
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class GroundTruth(NamedTuple):
    """The objects of a batch of images, image by image, in three tensors on one device.

    Image ``b`` has the rows ``offsets[b]`` to ``offsets[b + 1] - 1``. Rows from ``offsets[B]`` on are padding and
    belong to no image, so that batches of different numbers of objects can have tensors of one size, as a CUDA graph
    needs.

    Attributes:
        boxes: ``[G, 4]`` corners ``(x1, y1, x2, y2)``. float32, float64, float16 or bfloat16.
        labels: ``[G]`` int64 classes, from 1 on, as 0 is background; -1 marks a region to ignore.
        offsets: ``[B + 1]`` int64, ascending from 0.
    """

    boxes: Tensor
    labels: Tensor
    offsets: Tensor

    @classmethod
    def from_lists(cls, boxes: Sequence[Tensor], labels: Sequence[Tensor] | None = None) -> "GroundTruth":
        """Ground truth of lists with one tensor for each image.

        Args:
            boxes: ``[G_b, 4]`` of each image; ``[0]`` counts as none. Those of different types are promoted to one.
            labels: ``[G_b]`` integers of each image. None: every object has label 1, as for a proposal network.

        Raises:
            ValueError: a tensor of another shape, lists of different lengths, or ``tv_tensors.BoundingBoxes`` whose
                format is not XYXY.
        """
        if isinstance(boxes, Tensor) or isinstance(labels, Tensor):
            wrong = described(boxes if isinstance(boxes, Tensor) else labels)
            raise ValueError(
                f"GroundTruth.from_lists: boxes and labels must be lists with a tensor for each image, got {wrong}"
            )
        images = [_boxes(of_image, b) for b, of_image in enumerate(boxes)]
        counts = [len(of_image) for of_image in images]
        rows = _joined(images, images[0] if images else torch.empty(0, 4))
        classes = torch.ones(len(rows), dtype=torch.int64, device=rows.device)
        if labels is not None:
            if len(labels) != len(images):
                raise ValueError(f"labels must be of {len(images)} images, as boxes, got {len(labels)}")
            for b, (of_image, count) in enumerate(zip(labels, counts, strict=True)):
                if not is_plain(of_image) or of_image.shape != (count,):
                    given = list(of_image.shape) if is_plain(of_image) else described(of_image)
                    raise ValueError(f"labels of image {b} must be a tensor [{count}], as its boxes, got {given}")
            classes = as_int64(_joined(labels, classes))
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        return cls(rows, classes, torch.tensor(bounds).to(rows.device, non_blocking=True))

    @classmethod
    def from_targets(cls, targets: Targets) -> "GroundTruth":
        """Ground truth of a list of dicts, one for each image, as torchvision's detectors take them.

        Args:
            targets: for each image ``{"boxes": [G_b, 4], "labels": [G_b]}``; other entries are ignored.

        Raises:
            ValueError: as :meth:`from_lists`; a target without boxes or labels.
        """
        targets = list(targets)
        for b, target in enumerate(targets):
            if not (isinstance(target, Mapping) and "boxes" in target and "labels" in target):
                had = list(target) if isinstance(target, Mapping) else type(target).__name__
                raise ValueError(f"targets[{b}] must be a dict with boxes and labels, got {had}")
        return cls.from_lists([target["boxes"] for target in targets], [target["labels"] for target in targets])

    @property
    def num_images(self) -> int:
        """``B``."""
        return self.offsets.shape[0] - 1

    def to(self, *args: Any, **kwargs: Any) -> "GroundTruth":
        """As :meth:`torch.Tensor.to`: all three tensors move to a device; a dtype is that of the boxes only."""
        boxes = self.boxes.to(*args, **kwargs)
        labels, offsets = (t.to(boxes.device, non_blocking=kwargs.get("non_blocking", False)) for t in self[1:])
        return GroundTruth(boxes, labels, offsets)

    def to_targets(self) -> list[dict[str, Tensor]]:
        """The inverse of :meth:`from_targets`, without the padding. The offsets are copied to the host."""
        bounds = self.offsets.tolist()
        return [{"boxes": self.boxes[i:j], "labels": self.labels[i:j]} for i, j in pairwise(bounds)]

    def normalized(self, extents: Tensor) -> "GroundTruth":
        """With every box divided by the size of its image: pixels become fractions.

        Args:
            extents: ``[B, 4]`` floats ``(w, h, w, h)`` on the same device, or ``[1, 4]`` if all images have one size.
                The boxes get their type.

        Raises:
            ValueError: extents of another number of images.
        """
        if len(extents) not in (1, self.num_images):
            raise ValueError(f"extents must be [1, 4] or [{self.num_images}, 4], got {list(extents.shape)}")
        if len(extents) > 1:
            rows = torch.arange(len(self.boxes), device=self.offsets.device)
            image = torch.bucketize(rows, self.offsets[1:], right=True)  # the padding has B
            extents = extents[image.clamp(max=len(extents) - 1)]
        return self._replace(boxes=self.boxes.to(extents) / extents)

    def validate(self, num_classes: int | None = None) -> None:
        """Raise for the first object that cannot be matched or whose label is out of range. Waits for the GPU.

        Args:
            num_classes: ``C``, with background; None: labels have no upper bound.

        Raises:
            ValueError: a box with a NaN, an infinity or without area, or a label that is neither in ``1..C - 1`` nor
                -1; names image, box and value. A part that is not a tensor.
        """
        self._check_tensors()
        used = int(self.offsets[-1])
        boxes, labels = self.boxes[:used], self.labels[:used]
        for row in (~are_valid(boxes)).nonzero().flatten().tolist()[:1]:
            raise ValueError(
                "ground truth must be finite (x1, y1, x2, y2) with x1 < x2, y1 < y2 and an area that its dtype holds, "
                f"got {boxes[row].tolist()} ({self._place(row)})"
            )
        top = torch.iinfo(torch.int64).max if num_classes is None else num_classes - 1
        for row in ((labels < -1) | (labels == 0) | (labels > top)).nonzero().flatten().tolist()[:1]:
            valid = "1 or more" if num_classes is None else f"in 1..{top}"
            raise ValueError(
                f"label must be {valid} (0 is background, -1 a region to ignore), got {int(labels[row])} "
                f"({self._place(row)})"
            )

    def _check_tensors(self) -> None:
        for name, part in self._asdict().items():
            if not is_plain(part):
                raise ValueError(f"ground_truth.{name} must be a plain tensor, got {described(part)}")

    def _place(self, row: int) -> str:
        bounds = self.offsets.cpu()
        image = int(torch.searchsorted(bounds, torch.tensor(row), right=True)) - 1
        return f"image {image}, box {row - int(bounds[image])}"


def as_ground_truth(value: GroundTruth | Targets, like: Tensor | None = None) -> GroundTruth:
    """A :class:`GroundTruth` as it is, or made of a list of dicts.

    Under ``torch.compile`` a list is joined outside of the graph, with a warning.

    Args:
        value: the ground truth.
        like: of what device and dtype boxes are if there are none, as ``torch.tensor([])`` says nothing of them.

    Raises:
        ValueError: anything else, and as :meth:`GroundTruth.from_targets`.
    """
    if not isinstance(value, GroundTruth):
        if torch.compiler.is_dynamo_compiling():
            joined: GroundTruth = _joined_outside_of_the_graph(value, like)
            return joined
        if not isinstance(value, list | tuple) or any(isinstance(item, Tensor) for item in value):
            kind = f"a {type(value).__name__}"
            raise ValueError(
                "ground truth must be a GroundTruth or a list of dicts with boxes and labels, one for each image (of "
                "lists of tensors, GroundTruth.from_lists(boxes, labels) makes one), got "
                + (f"{kind} of tensors" if isinstance(value, list | tuple) else kind)
            )
        value = GroundTruth.from_targets(value)
    value._check_tensors()
    if like is not None and value.boxes.shape == (0, 4):
        return value.to(like.device)._replace(boxes=like.new_empty(0, 4))
    return value


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="Ground truth in a list is joined outside of the graph. For fullgraph=True give an ssd_ext.GroundTruth, "
    "which GroundTruth.from_targets(targets) makes of the list."
)
def _joined_outside_of_the_graph(targets: Targets, like: Tensor | None) -> GroundTruth:
    warnings.warn(
        "ground truth in a list makes torch.compile compile the code that it is given to again for each pattern of "
        "images with no object, one or more, until torch gives up and runs it eagerly: make an ssd_ext.GroundTruth of "
        "it outside, by GroundTruth.from_targets(targets)",
        stacklevel=2,
    )
    return as_ground_truth(targets, like)


def are_valid(boxes: Tensor) -> Tensor:
    """``[N]`` bool: which of ``[N, 4]`` corners can be matched: finite, with an area above 0 that their dtype holds.

    The halves are taken as the float32 that the ops compute in.
    """
    corners = boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes
    extent = corners[:, 2:] - corners[:, :2]
    area = extent.prod(1)
    return torch.isfinite(corners).all(1) & (extent > 0).all(1) & torch.isfinite(area) & (area > 0)


def as_int64(values: Tensor) -> Tensor:
    """Integers of any width as int64; other types as they are, for the op to refuse."""
    return values.long() if values.dtype in INTEGERS and values.dtype != torch.int64 else values


def _boxes(boxes: Tensor, image: int) -> Tensor:
    if not is_plain(boxes):
        raise ValueError(f"boxes of image {image} must be a tensor [G, 4], got {described(boxes)}")
    boxes = boxes.reshape(0, 4) if boxes.shape == (0,) else boxes
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes of image {image} must be [G, 4], got {list(boxes.shape)}")
    form = getattr(boxes, "format", None)  # of tv_tensors.BoundingBoxes
    if form is None:
        return boxes
    if form.value != "XYXY":
        raise ValueError(
            f"boxes of image {image} must be corners (XYXY), got {form.value}: "
            "torchvision.transforms.v2.ConvertBoundingBoxFormat converts them"
        )
    return boxes.as_subclass(Tensor)


def _joined(tensors: Sequence[Tensor], empty: Tensor) -> Tensor:
    """Their rows, of one tensor without a copy. Empty ones do not decide the type: torch.tensor([]) is float32."""
    full = [t for t in tensors if len(t)]
    return empty if not full else full[0] if len(full) == 1 else torch.cat(full)
