"""A trained detector at work: load it, run it over a data set, draw what it found."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from ssd_ext import checkpoint
from ssd_ext.models import SSD, create, load_weights

if TYPE_CHECKING:
    from ssd_ext.data import Dataset

_RENAMED = {"priors": "prior_spec", "ratio": "neg_to_pos_ratio"}  # since 0.1.0, in checkpoints
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def load_detector(
    path: str | Path,
    *,
    model: str | SSD | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[SSD, list[str]]:
    """A detector in eval mode and the names of its classes.

    A checkpoint's detector has the priors that it was trained with, with a warning if their centres are more than a
    cell outside of the image, as :class:`ssd_ext.priors.PriorSpec` allowed in 0.1.0.

    Args:
        path: a checkpoint of :func:`ssd_ext.training.fit`, which holds model and classes; or weights from elsewhere, as
            :func:`ssd_ext.models.load_weights` reads them.
        model: a name of ``ssd_ext.models.MODELS``, if the file does not hold it; or a detector that you have built,
            which gets the weights of the file.
        num_classes: number of classes with the background, if the file does not hold it.
        classes: names for the classes, instead of those in the file; by default ``"1"``, ``"2"`` ...

    Raises:
        OSError: no such file.
        ValueError: a file of another kind or model, or one without model information if ``model`` is not given.
    """
    state = checkpoint.load(path)
    state = state if isinstance(state, dict) else {}
    names = state.get("classes")
    if isinstance(model, SSD):
        detector = model
    elif "architecture" in state:
        detector = _build(state["architecture"], path)
    elif model is None or (num_classes is None and classes is None):
        raise ValueError(f"{path} does not tell its model and classes: name both")
    else:
        detector = create(model, num_classes=num_classes or len(classes or ()) + 1)
    report = load_weights(detector, path)
    if report.skipped or not report.detector:
        raise ValueError(f"{path} is no whole detector with {detector.num_classes} classes: {report}")
    names = names or [str(i) for i in range(1, detector.num_classes)]
    names = list(classes or names)
    if len(names) != detector.num_classes - 1:
        raise ValueError(f"{path} has {detector.num_classes - 1} classes, but {len(names)} names were given: {names}")
    return detector.eval(), names


def _build(architecture: dict[str, Any], path: str | Path) -> SSD:
    if architecture.get("name") is None:
        raise ValueError(
            f"{path} holds a detector with a backbone, neck or head of its own: build it, and give it as model"
        )
    loss = {_RENAMED.get(key, key): value for key, value in architecture.get("loss", {}).items()}
    architecture = {_RENAMED.get(key, key): value for key, value in architecture.items()} | {"loss": loss}
    try:
        return create(**architecture)
    except TypeError as error:
        raise ValueError(f"{path} holds a detector that this version cannot build: {error}") from error


def as_input(image: Tensor, device: str | torch.device) -> Tensor:
    """A uint8 image as the models take it: float32 in 0..1, on their device."""
    converted: Tensor = F.to_dtype(image.to(device), torch.float32, scale=True)
    return converted


def detect_all(
    model: SSD, dataset: "Dataset", indices: Iterable[int] | None = None, *, batch_size: int = 8, workers: int = 0
) -> list[dict[str, Tensor]]:
    """What ``model`` (set to eval mode) finds in images of a data set, on the CPU, in the order of ``indices``.

    Returns:
        For each image ``{"boxes" [N, 4], "scores" [N], "labels" [N]}``: corners in pixels, by descending score.
    """
    model.eval()
    chosen = Subset(dataset, list(range(len(dataset)) if indices is None else indices))
    loader = DataLoader(chosen, batch_size, num_workers=workers, collate_fn=_images)
    return [found for images in loader for found in detect_images(model, images)]


@torch.inference_mode()
def detect_images(model: SSD, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """What ``model``, in eval mode, finds in uint8 images ``[3, h, w]``, on the CPU."""
    batch = [as_input(image, model.mean.device) for image in images]
    return [{name: value.cpu() for name, value in found.items()} for found in model(batch)]


def _images(items: list[tuple[Tensor, Any]]) -> list[Tensor]:
    return [image for image, _ in items]


def detect_all_across_ranks(model: SSD, dataset: "Dataset", *, workers: int = 0) -> list[dict[str, Tensor]]:
    """:func:`detect_all` of the whole data set, to which every rank of ``torch.distributed`` contributes its share."""
    if not distributed.is_initialized():
        return detect_all(model, dataset, workers=workers)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    own = detect_all(model, dataset, range(rank, len(dataset), ranks), workers=workers)
    shares = [own] * ranks
    distributed.all_gather_object(shares, own)
    return [shares[i % ranks][i // ranks] for i in range(len(dataset))]


def filter_by_score(found: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The detections of an image whose score is above ``threshold``."""
    shown = found["scores"] > threshold
    return {name: value[shown] for name, value in found.items()}


def _name(label: int, classes: Sequence[str]) -> str | int:
    return classes[label - 1] if label <= len(classes) else label


def as_json(found: dict[str, Tensor], classes: Sequence[str]) -> list[dict[str, Any]]:
    """The detections of an image for ``json.dump``.

    Returns:
        ``{"label": name, "score", "box": [x1, y1, x2, y2]}`` of each; a label without a name is given as a number.
    """
    rows = zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    return [
        {
            "label": _name(label, classes),
            "score": round(score, 4),
            "box": [round(x, 1) for x in box],
        }
        for label, score, box in rows
    ]


def draw(image: Tensor, found: dict[str, Tensor], classes: Sequence[str]) -> Tensor:
    """The image, uint8 ``[3, H, W]``, with the boxes of its detections, the first on top."""
    if len(found["scores"]) == 0:
        return image
    boxes, labels, scores = (found[key].flip(0) for key in ("boxes", "labels", "scores"))
    colors = [COLORS[k % len(COLORS)] for k in labels.tolist()]
    drawn: Tensor = draw_bounding_boxes(
        image,
        boxes,
        [f"{_name(k, classes)} {s:.2f}" for k, s in zip(labels.tolist(), scores.tolist(), strict=True)],
        colors=colors,
        width=max(1, round(max(image.shape[1:]) / 250)),
        label_background_colors=colors,
        fill_labels=True,
    )
    return drawn
