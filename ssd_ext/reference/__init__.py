"""Every op of ``ssd_ext.ops`` in plain PyTorch: short, readable, right in float64. The oracle of the tests.

Same names and results; the same arguments, but for those that only check. Nothing here imports the extension.
"""

from ssd_ext.reference.boxes import box_iou, decode, encode
from ssd_ext.reference.detect import detect
from ssd_ext.reference.matching import assign_targets, match
from ssd_ext.reference.mining import hard_negatives
from ssd_ext.reference.multibox_loss import multibox_loss
from ssd_ext.reference.nms import batched_nms, batched_nms_padded, nms, nms_padded
from ssd_ext.reference.soft_nms import soft_nms, soft_nms_padded

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
]
