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

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def load_detector(
    path: str | Path,
    *,
    model: str | SSD | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[SSD, list[str]]:
    """A detector in eval mode and the names of its classes.

    Args:
        path: a checkpoint of :func:`ssd_ext.training.fit`, which tells all; or weights from elsewhere, as
            :func:`ssd_ext.models.load_weights` reads them.
        model: a name of ``ssd_ext.models.MODELS``, where the file does not tell; or a detector of your own backbone,
            whose weights the file is.
        num_classes: with the background, where the file does not tell.
        classes: names for the classes, instead of those in the file; by default ``"1"``, ``"2"`` ...

    Raises:
        OSError: no such file.
        ValueError: a file of another kind or model, or one that does not tell what ``model`` is left out for.
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
        raise ValueError(f"{path} holds a detector of its own backbone: build it, and give it as model")
    try:
        return create(**architecture)
    except TypeError as error:
        raise ValueError(f"{path} holds a detector that this version cannot build: {error}") from error


def as_input(image: Tensor, device: str | torch.device) -> Tensor:
    """A uint8 image as the models take it: float32 in 0..1, on their device."""
    converted: Tensor = F.to_dtype(image.to(device), torch.float32, scale=True)
    return converted


@torch.inference_mode()
def detections(
    model: SSD, dataset: "Dataset", indices: Iterable[int] | None = None, *, batch_size: int = 8, workers: int = 0
) -> list[dict[str, Tensor]]:
    """What ``model`` (set to eval mode) finds in images of a data set, on the CPU, in the order of ``indices``.

    Returns:
        For each image ``{"boxes" [N, 4], "scores" [N], "labels" [N]}``: corners in pixels, by falling score.
    """
    model.eval()
    device = next(model.parameters()).device
    chosen = Subset(dataset, list(range(len(dataset)) if indices is None else indices))
    loader = DataLoader(chosen, batch_size, num_workers=workers, collate_fn=_images)
    found = []
    for images in loader:
        batch = [as_input(image, device) for image in images]
        found += [{name: value.cpu() for name, value in image.items()} for image in model(batch)]
    return found


def _images(items: list[tuple[Tensor, Any]]) -> list[Tensor]:
    return [image for image, _ in items]


def gathered_detections(model: SSD, dataset: "Dataset", *, workers: int = 0) -> list[dict[str, Tensor]]:
    """:func:`detections` of the whole data set, to which every rank of ``torch.distributed`` contributes its share."""
    if not distributed.is_initialized():
        return detections(model, dataset, workers=workers)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    own = detections(model, dataset, range(rank, len(dataset), ranks), workers=workers)
    shares = [own] * ranks
    distributed.all_gather_object(shares, own)
    return [shares[i % ranks][i // ranks] for i in range(len(dataset))]


def draw(image: Tensor, found: dict[str, Tensor], classes: Sequence[str], threshold: float = 0.5) -> Tensor:
    """The image, uint8 ``[3, H, W]``, with boxes whose score is above ``threshold``, the best on top."""
    shown = (found["scores"] > threshold).nonzero()[:, 0].flip(0)
    if len(shown) == 0:
        return image
    labels = found["labels"][shown].tolist()
    width = max(1, round(max(image.shape[1:]) / 250))
    drawn: Tensor = draw_bounding_boxes(
        image,
        found["boxes"][shown],
        [f"{classes[k - 1]} {s:.2f}" for k, s in zip(labels, found["scores"][shown].tolist(), strict=True)],
        colors=[COLORS[k % len(COLORS)] for k in labels],
        width=width,
        label_background_colors=[COLORS[k % len(COLORS)] for k in labels],
        fill_labels=True,
    )
    return drawn
