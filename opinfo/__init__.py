"""Every op's description; tests and benchmarks iterate over ``OPS``."""

from opinfo import boxes, detect, matching, mining, multibox_loss, nms, soft_nms

OPS = [op for room in (boxes, detect, matching, mining, multibox_loss, nms, soft_nms) for op in room.OPS]
