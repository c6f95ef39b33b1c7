"""Every op of ``ssd_ext.ops`` in plain PyTorch: short, readable, right in float64. The oracle of the tests.

Same names, arguments and results. Nothing here imports the extension.
"""

from ssd_ext.reference.boxes import area, box_iou, decode, encode
from ssd_ext.reference.soft_nms import soft_nms, soft_nms_padded

__all__ = ["area", "box_iou", "decode", "encode", "soft_nms", "soft_nms_padded"]
