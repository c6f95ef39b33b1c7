"""Every op of ``ssd_ext.ops`` in plain PyTorch: short, readable, right in float64. The oracle of the tests.

Same names, arguments and results. Nothing here imports the extension.
"""

from ssd_ext.reference.boxes import area, box_iou, decode, encode
from ssd_ext.reference.mining import hard_negatives

__all__ = ["area", "box_iou", "decode", "encode", "hard_negatives"]
