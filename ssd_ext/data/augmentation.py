"""SSD's augmentation, through torchvision.transforms.v2."""

import functools
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssd_ext import ops
from ssd_ext.data.dataset import PER_OBJECT, training_target

_MIN_SCALE = 0.3  # of a crop's sides, relative to the image's


def augmentation(
    image_size: tuple[int, int],
    *,
    photometric: float = 0.5,
    zoom_out: float = 0.5,
    max_zoom: float = 4.0,
    crop: bool = True,
    flip: float = 0.5,
    fill: tuple[int, int, int] = (123, 117, 104),
    difficult: bool = False,
) -> v2.Compose:
    """The paper's augmentation of training images, a function of ``(image, target)`` as :class:`Dataset` gives them.

    In this order: objects left out of training go (:func:`training_target`), zoom-out, a crop that keeps objects with
    a random minimal IoU, horizontal flip, resizing to ``image_size`` (with antialiasing), photometric distortion (the
    paper's first step: here it has fewer pixels to go through, and distorts the canvas too), conversion to float 0..1.
    Boxes, labels and the other rows of the target go together: an object is left out if its centre is out of the
    crop, or it is less than a pixel wide or high there. None may be left. (``area`` stays that of the file.)

    All randomness is torch's: ``torch.manual_seed`` repeats it, in the workers of a DataLoader its ``generator``.

    Args:
        image_size: ``(H, W)`` of the result.
        photometric: probability of each distortion (brightness, contrast, saturation, hue, order of the channels).
        zoom_out: probability of placing the image on a larger canvas.
        max_zoom: the canvas's largest sides, relative to the image's; at least 1.
        crop: whether to crop.
        flip: probability of the flip.
        fill: RGB of the canvas, 0..255: about the mean of photographs.
        difficult: train on difficult objects too.

    Source: Liu et al., SSD (2016), section 2.2, and its Caffe code; torchvision's SSD recipe.
    """
    steps = [
        functools.partial(_with_training_target, difficult=difficult),
        # A crop of the least size still has the result's pixels; photographs of phones would take seconds else.
        functools.partial(_shrink, longest=round(max(image_size) / _MIN_SCALE)),
        v2.RandomZoomOut(fill=fill, side_range=(1.0, max_zoom), p=zoom_out),
        *([_IoUCrop(min_scale=_MIN_SCALE)] if crop else []),
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(labels_getter=_rows),
        v2.RandomHorizontalFlip(p=flip),
        v2.Resize(image_size, antialias=True),
        v2.RandomPhotometricDistort(p=photometric),
        to_float(),
    ]
    return v2.Compose(steps)


def to_float() -> v2.ToDtype:
    """The transform of images to evaluate: uint8 to float32 0..1, nothing else."""
    return v2.ToDtype(torch.float32, scale=True)


class _IoUCrop(v2.RandomIoUCrop):
    """torchvision's crop with all trials of an option at once: its loop takes longer than all other steps together.

    Leaves an image without objects as it is, as the Caffe code does.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        boxes = next(entry for entry in flat_inputs if isinstance(entry, tv_tensors.BoundingBoxes))
        extent = torch.tensor(boxes.canvas_size[::-1])
        boxes = boxes.as_subclass(Tensor)
        if len(boxes) == 0:
            return {}
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        while True:
            min_iou = self.options[int(torch.randint(len(self.options), ()))]
            if min_iou >= 1:  # the option to leave the image as it is
                return {}
            scale, place = torch.rand(2, self.trials, 2)
            size = (extent * (self.min_scale + (self.max_scale - self.min_scale) * scale)).long()
            start = ((extent - size) * place).long()
            crops = torch.cat([start, start + size], dim=1).to(boxes.dtype)
            inside = ((crops[:, None, :2] < centres) & (centres < crops[:, None, 2:])).all(2)  # [trials, G]
            overlap = torch.where(inside, ops.box_iou(crops, boxes), -1.0).amax(1)
            aspect = size[:, 0] / size[:, 1]  # 0, infinite or NaN for a crop without pixels
            accepted = (self.min_aspect_ratio <= aspect) & (aspect <= self.max_aspect_ratio) & (overlap >= min_iou)
            if accepted.any():
                first = int(accepted.int().argmax())
                (left, top), (width, height) = start[first].tolist(), size[first].tolist()
                return {
                    "top": top,
                    "left": left,
                    "height": height,
                    "width": width,
                    "is_within_crop_area": inside[first],
                }


def _with_training_target(image: Tensor, target: dict[str, Any], difficult: bool) -> tuple[Tensor, dict[str, Any]]:
    return image, training_target(target, difficult)


def _shrink(image: Tensor, target: dict[str, Any], longest: int) -> tuple[Tensor, dict[str, Any]]:
    height, width = image.shape[-2:]
    if max(height, width) <= longest:
        return image, target
    size = [max(1, round(side * longest / max(height, width))) for side in (height, width)]
    return F.resize(image, size, antialias=True), target | {"boxes": F.resize(target["boxes"], size)}


def _rows(sample: tuple[Tensor, dict[str, Any]]) -> list[Tensor]:
    """What :class:`v2.SanitizeBoundingBoxes` filters along with the boxes."""
    return [sample[1][key] for key in PER_OBJECT if key != "boxes"]
