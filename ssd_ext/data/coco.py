"""COCO annotation files."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from ssd_ext.data.dataset import Dataset, Object, Photo


def load_coco(
    path: str | Path, classes: list[str] | None = None, *, images: str | Path | None = None, **options: Any
) -> Dataset:
    """Load a COCO JSON file ("instances") with the images beside it.

    Args:
        path: of the file.
        classes: names in the order of the labels; None: the categories by their ids, which may have gaps.
        images: folder of the images; None: the first that holds them of ``images`` beside the file, a folder named
            as in ``annotations/instances_<folder>.json`` beside ``annotations`` or in ``images`` there, and the
            file's own.
        **options: ``invalid``, ``check_images`` and ``transform`` of :class:`Dataset`.

    Raises:
        FileNotFoundError: the file or the folder of images is missing.
        ValueError: as :class:`Dataset`; not a COCO file, an unknown class or image.
        ImportError: without pycocotools.
    """
    path = Path(path)
    coco = _read(path)
    ids = sorted(coco.cats)
    names = [coco.cats[key]["name"] for key in ids]
    if len(set(names)) < len(names) or len(coco.imgs) < len(coco.dataset["images"]):
        raise ValueError(f"{path}: two categories have one name, or two images one id; categories are {names}")
    if not coco.imgs:
        raise ValueError(f"{path}: no images")
    classes = classes or names
    labels = {key: classes.index(name) + 1 for key, name in zip(ids, names, strict=True) if name in classes}
    stray = next((thing for thing in coco.anns.values() if thing["image_id"] not in coco.imgs), None)
    if stray:
        raise ValueError(f"{path}: annotation {stray['id']} belongs to the unknown image {stray['image_id']}")
    folder = Path(images) if images else _image_folder(path, next(iter(coco.imgs.values()))["file_name"])
    photos = [_photo(path, folder, coco, key, labels, classes) for key in sorted(coco.imgs)]
    id_of = dict(zip(names, ids, strict=True))
    return Dataset(
        photos,
        classes,
        category_ids=[id_of.get(name) for name in classes],
        corners=lambda boxes: boxes + np.concatenate([np.zeros_like(boxes[:, :2]), boxes[:, :2]], axis=1),
        form="[x, y, width, height]",
        **options,
    )


def coco_file(path: Path, split: str | None) -> Path | None:
    """The annotation file that ``path`` means: itself, or the one of ``split`` in the folder; None if there is none."""
    if path.suffix == ".json":
        return path
    files = [path / "annotations" / f"instances_{split}.json"] if split else [path / "instances.json"]
    return next((file for file in files if file.is_file()), None)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file {path}")
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise ImportError(f'{path} needs pycocotools: pip install "ssd_ext[train]"', name="pycocotools") from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            coco = COCO(path)
        for key in ("images", "annotations", "categories"):
            coco.dataset[key]
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a COCO annotation file: {error!r}") from error
    return coco


def _image_folder(path: Path, file_name: str) -> Path:
    name = path.stem.removeprefix("instances_")
    above = path.parent.parent
    folders = [path.parent / "images", above / name, above / "images" / name, path.parent]
    for folder in folders:
        if (folder / file_name).is_file():
            return folder
    raise FileNotFoundError(f"no image {file_name} of {path} in any of {', '.join(map(str, folders))}; give images=")


def _photo(path: Path, folder: Path, coco: Any, key: int, labels: dict[int, int], classes: list[str]) -> Photo:
    image = coco.imgs[key]
    objects = []
    for thing in coco.imgToAnns.get(key, []):
        category, box = thing.get("category_id"), thing.get("bbox")
        if category not in labels:
            name = coco.cats.get(category, {}).get("name")
            raise ValueError(
                f"{path}: annotation {thing['id']} of image {image['file_name']} has the unknown class "
                f"{name!r} (category {category}); known are {', '.join(classes)}"
            )
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
            raise ValueError(
                f"{path}: annotation {thing['id']} of {image['file_name']} has no box of four numbers: {box}"
            )
        crowd = bool(thing.get("iscrowd"))
        objects.append(Object(tuple(box), labels[category], crowd=crowd, area=thing.get("area")))
    size = (image.get("width"), image.get("height"))
    return Photo(image["file_name"], folder / image["file_name"], key, size if all(size) else None, path, objects)
