"""Every op's description; tests and benchmarks iterate over ``OPS``."""

from benchmarks.cases import boxes

OPS = [op for room in (boxes,) for op in room.OPS]
