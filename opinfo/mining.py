"""hard_negatives."""

import math

import torch

from opinfo.inputs import share_of_positives
from opinfo.spec import Case, ErrorCase, OpInfo
from ssd_ext import ops, reference


def _labels(batch, n, g, positives=0.02, ignored=0.0):
    draw = torch.rand(batch, n, generator=g)
    foreground = torch.randint(1, 81, (batch, n), generator=g)
    return torch.where(draw < positives, foreground, torch.where(draw < positives + ignored, -1, 0))


def _detector_loss(labels, g):
    """Cross-entropy of a half-trained SSD: most background is easy, objects are not; no two losses equal."""
    margin = torch.randn(labels.shape, generator=g, dtype=torch.float64) * 1.5
    loss = torch.nn.functional.softplus(margin + torch.where(labels > 0, 1.0, -3.0)).float()
    taken = loss.flatten().sort()
    step = torch.arange(taken.values.numel(), dtype=torch.int32)
    distinct = ((taken.values.view(torch.int32) - step).cummax(0).values + step).view(torch.float32)
    return torch.empty_like(distinct).scatter_(0, taken.indices, distinct).view(loss.shape)


def _images(batch, n, g, **kwargs):
    labels = _labels(batch, n, g, **kwargs)
    return {"loss": _detector_loss(labels, g), "target_labels": labels}


def _random(name, batch, n, positives=0.1, ignored=0.05, benchmark=False, quick=False, **arguments):
    def make(g):
        return {**_images(batch, n, g, positives=positives, ignored=ignored), **arguments}

    return Case(name, make, benchmark=benchmark, quick=quick)


def _ssd300(batch):
    return lambda g: _images(batch, 8732, g, positives=share_of_positives(batch, g))


def _with_loss(name, change, **arguments):
    """A case whose loss is changed, so that ties or values of no order decide."""

    def make(g):
        inputs = _images(3, 90, g, positives=0.1, ignored=0.05)
        change(inputs["loss"])
        return {**inputs, **arguments}

    return Case(name, make, peers=False)


def _rounded(loss):
    loss.copy_((loss * 8).round() / 8)


def _not_finite(loss):
    loss[:, ::7], loss[:, 1::11], loss[:, 2::13] = math.nan, math.inf, -math.inf
    loss[0, 40:60] = -math.nan


def _zeros_of_both_signs(loss):
    loss[:] = -1
    loss[:, ::2], loss[:, 1::4] = 0.0, -0.0


def _strided(g):
    inputs = _images(5, 64, g, positives=0.1)
    return {k: v.T.contiguous().T[::2, 1::3] for k, v in inputs.items()}


def _expanded(g):
    one = _images(1, 37, g, positives=0.1)
    return {"loss": one["loss"].expand(4, 37), "target_labels": torch.tensor([0, 1, 0, 2]).view(4, 1).expand(4, 37)}


def _call(loss=None, labels=None, **arguments):
    loss = torch.rand(2, 5) if loss is None else loss
    labels = torch.zeros(2, 5, dtype=torch.int64) if labels is None else labels
    return lambda: {"loss": loss, "target_labels": labels, **arguments}


HARD_NEGATIVES = OpInfo(
    name="hard_negatives",
    op=ops.hard_negatives,
    reference=reference.hard_negatives,
    schema="hard_negatives",
    cases=[
        _random("B=3 P=90", 3, 90),
        _random("P=33", 2, 33),
        _random("P=1", 7, 1, positives=0.5),
        _random("P=16", 3, 16),
        _random("P=1000", 2, 1000, positives=0.02),
        _random("larger than a block's shared memory", 1, 20000),
        Case("P=0", lambda g: _images(3, 0, g), peers=False),
        Case("B=0", lambda g: _images(0, 7, g), peers=False),
        _random("no positive", 3, 50, positives=0.0),
        _random("no positive, some wanted", 3, 50, positives=0.0, min_negatives=4),
        _random("all positive", 3, 50, positives=1.0, min_negatives=4),
        _random("all ignored", 3, 50, positives=0.0, ignored=1.0, min_negatives=4),
        _random("half ignored", 3, 50, ignored=0.5),
        _random("ratio 0", 3, 50, neg_to_pos_ratio=0.0),
        _random("ratio 0.5", 3, 50, neg_to_pos_ratio=0.5),
        _random("ratio beyond integers", 3, 50, neg_to_pos_ratio=1e300),
        _random("more wanted than there are", 3, 50, min_negatives=2**62),
        _random("all but one", 3, 50, positives=0.0, ignored=0.0, min_negatives=49),
        _random("half wanted", 2, 3000, min_negatives=1500),
        _with_loss("all losses equal", lambda loss: loss.fill_(0.25)),
        _with_loss("ties at the cut", _rounded),
        _with_loss("ties at the cut, half wanted", _rounded, min_negatives=40),
        _with_loss("NaN and infinite losses", _not_finite),
        _with_loss("NaN and infinite losses, half wanted", _not_finite, min_negatives=40),
        _with_loss("all NaN", lambda loss: loss.fill_(math.nan)),
        _with_loss("all -inf", lambda loss: loss.fill_(-math.inf)),
        _with_loss("-0 and 0", _zeros_of_both_signs, min_negatives=30),
        Case("strided", _strided),
        Case("expanded", _expanded),
        Case("SSD300 B=1", _ssd300(1), benchmark=True),
        Case("SSD300 B=8", _ssd300(8), benchmark=True, quick=True),
        Case("SSD300 B=32", _ssd300(32), benchmark=True),
    ],
    errors=[
        ErrorCase("one image", _call(torch.rand(5)), r"loss must be \[B, P\], got \[5\]"),
        ErrorCase("a class too many", _call(torch.rand(2, 5, 3)), r"loss must be \[B, P\], got \[2, 5, 3\]"),
        ErrorCase(
            "P differs", _call(torch.rand(2, 6)), r"target_labels must be of the shape of loss, \[2, 6\], got \[2, 5\]"
        ),
        ErrorCase("labels int32", _call(labels=torch.zeros(2, 5).int()), r"target_labels must be int64, got int32"),
        ErrorCase("integer loss", _call(torch.zeros(2, 5).long()), r"loss must be float32.*got int64"),
        ErrorCase(
            "negative ratio", _call(neg_to_pos_ratio=-0.5), r"neg_to_pos_ratio must be a finite number >= 0, got -0.5"
        ),
        ErrorCase(
            "NaN ratio", _call(neg_to_pos_ratio=math.nan), r"neg_to_pos_ratio must be a finite number >= 0, got nan"
        ),
        ErrorCase(
            "infinite ratio",
            _call(neg_to_pos_ratio=math.inf),
            r"neg_to_pos_ratio must be a finite number >= 0, got inf",
        ),
        ErrorCase("negative count", _call(min_negatives=-1), r"min_negatives must be >= 0, got -1"),
    ],
    scaling=lambda batch: _ssd300(batch)(torch.Generator().manual_seed(batch)),
)

OPS = [HARD_NEGATIVES]
