"""Hard-negative mining: hard_negatives."""

import torch
from torch import Tensor

from ssd_ext._arguments import explained
from ssd_ext.ops._library import autocast_to_float32, fake, no_gradient


@explained
def hard_negatives(
    loss: Tensor, target_labels: Tensor, *, neg_to_pos_ratio: float = 3.0, min_negatives: int = 0
) -> Tensor:
    """Mark the negatives of largest loss in each image, in proportion to its positives.

    Per image, ``k = min(max(floor(neg_to_pos_ratio * positives), min_negatives), negatives)`` negatives are marked.

    Args:
        loss: ``[B, P]`` loss of each prior, usually the cross-entropy. float32, float64, float16 or
            bfloat16. A NaN counts as the largest, so that a broken row shows in the loss.
        target_labels: ``[B, P]`` int64, same device: positive (> 0), negative (0, background) or ignored
            (< 0, neither counted nor marked).
        neg_to_pos_ratio: negatives for each positive; finite, not negative.
        min_negatives: marked in every image as far as there are, even in one without positives.

    Returns:
        ``[B, P]`` bool, true for the marked negatives only: the priors that train the classifier are
        ``mask | (target_labels > 0)``. Of equal losses (all NaNs, or -0 and 0) the lowest prior is marked.

    Not differentiable: the mask carries no gradient, and ``loss`` may require one.

    Raises:
        ValueError: wrong shape, dtype or device, a ratio that is negative or not finite, negative
            ``min_negatives``.

    Source: Liu et al., SSD (2016), section 2.2, hard negative mining; torchvision's
    ``SSD.compute_loss``, which marks a positive again as a negative when negatives run out.
    """
    mask: Tensor = torch.ops.ssd_ext.hard_negatives.default(loss, target_labels, neg_to_pos_ratio, min_negatives)
    return mask


@fake("hard_negatives")
def _(loss: Tensor, target_labels: Tensor, neg_to_pos_ratio: float, min_negatives: int) -> Tensor:
    return torch.empty(loss.shape, dtype=torch.bool, device=loss.device)


no_gradient("hard_negatives")
autocast_to_float32("hard_negatives")
