"""encode, decode, box_iou."""

import math

import torch

from opinfo.inputs import extreme_boxes, random_boxes, ssd300_priors
from opinfo.spec import HALVES, Case, ErrorCase, OpInfo
from ssd_ext import ops, reference


def _priors(n, g):
    return torch.cat([torch.rand(n, 2, generator=g), 0.05 + 0.9 * torch.rand(n, 2, generator=g)], 1)


def _deltas(batch, n, g):
    return torch.randn(*batch, n, 4, generator=g)


def _coding_cases(key, make_rows):
    def case(name, batch, n, **kwargs):
        return Case(name, lambda g: {key: make_rows(batch, n, g), "priors": _priors(n, g)}, **kwargs)

    def on_priors(name, batch, **kwargs):
        return Case(
            name, lambda g: {key: make_rows((batch,), 8732, g), "priors": ssd300_priors()}, benchmark=True, **kwargs
        )

    def strided(g):
        rows = make_rows((3,), 14, g)
        wide = torch.cat([rows, rows], -1)[..., ::2, :4]
        return {key: wide.transpose(0, 1).contiguous().transpose(0, 1), "priors": _priors(7, g)}

    def expanded(g):
        return {key: make_rows((), 5, g).expand(4, 5, 4), "priors": _priors(1, g).expand(5, 4)}

    mixes = [{key: dtype} for dtype in (*HALVES, torch.float64)]
    mixes += [{key: dtype, "priors": torch.float64} for dtype in (torch.float32, *HALVES)]
    mixes += [{"priors": torch.bfloat16}, {key: torch.float16, "priors": torch.bfloat16}]

    return [
        case("no batch dimension", (), 7),
        case("two batch dimensions", (2, 3), 33),
        case("B=3 P=5", (3,), 5),
        case("P=1", (3,), 1),
        case("P=0", (3,), 0, peers=False, smooth=False),
        case("B=0", (0,), 7, peers=False, smooth=False),
        Case("strided", strided),
        Case("expanded", expanded),
        case("dtypes mixed", (2,), 33, dtypes=tuple(mixes), smooth=False),
        on_priors("SSD300 B=1", 1),
        on_priors("SSD300 B=8", 8, quick=True),
        on_priors("SSD300 B=32", 32),
    ]


def _boxes(batch, n, g):
    return random_boxes(math.prod(batch) * n, g).reshape(*batch, n, 4)


def _coding_errors(key):
    rows, priors = torch.rand(2, 5, 4), torch.rand(5, 4)
    return [
        ErrorCase("not boxes", lambda: {key: rows[..., :3], "priors": priors}, rf"{key} must be .* got \[2, 5, 3\]"),
        ErrorCase("no rows", lambda: {key: rows[0, 0], "priors": priors}, rf"{key} must be .* got \[4\]"),
        ErrorCase("P differs", lambda: {key: rows[:, :4], "priors": priors}, r"\[\.\.\., 5, 4\].*got \[2, 4, 4\]"),
        ErrorCase("priors", lambda: {key: rows, "priors": priors[0]}, r"priors must be \[P, 4\], got \[4\]"),
        ErrorCase("integers", lambda: {key: rows.long(), "priors": priors}, rf"{key} must be .*bfloat16, got int64"),
        ErrorCase("priors of integers", lambda: {key: rows, "priors": priors.int()}, r"priors must be .* got int32"),
        ErrorCase("one variance", lambda: {key: rows, "priors": priors, "variances": (0.1,)}, r"got 1 values"),
        ErrorCase("zero variance", lambda: {key: rows, "priors": priors, "variances": (0.1, 0.0)}, r"got \(0.1, 0\)"),
    ]


def _hostile_deltas(g):
    deltas = _deltas((4,), 6, g)
    deltas[0], deltas[1, :, 2:], deltas[2, 0], deltas[3, 1] = math.nan, 500, math.inf, -math.inf
    deltas[3, 2, 2] = math.nan  # the width alone
    return {"deltas": deltas, "priors": _priors(6, g)}


ENCODE = OpInfo(
    name="encode",
    op=ops.encode,
    reference=reference.encode,
    schema="encode",
    cases=_coding_cases("boxes", _boxes),
    errors=_coding_errors("boxes"),
    # (center - prior) / (size * variance) in bfloat16 loses what the inputs' rounding loses: compare in its own terms.
    tolerance={torch.float32: 2e-5, torch.float64: 1e-11, torch.float16: 2e-3, torch.bfloat16: 2e-2},
    differentiable=("boxes",),
    scaling=lambda batch: {"boxes": _boxes((batch,), 8732, torch.Generator()), "priors": ssd300_priors()},
)

DECODE = OpInfo(
    name="decode",
    op=ops.decode,
    reference=reference.decode,
    schema="decode",
    cases=[*_coding_cases("deltas", _deltas), Case("hostile deltas", _hostile_deltas, peers=False, smooth=False)],
    errors=[
        *_coding_errors("deltas"),
        ErrorCase(
            "NaN clip",
            lambda: {"deltas": torch.rand(5, 4), "priors": torch.rand(5, 4), "bbox_xform_clip": math.nan},
            r"bbox_xform_clip must be a number, got nan",
        ),
    ],
    differentiable=("deltas",),
    scaling=lambda batch: {"deltas": _deltas((batch,), 8732, torch.Generator()), "priors": ssd300_priors()},
)


def _pairs(n, m):
    return lambda g: {"boxes1": random_boxes(n, g), "boxes2": random_boxes(m, g)}


def _hostile_boxes(g):
    boxes = random_boxes(12, g)
    boxes[0, 0], boxes[1, 2], boxes[2, 0] = math.nan, math.inf, -math.inf
    boxes[3] = boxes[3, [2, 1, 0, 3]]  # inverted in x
    boxes[4] = boxes[4, [2, 3, 0, 1]]  # inverted in both
    boxes[5, 2:] = boxes[5, :2]  # a point
    boxes[6] = boxes[5]
    boxes[7] = torch.tensor([-3e18, -3e18, 3e18, 3e18])
    boxes[8] = -boxes[8, [2, 3, 0, 1]]  # negative coordinates
    return {"boxes1": boxes, "boxes2": boxes.flip(0)}


def _extreme(g):
    return {"boxes1": extreme_boxes(), "boxes2": extreme_boxes().flip(0)}


def _iou_of(a, b):
    return lambda: {"boxes1": a, "boxes2": b}


BOX_IOU = OpInfo(
    name="box_iou",
    op=ops.box_iou,
    reference=reference.box_iou,
    schema="box_iou",
    cases=[
        Case("N=5 M=7", _pairs(5, 7)),
        Case("N=33 M=257", _pairs(33, 257)),
        Case("N=1 M=1", _pairs(1, 1)),
        Case("N=0 M=5", _pairs(0, 5)),
        Case("N=5 M=0", _pairs(5, 0)),
        Case("hostile", _hostile_boxes, dtypes=(torch.float32,), peers=False),
        Case("extreme", _extreme, dtypes=(torch.float32,), oracle=torch.float32, peers=False),
        Case("N=100 M=8732", _pairs(100, 8732), benchmark=True, quick=True),
        Case("N=1000 M=1000", _pairs(1000, 1000), benchmark=True),
    ],
    errors=[
        ErrorCase("not boxes", _iou_of(torch.rand(3, 5), torch.rand(3, 4)), r"\[N, 4\], got \[3, 5\]"),
        ErrorCase("one box", _iou_of(torch.rand(3, 4), torch.rand(4)), r"\[M, 4\], got \[4\]"),
        ErrorCase("dtypes mixed", _iou_of(torch.rand(3, 4), torch.rand(3, 4).half()), r"got float16"),
        ErrorCase("floats and integers", _iou_of(torch.rand(3, 4), torch.ones(3, 4).int()), r"got int32"),
        ErrorCase("bools", _iou_of(torch.ones(3, 4).bool(), torch.ones(3, 4).bool()), r"got bool"),
    ],
    full_size=_pairs(8732, 2),
)

OPS = [ENCODE, DECODE, BOX_IOU]
