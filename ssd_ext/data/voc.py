"""Pascal VOC folders."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np

from ssd_ext.data.dataset import Dataset, Object, Photo

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def load_voc(
    path: str | Path,
    split: str | None = None,
    classes: list[str] | None = None,
    *,
    images: str | Path | None = None,
    one_based: bool = True,
    **options: Any,
) -> Dataset:
    """Load a folder with ``Annotations/*.xml``, ``JPEGImages/`` and ``ImageSets/Main/<split>.txt``.

    An image is found by the name of its annotation file, whatever its extension, else by ``<filename>``.

    Args:
        path: of the folder.
        split: the list to load; None: every annotated image, by name.
        classes: names in the order of the labels; None: the lines of ``classes.txt`` in the folder, else all names
            in ``Annotations`` (of every split), sorted.
        images: folder of the images; None: ``JPEGImages``.
        one_based: pixels count from 1 and ``xmax`` is the last one inside, as VOC defines: the box's corners are
            ``(xmin - 1, ymin - 1, xmax, ymax)`` (as in detectron2). False: corners are taken as they stand, for
            tools that write them so (labelImg does, with 0 replaced by 1).
        **options: ``invalid``, ``check_images`` and ``transform`` of :class:`Dataset`.

    Raises:
        FileNotFoundError: a folder, list or annotation is missing.
        ValueError: as :class:`Dataset`; an annotation that cannot be read, an unknown class.
    """
    path = Path(path)
    annotations, images = path / "Annotations", Path(images or path / "JPEGImages")
    for folder in (annotations, images):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
    names = _split(path, split)
    if not names:
        raise ValueError(f"{path}: no images in {'Annotations' if split is None else f'split {split}'}")
    classes = classes or _classes(path)
    files = {file.stem: file for file in sorted(images.iterdir(), reverse=True)}
    photos = [_photo(annotations / f"{name}.xml", index, classes, images, files) for index, name in enumerate(names)]
    origin = np.array([1, 1, 0, 0]) if one_based else 0
    return Dataset(photos, classes, corners=lambda boxes: boxes - origin, form=f"({', '.join(_CORNERS)})", **options)


def _split(path: Path, split: str | None) -> list[str]:
    if split is None:
        return sorted(file.stem for file in (path / "Annotations").glob("*.xml"))
    file = path / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        known = ", ".join(sorted(other.stem for other in file.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"no split {split!r} in {file.parent}; there is: {known}")
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip()]  # VOC's lists of one class have a second column


def _classes(path: Path) -> list[str]:
    file = path / "classes.txt"
    if file.is_file():
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = {
        (thing.findtext("name") or "").strip()
        for annotation in (path / "Annotations").glob("*.xml")
        for thing in _parse(annotation).iterfind("object")
    }
    if not names:
        raise ValueError(f"{path}: no object in any annotation, so that the classes are unknown")
    return sorted(names)


def _parse(file: Path) -> ET.Element:
    if not file.is_file():
        raise FileNotFoundError(f"no annotation {file}")
    try:
        return ET.parse(file).getroot()
    except ET.ParseError as error:
        raise ValueError(f"{file} is not an XML file: {error}") from error


def _photo(file: Path, index: int, classes: list[str], images: Path, files: dict[str, Path]) -> Photo:
    root = _parse(file)
    labels = {name: label for label, name in enumerate(classes, 1)}
    objects = [_object(file, number, thing, labels) for number, thing in enumerate(root.iterfind("object"), 1)]
    texts = [root.findtext(f"size/{side}") for side in ("width", "height")]
    try:
        width, height = (int(text or 0) for text in texts)
    except ValueError:
        raise ValueError(f"{file}: the size {texts} is not two whole numbers") from None
    path = files.get(file.stem) or images / (root.findtext("filename") or f"{file.stem}.jpg").strip()
    size = (width, height) if width and height else None
    return Photo(file.stem, path, index, size, file, objects)


def _object(file: Path, number: int, thing: ET.Element, labels: dict[str, int]) -> Object:
    name = (thing.findtext("name") or "").strip()
    if name not in labels:
        raise ValueError(f"{file}: object {number} has the unknown class {name!r}; known are {', '.join(labels)}")
    texts = [thing.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    try:
        x1, y1, x2, y2 = (float(text or "") for text in texts)
    except ValueError:
        raise ValueError(f"{file}: object {number} ({name}) has no box of four numbers: {texts}") from None
    difficult = (thing.findtext("difficult") or "").strip() == "1"
    return Object((x1, y1, x2, y2), labels[name], difficult=difficult)
