"""What both layouts have in common: the checked data set, reading of images, batches."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ssd_ext.ground_truth import GroundTruth, are_valid

PER_OBJECT = ("boxes", "labels", "difficult", "crowd", "area")  # the entries of a target with one row an object
_ORIENTATION, _SWAPS_SIDES = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that turn by a quarter


class Object(NamedTuple):
    """One object of a :class:`Photo`."""

    box: tuple[float, float, float, float]  # in the form of the annotation file
    label: int
    difficult: bool = False
    crowd: bool = False
    area: float | None = None  # None: that of the box


class Photo(NamedTuple):
    """One image as its annotation file describes it."""

    name: str
    path: Path
    image_id: int
    size: tuple[int, int] | None  # (width, height); None where the file does not tell
    source: Path  # the annotation file
    objects: list[Object]


class Dataset(torch.utils.data.Dataset[Any]):
    """Images with boxes; ``dataset[i]`` is ``(image, target)``, or what ``transform`` makes of them.

    ``image`` is uint8 RGB ``[3, h, w]``, see :func:`read_image`. ``target`` holds, for ``G >= 0`` objects:

    - ``boxes`` ``[G, 4]`` float32 corners ``(x1, y1, x2, y2)`` in pixels, 0 at the image's left or top edge,
      ``w`` or ``h`` at the other;
    - ``labels`` ``[G]`` int64 from 1: label ``i`` is ``classes[i - 1]``;
    - ``difficult`` and ``crowd`` ``[G]`` bool, for the metrics; :func:`training_target` leaves such objects out;
    - ``area`` ``[G]`` float32, of the object's mask where the file tells, else of the box, in square pixels;
    - ``name`` str and ``image_id`` int.

    All boxes are checked now, and all images decoded once (``check_images``, about a millisecond each), so that
    nothing fails in the middle of training. Boxes that reach out of their image are clipped, with a single warning.
    An image is turned upright by its EXIF orientation, and boxes refer to it so (as in detectron2; torchvision never
    turns), unless the annotated width and height show that the stored, unturned pixels were annotated.

    Attributes:
        classes: names; ``names`` of the images; ``category_ids``: of label 1, 2, ... in the annotation file.

    Args:
        photos: what the annotations tell, in order.
        classes: the names of the labels.
        category_ids: of each class; None: ``1, 2, ...``.
        corners: makes ``[N, 4]`` boxes in the file's form to corners.
        form: of the file's boxes, for messages.
        invalid: ``"error"`` refuses a box that is not finite, is inverted, has no area or lies outside its image;
            ``"skip"`` leaves such boxes out, with a single warning. (Some public sets have a few.)
        check_images: decode every image now; False: only read its header.
        transform: called with ``(image, target)``, such as :func:`augmentation`.

    Raises:
        ValueError: a class twice, images that are missing, cannot be decoded or have another size than annotated (the
            first five are named), a wrong box (the message tells file, object and coordinates).
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        classes: Sequence[str],
        *,
        category_ids: Sequence[int | None] | None = None,
        corners: Callable[[np.ndarray], np.ndarray],
        form: str,
        invalid: str = "error",
        check_images: bool = True,
        transform: Callable[[Tensor, dict[str, Any]], Any] | None = None,
    ) -> None:
        """Check everything."""
        if invalid not in ("error", "skip"):
            raise ValueError(f'invalid must be "error" or "skip": got {invalid!r}')
        self.classes = list(classes)
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"class names must be unique: got {self.classes}")
        self.category_ids = list(category_ids or range(1, len(self.classes) + 1))
        self.transform = transform
        self.names = [photo.name for photo in photos]
        self.paths = [photo.path for photo in photos]
        self.image_ids = [photo.image_id for photo in photos]
        self.sizes, self.upright = _inspect_all(photos, check_images)

        objects = [thing for photo in photos for thing in photo.objects]
        owner = np.repeat(np.arange(len(photos)), [len(photo.objects) for photo in photos])
        given = np.array([thing.box for thing in objects], dtype=np.float64).reshape(-1, 4)
        limits = np.array(self.sizes).reshape(-1, 2)[owner][:, [0, 1, 0, 1]]
        boxes, faults = _clip(corners(given), limits)
        if faults:
            first, fault = min(faults.items())
            photo, number = photos[owner[first]], first - np.searchsorted(owner, owner[first]) + 1
            text = (
                f"{photo.source}: object {number} of image {photo.name} {fault}: {form} is "
                f"({', '.join(f'{value:g}' for value in given[first])}), the image {_sides(self.sizes[owner[first]])}"
            )
            if invalid == "error":
                raise ValueError(text)
            warnings.warn(f"left out {len(faults)} of {len(boxes)} boxes, first in {text}", stacklevel=4)
        keep = np.array([index not in faults for index in range(len(boxes))], dtype=bool)
        self._keep_objects([thing for thing, kept in zip(objects, keep, strict=True) if kept], boxes[keep])
        self.offsets = [0, *np.bincount(owner[keep], minlength=len(photos)).cumsum().tolist()]

    def _keep_objects(self, objects: Sequence[Object], boxes: np.ndarray) -> None:
        """Into one tensor an entry for all images, which a worker of a DataLoader can share."""
        self.boxes = torch.from_numpy(boxes)
        self.labels = torch.tensor([thing.label for thing in objects], dtype=torch.int64)
        self.difficult = torch.tensor([thing.difficult for thing in objects], dtype=torch.bool)
        self.crowd = torch.tensor([thing.crowd for thing in objects], dtype=torch.bool)
        areas = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1)
        given_areas = torch.tensor([-1.0 if thing.area is None else thing.area for thing in objects])
        self.area = torch.where(given_areas >= 0, given_areas, areas)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        """``(image, target)``, or what ``transform`` makes of them."""
        target = self.target(index)
        image = read_image(self.paths[index], upright=self.upright[index])
        return self.transform(image, target) if self.transform else (image, target)

    def target(self, index: int) -> dict[str, Any]:
        """The target of an image, without reading it, not transformed."""
        index = range(len(self))[index]
        rows = slice(self.offsets[index], self.offsets[index + 1])
        target = {key: getattr(self, key)[rows].clone() for key in PER_OBJECT}
        size = self.sizes[index][::-1]
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        return target | {"name": self.names[index], "image_id": self.image_ids[index]}


def read_image(path: str | Path | BinaryIO, *, upright: bool = True) -> tv_tensors.Image:
    """Read any image that PIL knows as RGB.

    Grey, palette, CMYK and the like are converted, 16-bit grey is scaled to 8 bits, transparency is dropped (hidden
    pixels show their colour, as in torchvision); of an animation, the first frame.

    Args:
        path: of the file, or the file itself, opened to read bytes.
        upright: turn the image by its EXIF orientation.

    Returns:
        uint8 ``[3, h, w]``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, truncated or broken, or of a pixel type with no range (32-bit); names the file.
    """
    with _opened(path) as image:
        return tv_tensors.Image(F.pil_to_tensor(_decode(image, upright)))


def training_target(target: dict[str, Any], difficult: bool = False) -> dict[str, Any]:
    """A target without the objects to leave out of training: crowds, and difficult ones unless asked for.

    Args:
        target: as :class:`Dataset` gives it; not changed.
        difficult: train on difficult objects too.
    """
    keep = ~target["crowd"] if difficult else ~(target["crowd"] | target["difficult"])
    kept = {key: target[key][keep] for key in PER_OBJECT}
    kept["boxes"] = tv_tensors.wrap(kept["boxes"], like=target["boxes"])
    return target | kept


def collate(batch: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor | list[Tensor], GroundTruth, list[str]]:
    """A batch for ``DataLoader(collate_fn=...)``.

    Args:
        batch: pairs ``(image, target)``.

    Returns:
        The images, stacked to ``[B, 3, h, w]`` where all have one size, else as a list; their objects, as
        :class:`ssd_ext.models.SSD` takes them; and the ``"name"`` of each, or ``""``.
    """
    images = [image.as_subclass(Tensor) for image, _ in batch]
    same = len({image.shape for image in images}) == 1
    targets = [target for _, target in batch]
    ground_truth = GroundTruth.from_targets(targets)
    return torch.stack(images) if same else images, ground_truth, [target.get("name", "") for target in targets]


@contextlib.contextmanager
def _opened(path: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """The image, and one sentence that names the file for whatever PIL raises on broken ones."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image {path}") from error
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _decode(image: Image.Image, upright: bool) -> Image.Image:
    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels have no known range (mode {image.mode}); save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _inspect_all(photos: Sequence[Photo], decode: bool) -> tuple[list[tuple[int, int]], list[bool]]:
    """``(width, height)`` of every image and whether to turn it upright; raises for all faulty images at once."""

    def inspect(photo: Photo) -> tuple[tuple[int, int], bool] | str:
        try:
            return _inspect(photo, decode)
        except (OSError, ValueError) as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(inspect, photos))
    faults = [text for text in found if isinstance(text, str)]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{len(faults)} of {len(photos)} images cannot be used: {'; '.join(faults[:5])}{more}")
    usable = [entry for entry in found if not isinstance(entry, str)]
    return [size for size, _ in usable], [upright for _, upright in usable]


def _inspect(photo: Photo, decode: bool) -> tuple[tuple[int, int], bool]:
    with _opened(photo.path) as image:
        stored = image.size
        shown = stored[::-1] if image.getexif().get(_ORIENTATION) in _SWAPS_SIDES else stored
        upright = photo.size in (None, shown) or photo.size != stored
        if decode:
            image.draft("RGB", (1, 1))  # JPEG: all data is read, at an eighth of the size
            _decode(image, upright)
    size = shown if upright else stored
    if photo.size not in (None, size):
        raise ValueError(f"{photo.path} is {_sides(size)} pixels, but {photo.source} was made for {_sides(photo.size)}")
    return size, upright


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _clip(boxes: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    """Float32 corners within ``0..limits``, with one warning that counts, and what is wrong with which box."""
    with np.errstate(invalid="ignore"):
        clipped = np.clip(boxes, 0, limits)
        sides = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf)
        beyond = np.abs(boxes - clipped).max(1, initial=0)
        clipped = clipped.astype(np.float32)
    useless = ~are_valid(torch.from_numpy(clipped)).numpy()
    faults: dict[int, str] = {}
    for text, wrong in (  # the first that holds is told
        ("is not finite", ~np.isfinite(boxes).all(1)),
        ("is inverted", sides < 0),
        ("has no area", sides == 0),
        ("lies outside of the image", useless & (beyond > 0)),
        ("has no area in float32", useless),
    ):
        for index in np.flatnonzero(wrong):
            faults.setdefault(int(index), text)
    beyond[list(faults)] = 0
    if (beyond > 0).any():
        warnings.warn(
            f"clipped {(beyond > 0).sum()} of {len(boxes)} boxes to their images, beyond which they reached by "
            f"at most {beyond.max():.4g} pixels",
            stacklevel=5,
        )
    return clipped, faults
