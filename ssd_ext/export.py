"""SSD as one graph from images to detections, in files that other programs run.

>>> from ssd_ext import export
>>> export.onnx(model, "detector.onnx", classes=classes)  # standard ONNX operators
>>> export.save(model, "detector.pt2", classes=classes)  # torch.export
>>> export.aot_inductor(model, "compiled.pt2", classes=classes)  # compiled for this machine
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd_ext.ops._library import define, fake, promoted
from ssd_ext.reference.boxes import decode

if TYPE_CHECKING:
    from ssd_ext.models import SSD

__all__ = ["METADATA_FILE", "aot_inductor", "metadata", "onnx", "program", "save"]

OUTPUTS = ("boxes", "scores", "labels", "counts")
METADATA_FILE = "metadata.json"  # in what save() writes


class _Predict(nn.Module):
    """:meth:`ssd_ext.models.SSD.predict` as a module: torch.export takes no method."""

    def __init__(self, model: "SSD") -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.model.predict(images)


def program(model: "SSD", size: tuple[int, int] | None = None) -> torch.export.ExportedProgram:
    """:meth:`ssd_ext.models.SSD.predict` as ``torch.export`` sees it, on the model's device, for batches of any length.

    The process that loads it from a file must ``import ssd_ext``, which registers the op inside. The model's settings,
    such as ``score_threshold``, are fixed.

    Args:
        model: in eval mode.
        size: ``(h, w)`` in pixels of the images to be given, which are resized inside; default: the model's
            ``image_size``, where none are.

    Returns:
        A program of ``images [B, 3, h, w]``, RGB in 0..1, to ``boxes [B, K, 4]`` in their pixels, ``scores [B, K]``,
        ``labels [B, K]`` and ``counts [B]``.

    Raises:
        TypeError: another model than an :class:`ssd_ext.models.SSD`.
        ValueError: a model in training mode, a size that is not positive.
    """
    _check(model, size)
    images = model.mean.new_zeros(2, 3, *(size or model.image_size))
    with torch.no_grad():
        return torch.export.export(_Predict(model).eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _check(model: "SSD", size: tuple[int, int] | None) -> None:
    from ssd_ext.models import SSD

    if not isinstance(model, SSD):
        raise TypeError(f"model must be an ssd_ext.models.SSD, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in eval mode to be exported, got one in training mode: call eval()")
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be positive, got {size}")


def metadata(model: "SSD", classes: Sequence[str] | None = None, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """What exported files hold beside the program: plain values, in the files as JSON.

    Args:
        model: the exported model.
        classes: names of labels 1, 2, ...; default: ``"1"``, ``"2"`` ...
        size: as for :func:`program`.

    Returns:
        ``classes``: the list of names. ``preprocessing``: ``{"size": [h, w], "channels": "RGB", "range": [0, 1],
        "antialias": true}``, how to make the input of an image: resize it to ``size``, bilinear and with or without
        antialiasing as in training, and divide bytes by 255. Normalisation is part of the graph.

    Raises:
        TypeError: as :func:`program`.
        ValueError: as :func:`program`; another number of names than of classes.
    """
    _check(model, size)
    names = list(classes) if classes is not None else [str(label) for label in range(1, model.num_classes)]
    if len(names) != model.num_classes - 1:
        raise ValueError(f"classes must be {model.num_classes - 1} names, got {len(names)}: {names}")
    preprocessing = {
        "size": list(size or model.image_size),
        "channels": "RGB",
        "range": [0, 1],
        "antialias": model.antialias,
    }
    return {"classes": names, "preprocessing": preprocessing}


def save(
    model: "SSD", path: str | Path, *, classes: Sequence[str] | None = None, size: tuple[int, int] | None = None
) -> None:
    """Write :func:`program` by ``torch.export.save``, with :func:`metadata` as an extra file.

    ``torch.export.load(path, extra_files=extra)`` with ``extra = {export.METADATA_FILE: ""}`` reads both.

    Args:
        model: in eval mode.
        path: of the file, ``.pt2``.
        classes: as for :func:`metadata`.
        size: as for :func:`program`.

    Raises:
        TypeError: as :func:`program`.
        ValueError: as :func:`metadata`.
    """
    extra = {METADATA_FILE: json.dumps(metadata(model, classes, size))}
    torch.export.save(program(model, size), path, extra_files=extra)


def aot_inductor(
    model: "SSD", path: str | Path, *, classes: Sequence[str] | None = None, size: tuple[int, int] | None = None
) -> None:
    """Compile :func:`program` for this machine by AOTInductor, which needs a C++ compiler.

    ``torch._inductor.aoti_load_package(path)`` gives a function of images; its ``get_metadata()`` holds the entries of
    :func:`metadata` as JSON.

    Args:
        model: in eval mode.
        path: of the file, ``.pt2``.
        classes: as for :func:`metadata`.
        size: as for :func:`program`.

    Raises:
        TypeError: as :func:`program`.
        ValueError: as :func:`metadata`; a path with another suffix.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {path}")
    options = {"aot_inductor.metadata": _as_json(metadata(model, classes, size))}
    torch._inductor.aoti_compile_and_package(program(model, size), package_path=str(path), inductor_configs=options)


def _as_json(values: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in values.items()}


def onnx(
    model: "SSD | torch.export.ExportedProgram",
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    opset: int = 18,
    output_names: Sequence[str] = OUTPUTS,
) -> None:
    """Write a model of standard ONNX operators: ``images`` to ``boxes``, ``scores``, ``labels`` and ``counts``.

    Input and outputs are those of :func:`program`, padded likewise. The batch is dynamic, the size of images fixed. The
    metadata of the file are the entries of :func:`metadata` as JSON.

    What a runtime finds is what :func:`ssd_ext.ops.detect` finds, in the same order, as far as it computes the same
    floats: a score or an IoU beside its threshold, and nearly equal scores, may come out differently. The specification
    of ONNX says which of equal scores is chosen (the lowest class, then the lowest prior) and how boxes are clipped; of
    ``NonMaxSuppression`` it leaves open which of equal scores is kept, and its older texts whether an IoU equal to the
    threshold suppresses. In ONNX Runtime, as in this package, the lowest index is kept, and only an IoU strictly above
    suppresses. Scores and boxes are computed in float32 whatever the model's type.

    Args:
        model: in eval mode; or a program of ``torch.export`` of any detector that calls :func:`ssd_ext.ops.detect` and
            no other op of this package, which is written without metadata.
        path: of the file, of which the weights are part: at most 2 GiB.
        classes: as for :func:`metadata`.
        size: as for :func:`program`.
        opset: 18 or newer.
        output_names: of a program's outputs, where they are others.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError: a module other than an :class:`ssd_ext.models.SSD`.
        ValueError: as :func:`metadata`; an ``opset`` below 18; a program without priors; ``classes`` or ``size`` for a
            program.

    Source: the operators NonMaxSuppression (11), TopK (11), ScatterND (18), Resize (18) of the ONNX specification.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'ssd_ext.export.onnx needs onnxscript: pip install "ssd_ext[export]"', name="onnxscript"
        ) from error
    if opset < 18:
        raise ValueError(f"opset must be 18 or newer, got {opset}")
    if isinstance(model, torch.export.ExportedProgram):
        if classes is not None or size is not None:
            raise ValueError(
                "classes and size are for a model: a program is written without metadata, and has its size"
            )
        texts, exported = {}, model
    else:
        texts, exported = _as_json(metadata(model, classes, size)), program(model, size)
    exported = exported.run_decompositions({torch.ops.ssd_ext.detect.default: _detect})
    written = torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=opset,
        output_names=output_names,
        custom_translation_table={torch.ops.ssd_ext.nms_scores.default: _nms_scores_in_onnx},
        verbose=False,
    )
    assert written is not None  # None only without dynamo
    written.model.metadata_props.update(texts)
    written.save(path, external_data=False)


def _detect(
    deltas: Tensor,
    logits: Tensor,
    priors: Tensor,
    score_threshold: float,
    iou_threshold: float,
    topk_per_class: int,
    max_detections: int,
    sigmoid: bool,
    variances: list[float],
    bbox_xform_clip: float,
    class_agnostic: bool,
    window: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`ssd_ext.ops.detect` without a shape that depends on data, but for ``nms_scores``.

    A score of -1 is none. Rows of the scores are classes and columns priors, so that the lowest index, which
    ONNX's TopK prefers among equals, is the lowest class, then the lowest prior.
    """
    if len(priors) == 0:
        raise ValueError("ONNX takes no detector without priors")
    dtype = promoted(deltas, logits, priors)
    boxes = decode(
        deltas.float(), priors.float(), variances=(variances[0], variances[1]), bbox_xform_clip=bbox_xform_clip
    )
    if window is not None:
        low, high = window[:2] * 2, window[2:] * 2
        boxes = torch.stack([boxes[..., i].clamp(low[i], high[i]) for i in range(4)], -1)
    logits = logits.float()
    scores = (logits.sigmoid() if sigmoid else logits.softmax(-1)[..., 1:]).mT
    scores = torch.where(scores > score_threshold, scores, -1.0)
    classes, num_priors = scores.shape[1:]
    if topk_per_class < num_priors:
        best, prior = scores.topk(topk_per_class)
        scores = torch.full_like(scores, -1.0).scatter(2, prior, best)
    if class_agnostic:
        scores = torch.ops.ssd_ext.nms_scores(boxes.repeat(1, classes, 1), scores.flatten(1)[:, None], iou_threshold)
    else:
        scores = torch.ops.ssd_ext.nms_scores(boxes, scores, iou_threshold)
    scores = F.pad(scores.flatten(1), (0, max(0, max_detections - classes * num_priors)), value=-1.0)
    scores, index = scores.topk(max_detections)
    found = scores >= 0
    boxes = boxes.gather(1, (index % num_priors)[..., None].expand(-1, -1, 4))
    return (
        torch.where(found[..., None], boxes, 0.0).to(dtype),
        torch.where(found, scores, 0.0).to(dtype),
        torch.where(found, index // num_priors + 1, -1),
        found.sum(1),
    )


# What NonMaxSuppression keeps has a length that depends on data; written back as scores it has not, and torch.export
# can follow. The op only stands for the nodes of _nms_scores_in_onnx: it has no kernel.
define("nms_scores(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")


@fake("nms_scores")
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores)


def _nms_scores_in_onnx(boxes: Any, scores: Any, iou_threshold: float) -> Any:
    """``[B, P, 4]`` and ``[B, C, P]`` to ``[B, C, P]``: -1 instead of the scores that NMS, class by class, drops."""
    from onnxscript import opset18 as op

    most = op.Constant(value_ints=[scores.shape[2]])
    # Absent scores lie below the threshold of 0, real ones above: a runtime may compare by > or >=.
    kept = op.NonMaxSuppression(
        boxes, scores, most, op.Constant(value_floats=[iou_threshold]), op.Constant(value_floats=[0.0])
    )
    none = op.Expand(op.Constant(value_floats=[-1.0]), op.Shape(scores))
    return op.ScatterND(none, kept, op.GatherND(scores, kept))
