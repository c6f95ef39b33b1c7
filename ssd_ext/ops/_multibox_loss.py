"""The training loss of SSD: multibox_loss."""

from typing import Any

import torch
from torch import Tensor

from ssd_ext._arguments import explained
from ssd_ext.ops._library import call, differentiable, fake, refuse_gradient

NORMALIZE = ("batch", "image")


@explained
def multibox_loss(
    deltas: Tensor,
    logits: Tensor,
    target_deltas: Tensor,
    target_labels: Tensor,
    *,
    neg_to_pos_ratio: float = 3.0,
    min_negatives: int = 0,
    alpha: float = 1.0,
    beta: float = 1.0,
    normalize: str = "batch",
) -> tuple[Tensor, Tensor]:
    """The MultiBox loss: smooth L1 of the positives, cross-entropy of positives and hardest negatives.

    Per image, the negatives that count are those that :func:`hard_negatives` marks by their cross-entropy,
    ``k = min(max(floor(neg_to_pos_ratio * positives), min_negatives), negatives)`` of them. One pass over the logits;
    no softmax is kept, and the backward computes the selected rows alone.

    Args:
        deltas: ``[B, P, 4]`` predicted box offsets.
        logits: ``[B, P, C]`` class scores before the softmax; class 0 is background. Any stride is read in
            place, also ``[B, C, P]`` permuted; the gradient has the same layout.
        target_deltas: ``[B, P, 4]`` as :func:`assign_targets` gives them; a constant. Read where the label is
            positive.
        target_labels: ``[B, P]`` int64, below ``C``: positive (> 0), background (0) or ignored (< 0: no part of
            the loss).
        neg_to_pos_ratio: negatives for each positive; finite, not negative.
        min_negatives: negatives that count in every image as far as there are, even in one without positives,
            which then weighs no more than one with: see ``normalize``.
        alpha: weight of ``loc``; finite.
        beta: ``|delta - target|`` from where smooth L1 is a line: ``0.5 e^2 / beta`` below, ``|e| - 0.5 beta``
            above, so 0 makes it L1.
        normalize: with the positives ``N_b`` of image ``b``, ``"batch"`` divides the sums over all images by
            ``sum of N_b``, as the paper and torchvision do; ``"image"`` divides each image's by ``N_b`` and takes the
            mean over images, so that images with few objects count as much. Where that is 0, the negatives
            that count are divided by their number.

    The floating tensors may be float32, float64, float16 or bfloat16 independently, on one device; the halves
    compute in float32, under autocast too.

    Returns:
        ``(loc, conf)``: scalars to be added up, ``alpha`` being in ``loc`` already. float64 where ``deltas``
        (``logits`` for ``conf``) are, else float32. Without positives ``loc`` is 0, and ``conf`` the mean of
        ``min_negatives`` for each image: by default 0, with gradients of 0. Empty inputs give 0.

    Where losses round to the same number, negatives are told apart by ``sum(exp(x - x[0]))``, of which the
    loss is the logarithm; the lowest prior wins what is still a tie. A NaN loss ranks first. So a NaN or
    infinite logit (but ``-inf``, a class of probability 0) makes ``conf`` NaN, unless its prior is ignored or
    its image has no ``k``. Likewise NaN offsets of a positive show in ``loc``. A label that is no class is an
    error on the CPU; on a GPU, which is not waited for, it makes ``conf`` and its prior's gradient NaN.

    Differentiable in ``deltas`` and ``logits``, once, in reverse mode, also by ``torch.func`` as :func:`encode` is.

    Memory beside inputs and gradients: 4 bytes a prior, 8 with float64; on the CPU also 24 (32) bytes for each prior
    of one image, for each thread.

    Raises:
        ValueError: wrong shape, dtype or device; a ``neg_to_pos_ratio`` or ``beta`` that is negative or not finite, an
            ``alpha`` that is not finite, negative ``min_negatives``, an unknown ``normalize``; on the CPU a
            label that is not below ``C``.
        RuntimeError: a gradient for ``target_deltas``, or a second derivative, is asked for.

    Source: Liu et al., SSD (2016), eq. 1 to 3 and "Hard negative mining"; torchvision's ``SSD.compute_loss``,
    which counts positives twice where an image has fewer negatives than it asks for: not so here.
    """
    check_normalize(normalize)
    loc: Tensor
    conf: Tensor
    loc, conf, _, _ = call(
        torch.ops.ssd_ext.multibox_loss.default,
        deltas,
        logits,
        target_deltas,
        target_labels,
        neg_to_pos_ratio,
        min_negatives,
        alpha,
        beta,
        normalize == "image",
    )
    return loc, conf


def check_normalize(value: str) -> None:
    """Raise for an unknown way."""
    if value not in NORMALIZE:
        raise ValueError(f"ssd_ext::multibox_loss: normalize must be 'batch' or 'image', got {value!r}")


def _computed_in(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@fake("multibox_loss")
def _(
    deltas: Tensor,
    logits: Tensor,
    target_deltas: Tensor,
    target_labels: Tensor,
    neg_to_pos_ratio: float,
    min_negatives: int,
    alpha: float,
    beta: float,
    per_image: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ranks = torch.int64 if logits.dtype == torch.float64 else torch.int32
    return (
        deltas.new_empty((), dtype=_computed_in(deltas)),
        logits.new_empty((), dtype=_computed_in(logits)),
        logits.new_empty(logits.shape[:2], dtype=ranks),
        target_labels.new_empty(target_labels.shape[0]),
    )


@fake("multibox_loss_logits_gradient")
def _(grad_conf: Tensor, logits: Tensor, target_labels: Tensor, ranks: Tensor, divisors: Tensor) -> Tensor:
    return torch.empty_like(logits)


@fake("multibox_loss_deltas_gradient")
def _(
    grad_loc: Tensor,
    deltas: Tensor,
    target_deltas: Tensor,
    target_labels: Tensor,
    divisors: Tensor,
    alpha: float,
    beta: float,
) -> Tensor:
    return torch.empty_like(deltas)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    deltas, logits, target_deltas, target_labels, _, _, alpha, beta, _ = inputs
    _, _, ranks, divisors = output
    ctx.save_for_backward(deltas, logits, target_deltas, target_labels, ranks, divisors)
    ctx.smooth_l1 = alpha, beta
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loc: Tensor | None, grad_conf: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs_deltas, needs_logits, needs_targets, *_ = ctx.needs_input_grad
    if needs_targets:
        raise RuntimeError(
            "ssd_ext::multibox_loss has no gradient for target_deltas: they are constants (pass target_deltas.detach())"
        )
    deltas, logits, target_deltas, target_labels, ranks, divisors = ctx.saved_tensors
    for_deltas = for_logits = None
    if needs_deltas and grad_loc is not None:
        for_deltas = call(
            torch.ops.ssd_ext.multibox_loss_deltas_gradient.default,
            grad_loc,
            deltas,
            target_deltas,
            target_labels,
            divisors,
            *ctx.smooth_l1,
        )
    if needs_logits and grad_conf is not None:
        for_logits = call(
            torch.ops.ssd_ext.multibox_loss_logits_gradient.default, grad_conf, logits, target_labels, ranks, divisors
        )
    return for_deltas, for_logits, *[None] * 7


differentiable("multibox_loss", _backward, _keep)
for _op in ("multibox_loss_logits_gradient", "multibox_loss_deltas_gradient"):
    refuse_gradient(_op, "multibox_loss has no second derivative")
