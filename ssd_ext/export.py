"""SSD as one graph from images to detections, to be compiled, exported or captured, and as standard ONNX operators.

>>> from ssd_ext import export
>>> program = export.program(model)  # for torch.export.save, AOTInductor, or export.onnx
>>> export.onnx(model, "detector.onnx")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd_ext.ops._library import define, fake
from ssd_ext.reference.boxes import decode

if TYPE_CHECKING:
    from ssd_ext.models import SSD

__all__ = ["EndToEnd", "onnx", "program"]

OUTPUTS = ("boxes", "scores", "labels", "counts")


class EndToEnd(nn.Module):
    """Images to padded detections in one graph: what to compile, export or capture in a CUDA graph.

    Args:
        model: set to eval mode. Exported or captured, its settings, such as ``score_threshold``, are fixed.
    """

    def __init__(self, model: "SSD") -> None:
        """See the class for the arguments."""
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:meth:`ssd_ext.models.SSD.transform`, heads and :meth:`~ssd_ext.models.SSD.detections`.

        Args:
            images: ``[B, 3, h, w]``, RGB in 0..1, of any size; ``B`` may be 0.

        Returns:
            ``boxes [B, K, 4]`` in pixels of ``images``, ``scores [B, K]``, ``labels [B, K]``, ``counts [B]``;
            :func:`ssd_ext.unpad` makes a list of them.

        Raises:
            ValueError: as :meth:`ssd_ext.models.SSD.transform`.
        """
        batch = self.model.transform(images)
        # Filled where they are needed: copying them from the host would not fit into a CUDA graph.
        size = [torch.full(images.shape[:1], n, dtype=torch.float32, device=images.device) for n in images.shape[-2:]]
        return self.model.predict(batch, torch.stack(size, 1))

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's is of any arguments and any result


def program(model: "SSD", size: tuple[int, int] | None = None) -> torch.export.ExportedProgram:
    """:class:`EndToEnd` as ``torch.export`` sees it, on the model's device, for batches of any length.

    ``torch.export.save`` and ``torch._inductor.aoti_compile_and_package`` write it to a file. The process that loads
    the file must ``import ssd_ext``, which registers the op inside.

    Args:
        model: in eval mode.
        size: ``(h, w)`` in pixels of the images to be given, which are resized inside; default: the model's
            ``image_size``, where none are.

    Returns:
        A program of ``images [B, 3, h, w]``, RGB in 0..1, to what :class:`EndToEnd` gives.

    Raises:
        TypeError: another model than an :class:`ssd_ext.models.SSD`.
        ValueError: a model in training mode.
    """
    from ssd_ext.models import SSD

    if not isinstance(model, SSD):
        raise TypeError(f"model must be an ssd_ext.models.SSD, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in eval mode to be exported, got one in training mode: call eval()")
    images = model.mean.new_zeros(2, 3, *(size or model.image_size))
    with torch.no_grad():
        return torch.export.export(EndToEnd(model).eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def onnx(
    model: "SSD | torch.export.ExportedProgram",
    path: str | Path,
    *,
    opset: int = 18,
    output_names: Sequence[str] = OUTPUTS,
) -> None:
    """Write a model of standard ONNX operators: ``images`` to ``boxes``, ``scores``, ``labels`` and ``counts``.

    Input and outputs are those of :func:`program`, padded likewise. The batch is dynamic, the size of images fixed.

    What a runtime finds is what :func:`ssd_ext.ops.detect` finds, in the same order, as far as it computes the same
    floats: a score or an IoU beside its threshold, and nearly equal scores, may be decided otherwise. The specification
    of ONNX says which of equal scores is chosen (the lowest class, then the lowest prior) and how boxes are clipped; it
    leaves open two rules of ``NonMaxSuppression``, for which ONNX Runtime does as this package: suppressed is an IoU
    strictly above the threshold, and of equal scores the lowest index is kept. Scores and boxes are computed in float32
    whatever the model's type.

    Args:
        model: in eval mode, for images of its own size; or a program, of :func:`program` for another size, or of
            ``torch.export`` of any detector that calls :func:`ssd_ext.ops.detect` and no other op of this package.
        path: of the file, of which the weights are part: at most 2 GiB.
        opset: 18 or newer.
        output_names: of a program's outputs, where they are others.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError: a module other than an :class:`ssd_ext.models.SSD`.
        ValueError: a model in training mode; an ``opset`` below 18; a program without priors.

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
    exported = program(model) if isinstance(model, nn.Module) else model
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
    clip: float,
    class_agnostic: bool,
    window: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`ssd_ext.ops.detect` without a shape that depends on data, but for ``nms_scores``.

    A score of -1 is none. Rows of the scores are classes and columns priors, so that the lowest index, which
    ONNX's TopK prefers among equals, is the lowest class, then the lowest prior.
    """
    if len(priors) == 0:
        raise ValueError("ONNX takes no detector without priors")
    dtype = logits.dtype
    boxes = decode(deltas.float(), priors.float(), (variances[0], variances[1]), clip)
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
        torch.where(found, index // num_priors + (0 if sigmoid else 1), -1),
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
