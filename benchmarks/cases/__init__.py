"""Every op's description; tests and benchmarks iterate over ``OPS``."""

from benchmarks.cases import boxes, matching

OPS = [op for room in (boxes, matching) for op in room.OPS]
