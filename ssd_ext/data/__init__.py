"""Data sets of images with boxes: Pascal VOC folders and COCO files, checked when they are loaded, and augmentation.

>>> from ssd_ext.data import augmentation, collate, load_dataset
>>> train = load_dataset("samples/playing_cards", "train", transform=augmentation((300, 300)))
>>> loader = torch.utils.data.DataLoader(train, batch_size=4, shuffle=True, collate_fn=collate)
"""

from pathlib import Path
from typing import Any

try:
    import torchvision  # noqa: F401
except ImportError as _error:
    raise ImportError('ssd_ext.data needs torchvision: pip install "ssd_ext[train]"', name="torchvision") from _error

from ssd_ext.data.augmentation import augmentation, to_float
from ssd_ext.data.coco import coco_file, load_coco
from ssd_ext.data.dataset import Dataset, collate, read_image, training_target
from ssd_ext.data.voc import load_voc

__all__ = [
    "Dataset",
    "augmentation",
    "collate",
    "load_coco",
    "load_dataset",
    "load_voc",
    "read_image",
    "to_float",
    "training_target",
]


def load_dataset(
    path: str | Path, split: str | None = None, classes: list[str] | None = None, **options: Any
) -> Dataset:
    """Load a data set in either layout, checked.

    Args:
        path: a VOC folder (with ``Annotations``), a COCO JSON file, or a folder with one
            (``annotations/instances_<split>.json`` or ``instances.json``).
        split: of VOC, a list in ``ImageSets/Main``, None for every annotated image; of a COCO folder, see ``path``.
        classes: names whose order gives the labels ``1, 2, ...``; None: see :func:`load_voc` and :func:`load_coco`.
        **options: of :func:`load_voc` or :func:`load_coco`, and of :class:`Dataset`.

    Raises:
        FileNotFoundError: a file or folder is missing, or the split.
        ValueError: neither layout, no images, or a wrong annotation or image; see :class:`Dataset`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no data set {path}")
    if (path / "Annotations").is_dir():
        return load_voc(path, split, classes, **options)
    file = coco_file(path, split)
    if file is None:
        raise ValueError(
            f"{path} is no data set: it should be a folder with Annotations/ (VOC), a COCO .json file, "
            f"or a folder with annotations/instances_<split>.json or instances.json; split is {split!r}"
        )
    return load_coco(file, classes, **options)
