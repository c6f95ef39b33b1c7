"""Every op's description; tests and benchmarks iterate over ``OPS``."""

from benchmarks.cases import boxes, soft_nms

OPS = [op for room in (boxes, soft_nms) for op in room.OPS]
