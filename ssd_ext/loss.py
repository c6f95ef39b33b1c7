"""The training loss from raw ground truth: MultiBoxLoss."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from ssd_ext import ops
from ssd_ext._arguments import described, is_plain
from ssd_ext._buffers import FloatBuffers
from ssd_ext.ground_truth import GroundTruth, Targets, as_ground_truth
from ssd_ext.ops._multibox_loss import check_normalize


class MultiBoxLoss(FloatBuffers):
    """:func:`ssd_ext.ops.assign_targets`, then :func:`ssd_ext.ops.multibox_loss`.

    Args:
        priors: ``[P, 4]`` centre and size ``(cx, cy, w, h)``, kept as a buffer that moves with the module, is float32
            after ``half()`` and ``bfloat16()``, and is not in its state; None to give them with each call.
        iou_threshold: of a match; see :func:`ssd_ext.ops.match`.
        low_threshold: if given, priors whose best IoU is from here up to ``iou_threshold`` are ignored.
        force: ``"bipartite"`` (the paper's), ``"last"`` (torchvision's) or ``"none"``.
        min_force_iou: ``force`` joins an object and a prior only above this IoU; None: at any.
        variances: of centre and size, those of the decoder.
        neg_to_pos_ratio: negatives for each positive.
        min_negatives: negatives that count in every image, even in one without objects; see
            :func:`ssd_ext.ops.multibox_loss`.
        alpha: weight of the box loss.
        beta: where smooth L1 passes from square to line.
        normalize: ``"batch"`` or ``"image"``; see :func:`ssd_ext.ops.multibox_loss`.
        validate: raise for a ground truth that cannot be matched or whose label is neither in ``1..C - 1`` nor -1. This
            synchronises with a GPU.
        across_ranks: with ``"batch"``, count the positives of all ranks of ``torch.distributed``, which must all
            call: gradients averaged over ranks are then those of one process with the whole batch.

    Raises:
        ValueError: as the two ops do; no priors, or priors given twice.
        RuntimeError: a second derivative is asked for.

    Source: Liu et al., SSD (2016), section 2.2 and eq. 1 to 3.
    """

    priors: Tensor | None

    def __init__(
        self,
        priors: Tensor | None = None,
        *,
        iou_threshold: float = 0.5,
        low_threshold: float | None = None,
        force: str = "bipartite",
        min_force_iou: float | None = 0.0,
        variances: tuple[float, float] = (0.1, 0.2),
        neg_to_pos_ratio: float = 3.0,
        min_negatives: int = 0,
        alpha: float = 1.0,
        beta: float = 1.0,
        normalize: str = "batch",
        validate: bool = False,
        across_ranks: bool = False,
    ):
        """See the class for the arguments."""
        super().__init__()
        check_normalize(normalize)
        self._check_priors(priors)
        self.register_buffer("priors", priors, persistent=False)
        self.validate = validate
        self.across_ranks = across_ranks
        self.matching: dict[str, Any] = {
            "iou_threshold": iou_threshold,
            "low_threshold": low_threshold,
            "force": force,
            "min_force_iou": min_force_iou,
            "variances": variances,
        }
        self.loss: dict[str, Any] = {
            "neg_to_pos_ratio": neg_to_pos_ratio,
            "min_negatives": min_negatives,
            "alpha": alpha,
            "beta": beta,
            "normalize": normalize,
        }

    def forward(
        self,
        deltas: Tensor,
        logits: Tensor,
        ground_truth: GroundTruth | Targets,
        priors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(loc, conf)``: two scalars, to be added up.

        Args:
            deltas: ``[B, P, 4]`` predicted box offsets.
            logits: ``[B, P, C]`` class scores before the softmax; class 0 is background.
            ground_truth: the objects of the images, boxes ``(x1, y1, x2, y2)`` in the units of the priors,
                labels ``1..C - 1``, or -1 for a region to ignore: a :class:`ssd_ext.GroundTruth`, or a list with a dict
                ``{"boxes", "labels"}`` for each image. An image may have none.
            priors: ``[P, 4]``, where the module has none.
        """
        given = [boxes for boxes in (priors, self.priors) if boxes is not None]
        if len(given) != 1:
            where = "to both" if given else "to neither"
            raise ValueError(f"priors must be given to MultiBoxLoss or to its call, got them {where}")
        self._check_priors(given[0])
        target_deltas, target_labels = ops.assign_targets(
            self._as_precise(as_ground_truth(ground_truth, given[0]), given[0]),
            given[0],
            validate=self.validate,
            num_classes=logits.shape[-1] if self.validate else None,
            **self.matching,
        )
        losses = ops.multibox_loss(deltas, logits, target_deltas, target_labels, **self.loss)
        if not self.across_ranks or self.loss["normalize"] != "batch":
            return losses
        negatives = (target_labels == 0).sum(1).clamp(max=self.loss["min_negatives"])  # of images without objects
        here = torch.stack([(target_labels > 0).sum(), negatives.sum()])
        everywhere = here.clone()
        distributed.all_reduce(everywhere)
        own, of_all = (torch.where(count[0] > 0, count[0], count[1]).clamp(min=1) for count in (here, everywhere))
        share = own * distributed.get_world_size() / of_all
        return losses[0] * share, losses[1] * share

    @staticmethod
    def _as_precise(ground_truth: GroundTruth, priors: Tensor) -> GroundTruth:
        """Boxes of the dtype of the priors, if both are floating-point: the others are for the op to refuse."""
        both = ground_truth.boxes.is_floating_point() and priors.is_floating_point()
        return ground_truth.to(priors.dtype) if both else ground_truth

    @staticmethod
    def _check_priors(priors: Tensor | None) -> None:
        if priors is not None and not is_plain(priors):
            raise ValueError(f"MultiBoxLoss: priors must be a plain tensor, got {described(priors)}")

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's is of any arguments and any result

    def extra_repr(self) -> str:
        """All settings, for ``print``."""
        return ", ".join(f"{name}={value!r}" for name, value in {**self.matching, **self.loss}.items())
