"""multibox_loss."""

import math

import torch

from opinfo.inputs import share_of_positives
from opinfo.spec import Case, ErrorCase, OpInfo
from ssd_ext import ops, reference


def _images(batch, n, classes, g, positives=0.02, ignored=0.0, background=3.0):
    """Outputs of a half-trained SSD: background stands out by ``background``, the label of an object by 2."""
    draw = torch.rand(batch, n, generator=g)
    foreground = torch.randint(1, classes, (batch, n), generator=g) if classes > 1 else torch.zeros(batch, n).long()
    labels = torch.where(draw < positives, foreground, torch.where(draw < positives + ignored, -1, 0))
    logits = torch.randn(batch, n, classes, generator=g)
    logits[..., 0] += background
    logits.scatter_add_(2, labels.clamp(min=0)[..., None], torch.full((batch, n, 1), 2.0))
    targets = torch.where(labels[..., None] > 0, torch.randn(batch, n, 4, generator=g), 0)
    deltas = targets + torch.randn(batch, n, 4, generator=g) * 0.8
    return {"deltas": deltas, "logits": logits, "target_deltas": targets, "target_labels": labels}


def _random(name, batch, n, classes, positives=0.1, ignored=0.05, peers=True, **arguments):
    def make(g):
        return {**_images(batch, n, classes, g, positives, ignored), **arguments}

    # The peers know no ignored priors, and count positives twice where negatives run out.
    return Case(name, make, peers=peers and not ignored and positives < 0.2)


def _changed(name, change, smooth=False, peers=False, dtypes=None, **arguments):
    def make(g):
        inputs = _images(3, 90, 21, g, positives=0.1)
        change(**inputs)
        return {**inputs, **arguments}

    return Case(name, make, peers=peers, smooth=smooth, **({"dtypes": dtypes} if dtypes else {}))


def _nan_rows(logits, target_labels, **_):
    logits[0, 7] = math.nan
    target_labels[0, 7] = 0
    logits[1, 11] = math.nan
    target_labels[1, 11] = -1  # not seen
    logits[2, 13, 20] = -math.nan
    target_labels[2, 13] = 5


def _nan_unmined(logits, target_labels, **_):
    target_labels[0] = 0
    logits[0, 7] = math.nan


def _infinite(value, column, label):
    def change(logits, target_labels, **_):
        logits[1, 17, column] = value
        target_labels[1, 17] = label

    return change


def _only_background(g):
    inputs = _images(1, 20, 1, g)
    inputs["logits"][0, :3, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    return {**inputs, "min_negatives": 9}


def _masked_classes(logits, target_labels, **_):
    logits[:, :, 3:6] = -math.inf
    target_labels[(target_labels >= 3) & (target_labels < 6)] = 7


def _confident(logits, **_):
    logits *= 40


def _far(logits, target_labels, **_):
    logits[:, ::3, 0] = 5000.0
    logits[:, 1::7] += 6000.0
    logits[:, 2::5] -= 6000.0
    target_labels[:, ::3] = 0


def _spread(logits, **_):
    logits *= 300


def _bounds_of_exp(logits, target_labels, **_):
    """Rows with an exponent just within or beyond what exp_near takes."""
    exponents = torch.tensor([85.5, -85.5, 86, -86, 86.5, -86.5, 104.5, -104.5, 0])
    logits[:, :, 0] = 0
    logits[:, :, 5] = exponents.repeat(10)
    target_labels[target_labels == 5] = 6


def _ties(logits, **_):
    logits.copy_((logits * 2).round() / 2)


def _broken_deltas(deltas, target_deltas, target_labels, **_):
    target_labels[:, ::9] = 1
    deltas[0, 0], deltas[0, 9] = 500.0, -500.0
    deltas[1, 1] = math.nan
    target_labels[1, 1] = 0  # not seen
    target_deltas[2, 1] = math.inf
    target_labels[2, 1] = -1


def _nan_delta(deltas, target_labels, **_):
    target_labels[0, 3] = 2
    deltas[0, 3, 1] = math.nan


def _class_major(g):
    inputs = _images(3, 45, 21, g, positives=0.1)
    inputs["logits"] = inputs["logits"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["deltas"] = inputs["deltas"].transpose(0, 1).contiguous().transpose(0, 1)
    return inputs


def _sliced(g):
    inputs = _images(6, 64, 30, g, positives=0.1)
    inputs["target_labels"].clamp_(max=13)
    inputs = {k: v[::2, 1::3] for k, v in inputs.items()}
    return {**inputs, "logits": inputs["logits"][..., 2:16]}


def _expanded(g):
    one = _images(1, 40, 9, g, positives=0.1)
    return {k: v.expand(4, *v.shape[1:]) for k, v in one.items()}


def _detector(name, batch, n=8732, classes=81, backward=False, quick=False, **kwargs):
    def make(g):
        return _images(batch, n, classes, g, positives=share_of_positives(batch, g), **kwargs)

    return Case(name, make, benchmark=True, quick=quick, backward=backward)


def _call(**changed):
    def make():
        inputs = {
            "deltas": torch.rand(2, 5, 4),
            "logits": torch.rand(2, 5, 3),
            "target_deltas": torch.rand(2, 5, 4),
            "target_labels": torch.zeros(2, 5, dtype=torch.int64),
        }
        return {**inputs, **changed}

    return make


def _label(value):
    labels = torch.zeros(2, 5, dtype=torch.int64)
    labels[1, 3] = value
    return labels


MULTIBOX_LOSS = OpInfo(
    name="multibox_loss",
    op=ops.multibox_loss,
    reference=reference.multibox_loss,
    schema="multibox_loss",
    cases=[
        _random("B=3 P=90 C=21", 3, 90, 21),
        _random("C=3", 1, 33, 3),
        _random("none ignored", 3, 90, 21, ignored=0.0),
        _random("P=1", 7, 1, 4, positives=0.5),
        _random("P=17 C=2", 3, 17, 2),
        _random("C=1", 2, 20, 1),
        _random("C=1000", 2, 40, 1000, ignored=0.0),
        *(_random(f"C={c}", 1, 33, c) for c in (16, 17, 18, 33, 49, 65, 81, 91, 113, 129, 130)),
        _random("P=2500", 1, 2500, 3),
        _random("more priors than a GPU's block caches", 1, 10300, 2),
        Case("P=0", lambda g: _images(3, 0, 5, g), peers=False, smooth=False),
        Case("B=0", lambda g: _images(0, 7, 5, g), peers=False, smooth=False),
        _random("no positive", 3, 50, 7, positives=0.0),
        _random("no positive, some wanted", 3, 50, 7, positives=0.0, min_negatives=4),
        _random("all positive", 3, 50, 7, positives=1.0, min_negatives=4),
        _random("all ignored", 3, 50, 7, positives=0.0, ignored=1.0, min_negatives=4),
        _random("an image each", 5, 60, 7, normalize="image"),
        _random("an image each, some without positives", 9, 20, 7, positives=0.03, normalize="image"),
        _random("ratio 0", 3, 50, 7, neg_to_pos_ratio=0.0),
        _random("ratio beyond integers", 3, 50, 7, neg_to_pos_ratio=1e300),
        _random("alpha and beta", 3, 50, 7, alpha=0.3, beta=0.2),
        Case("L1", lambda g: {**_images(3, 50, 7, g, 0.1), "beta": 0.0}, peers=False),
        _changed("all logits equal", lambda logits, **_: logits.fill_(0.25)),
        _changed("ties at the cut", _ties),
        _changed("ties at the cut, half wanted", _ties, min_negatives=40),
        _changed("confident logits", _confident),
        _changed("logits of 300", _spread),
        _changed("exponents at the bounds", _bounds_of_exp, min_negatives=90),
        _changed("backgrounds of 5000", _far, min_negatives=20),
        _changed("backgrounds of 5000, few wanted", _far),
        _changed("classes at -inf", _masked_classes),
        _changed("NaN rows", _nan_rows),
        _changed("a NaN row in an image that mines nothing", _nan_unmined),
        Case("C=1, not finite", _only_background, peers=False, smooth=False),
        _changed("inf foreground", _infinite(math.inf, 4, 0)),
        _changed("inf background", _infinite(math.inf, 0, 0), min_negatives=90),
        _changed("inf label", _infinite(math.inf, 4, 4)),
        _changed("-inf label", _infinite(-math.inf, 4, 4)),
        _changed("-inf background", _infinite(-math.inf, 0, 0)),
        _changed("deltas of 500", _broken_deltas),
        _changed("a NaN delta", _nan_delta),
        Case("class-major", _class_major),
        Case("sliced", _sliced, peers=False),
        Case("expanded", _expanded),
        _detector("SSD300 B=1", 1),
        _detector("SSD300 B=8", 8, quick=True),
        _detector("SSD300 B=32", 32),
        _detector("SSD300 B=8, backward too", 8, backward=True, quick=True),
        _detector("SSD300 B=32, backward too", 32, backward=True),
        _detector("SSD300 B=32 C=21", 32, classes=21),
        _detector("SSD300 B=32 C=21, backward too", 32, classes=21, backward=True),
        _detector("SSD512 B=8", 8, n=24564),
        _detector("SSD300 B=8, untrained", 8, background=0.0),
    ],
    errors=[
        ErrorCase("one image", _call(logits=torch.rand(5, 3)), r"logits must be \[B, P, C\], got \[5, 3\]"),
        ErrorCase("no class", _call(logits=torch.rand(2, 5, 0)), r"at least the background class, got \[2, 5, 0\]"),
        ErrorCase(
            "labels of another P",
            _call(target_labels=_label(0)[:, :4]),
            r"target_labels must be .* \[2, 5\], got \[2, 4\]",
        ),
        ErrorCase("labels int32", _call(target_labels=_label(0).int()), r"target_labels must be int64, got int32"),
        ErrorCase("not boxes", _call(deltas=torch.rand(2, 5, 3)), r"deltas must be .* \[2, 5, 4\], got \[2, 5, 3\]"),
        ErrorCase("targets of another P", _call(target_deltas=torch.rand(2, 6, 4)), r"target_deltas.*got \[2, 6, 4\]"),
        ErrorCase("integer logits", _call(logits=torch.zeros(2, 5, 3).long()), r"logits must be float32.*got int64"),
        ErrorCase("integer deltas", _call(deltas=torch.zeros(2, 5, 4).long()), r"deltas must be float32.*got int64"),
        ErrorCase("label C", _call(target_labels=_label(3)), r"below C = 3, got target_labels\[1, 3\] = 3"),
        ErrorCase(
            "a huge label",
            _call(target_labels=_label(2**40)),
            r"below C = 3, got target_labels\[1, 3\] = 1099511627776",
        ),
        ErrorCase(
            "negative ratio", _call(neg_to_pos_ratio=-0.5), r"neg_to_pos_ratio must be a finite number >= 0, got -0.5"
        ),
        ErrorCase(
            "NaN ratio", _call(neg_to_pos_ratio=math.nan), r"neg_to_pos_ratio must be a finite number >= 0, got nan"
        ),
        ErrorCase("negative count", _call(min_negatives=-1), r"min_negatives must be >= 0, got -1"),
        ErrorCase("infinite alpha", _call(alpha=math.inf), r"alpha must be finite, got inf"),
        ErrorCase("negative beta", _call(beta=-1.0), r"beta must be a finite number >= 0, got -1"),
        ErrorCase("unknown normalize", _call(normalize="sum"), r"normalize must be 'batch' or 'image', got 'sum'"),
    ],
    differentiable=("deltas", "logits"),
    twice_differentiable=False,
    scaling=lambda batch: _detector("", batch).make(torch.Generator().manual_seed(batch)),
)

OPS = [MULTIBOX_LOSS]
