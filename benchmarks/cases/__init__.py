"""Every op's description; tests and benchmarks iterate over ``OPS``."""

from benchmarks.cases import boxes, mining

OPS = [op for room in (boxes, mining) for op in room.OPS]
