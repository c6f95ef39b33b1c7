"""The ops. Boxes are corners ``(x1, y1, x2, y2)``, priors ``(cx, cy, w, h)``, in the same units.

Common rules: float32, float64, float16 and bfloat16 on CPU and CUDA; index outputs are int64;
inputs of any stride are accepted and never changed; empty inputs are accepted; the lowest index
wins a tie; the same input gives the same bits on every run, thread count and SIMD level.
"""

from ssd_ext.ops.boxes import box_iou, decode, encode
from ssd_ext.ops.mining import hard_negatives

__all__ = ["box_iou", "decode", "encode", "hard_negatives"]
