"""How results of nms, batched_nms and their padded forms are compared."""

import torch

from ssd_ext import reference


def agrees(inputs, result, expected):
    """Equal to the float64 reference, or to the reference in the dtype the op computes in.

    Whether a box is suppressed can hang on the rounding of one IoU next to the threshold, and all that
    follows on that box. So the reference decides in the op's own arithmetic where the two differ.
    """
    if result.dtype != torch.int64:
        return f"got {result.dtype}, expected int64"
    result, expected = result.cpu(), expected.cpu()
    if torch.equal(result, expected):
        return None
    same = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    if same["boxes"].dtype != torch.float64:
        same = {k: v.float() if k in ("boxes", "scores") else v for k, v in same.items()}
        expected = (reference.batched_nms if "idxs" in same else reference.nms)(**same)
    if torch.equal(result, expected):
        return None
    return f"kept {result.tolist()[:10]}... ({len(result)}), expected {expected.tolist()[:10]}... ({len(expected)})"


def padded_agrees(inputs, result, expected):
    (keep, count), (want, want_count) = result, expected
    if len(keep) != len(inputs["boxes"]) or count.shape != () or count.dtype != torch.int64:
        return f"keep {list(keep.shape)}, count {list(count.shape)} {count.dtype}"
    if bool((keep[int(count) :] != -1).any()):
        return "padding is not -1"
    return agrees(inputs, keep[: int(count)], want[: int(want_count)])
