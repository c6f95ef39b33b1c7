"""The ops. Boxes are corners ``(x1, y1, x2, y2)``, priors ``(cx, cy, w, h)``, in the same units.

Common rules: float32, float64, float16 and bfloat16 on CPU and CUDA; index outputs are int64;
inputs of any stride are accepted and never changed; empty inputs are accepted; the lowest index
wins a tie; the same input gives the same bits on every run, thread count and SIMD level. Under
autocast floating inputs are cast to float32, and floating outputs are float32.
"""

from ssd_ext.ops._boxes import box_iou, decode, encode
from ssd_ext.ops._detect import detect, unpad
from ssd_ext.ops._matching import assign_targets, match
from ssd_ext.ops._mining import hard_negatives
from ssd_ext.ops._multibox_loss import multibox_loss
from ssd_ext.ops._nms import batched_nms, batched_nms_padded, nms, nms_padded
from ssd_ext.ops._soft_nms import soft_nms, soft_nms_padded

__all__ = [
    "assign_targets",
    "batched_nms",
    "batched_nms_padded",
    "box_iou",
    "decode",
    "detect",
    "encode",
    "hard_negatives",
    "match",
    "multibox_loss",
    "nms",
    "nms_padded",
    "soft_nms",
    "soft_nms_padded",
    "unpad",
]
