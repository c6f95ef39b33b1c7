"""SSD as one graph from images to detections, in files that other programs run.

>>> from ssd_ext import export
>>> export.onnx(model, "detector.onnx", classes=classes)  # standard ONNX operators
>>> export.save(model, "detector.pt2", classes=classes)  # torch.export
>>> export.aot_inductor(model, "compiled.pt2", classes=classes)  # compiled for this machine
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ssd_ext.models import SSD

__all__ = ["METADATA_FILE", "aot_inductor", "metadata", "onnx", "onnx_translations", "program", "save"]

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


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of the ops to standard ONNX operators, for ``torch.onnx.export`` of any model that calls them.

    >>> torch.onnx.export(model, args, dynamo=True, custom_translation_table=export.onnx_translations())

    The table holds ``encode``, ``decode``, ``box_iou``, ``nms``, ``batched_nms``, ``nms_padded``,
    ``batched_nms_padded`` and ``detect`` of :mod:`ssd_ext.ops`, with all their arguments; the numbers of images, boxes
    and priors may be dynamic. What a runtime computes is what the op computes, with the same rules for ties, NaN and
    boxes without area, except:

    - All types compute in float32, float64 and the integers of ``box_iou`` too; the result has the op's type.
    - Runtimes round in their own way, so that a score or an IoU beside its threshold, and nearly equal scores, may be
      decided differently.
    - With an ``iou_threshold`` of 0, an IoU below 1.2e-38 does not suppress. Scores are ranked in float32, which is
      exact for up to 2^24 boxes.
    - ``batched_nms`` needs memory for a number for each box and each distinct id.

    This holds in ONNX Runtime, which follows the specification. OpenVINO (on the CPU) differs: an IoU equal to the
    threshold suppresses, of equal scores any may come first and be kept, ids must fit in 32 bits, and no dimension may
    be fixed at 0. It may compute in bfloat16 unless ``INFERENCE_PRECISION_HINT`` is ``"f32"``. Other runtimes were not
    tested.

    Returns:
        An op and the function that translates it, for each op: ``{**export.onnx_translations(), op: function}`` adds
        one of your own. They need ``dynamo=True`` and an ``opset_version`` of 18 or newer.

    Raises:
        ImportError: onnx or onnxscript is not installed.

    Source: the operators NonMaxSuppression (11), TopK (11), Unique (11), GatherND (13), ScatterElements (18) and
    ScatterND (18) of the ONNX specification.
    """
    try:
        from ssd_ext import _onnx
    except ImportError as error:
        raise ImportError(
            'export to ONNX needs onnxscript: pip install "ssd_ext[export]"', name="onnxscript"
        ) from error
    ops = torch.ops.ssd_ext
    return {
        ops.encode.default: _onnx.encode,
        ops.decode.default: _onnx.decode,
        ops.box_iou.default: _onnx.box_iou,
        ops.nms.default: _onnx.nms,
        ops.nms_padded.default: _onnx.nms_padded,
        ops.detect.default: _onnx.detect,
    }


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
    metadata of the file are the entries of :func:`metadata` as JSON. ONNX Runtime takes no convolutions in bfloat16:
    export such a model after ``float()``.

    What a runtime finds is what :func:`ssd_ext.ops.detect` finds, in the same order, as far as it computes the same
    floats: :func:`onnx_translations`, of which the file is made, tells the exceptions.

    Args:
        model: in eval mode; or a program of ``torch.export`` of any detector that calls no ops of this package but
            those of :func:`onnx_translations`, which is written without metadata.
        path: of the file, of which the weights are part: at most 2 GiB.
        classes: as for :func:`metadata`.
        size: as for :func:`program`.
        opset: 18 or newer.
        output_names: of a program's outputs, where they are others.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError: a module other than an :class:`ssd_ext.models.SSD`.
        ValueError: as :func:`metadata`; an ``opset`` below 18; a program that calls an op without a translation;
            ``classes`` or ``size`` for a program.

    Source: as :func:`onnx_translations`, and the operator Resize (18) of the ONNX specification.
    """
    translations = onnx_translations()
    if opset < 18:
        raise ValueError(f"opset must be 18 or newer, got {opset}")
    if isinstance(model, torch.export.ExportedProgram):
        if classes is not None or size is not None:
            raise ValueError(
                "classes and size are for a model: a program is written without metadata, and has its size"
            )
        called = {node.target for node in model.graph.nodes if getattr(node.target, "namespace", None) == "ssd_ext"}
        if missing := called - translations.keys():
            names = ", ".join(sorted(op.name() for op in missing))
            raise ValueError(f"program must call ops that onnx_translations() translates, but calls {names}")
        texts, exported = {}, model
    else:
        texts, exported = _as_json(metadata(model, classes, size)), program(model, size)
    written = torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=opset,
        output_names=output_names,
        custom_translation_table=translations,
        verbose=False,
    )
    assert written is not None  # None only without dynamo
    written.model.metadata_props.update(texts)
    written.save(path, external_data=False)
