"""detect beyond what the generic suite asks of every op, and unpad."""

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import SIMD_LEVELS, at_and_beside
from hypothesis import given, settings
from hypothesis import strategies as st

from opinfo.spec import FLOATS
from ssd_ext import _C, ops, reference

PRIOR = [0.5, 0.5, 0.2, 0.2]


def image(rows, boxes=None, device="cpu", dtype=torch.float32):
    """One image: a row of logits for each prior; boxes as priors with deltas of 0, far apart unless given."""
    n = len(rows)
    boxes = [[10.0 * i, 0.0, 1.0, 1.0] for i in range(n)] if boxes is None else boxes
    return {
        "deltas": torch.zeros(1, n, 4, device=device, dtype=dtype),
        "logits": torch.tensor([rows], device=device, dtype=dtype),
        "priors": torch.tensor(boxes, device=device, dtype=dtype),
    }


def found(inputs, **arguments):
    """(label, prior) of the detections of priors that are far apart."""
    boxes, _, labels, counts = ops.detect(**inputs, **arguments)
    n = int(counts[0])
    return list(zip(labels[0, :n].tolist(), (boxes[0, :n, 0] / 10).round().int().tolist(), strict=True))


def random_image(g, n, classes, batch=1, background=0.0, dtype=torch.float32):
    logits = torch.randn(batch, n, classes, generator=g) * 2
    logits[..., 0] += background
    priors = torch.cat([torch.rand(n, 2, generator=g), 0.05 + 0.3 * torch.rand(n, 2, generator=g)], 1)
    inputs = {"deltas": torch.randn(batch, n, 4, generator=g), "logits": logits, "priors": priors}
    return {k: v.to(dtype) for k, v in inputs.items()}


@st.composite
def tied_images(draw):
    n, classes = draw(st.integers(0, 30)), draw(st.integers(0, 5))
    values = st.sampled_from([-math.inf, -4.0, -1.0, 0.0, 0.0, 1.0, 3.0, math.inf, math.nan])
    logits = draw(st.lists(values, min_size=n * classes, max_size=n * classes))
    boxes = draw(st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=n, max_size=n))
    return {
        "deltas": torch.zeros(1, n, 4, dtype=torch.float64),
        "logits": torch.tensor(logits, dtype=torch.float64).view(1, n, classes),
        "priors": torch.tensor([[x, y, 2.0, 2.0] for x, y in boxes], dtype=torch.float64).view(n, 4),
        "score_threshold": draw(st.sampled_from([0.0, 0.2, 0.5, 0.7])),
        "iou_threshold": draw(st.sampled_from([0.0, 0.25, 1 / 3, 1.0])),
        "topk_per_class": draw(st.sampled_from([1, 3, 400])),
        "max_detections": draw(st.sampled_from([1, 4, 50])),
        "class_agnostic": draw(st.booleans()),
        "activation": "sigmoid",  # elementwise: equal logits give equal scores, here and in the reference
    }


@settings(deadline=None, max_examples=300)
@given(tied_images(), st.sampled_from(SIMD_LEVELS))
def test_ties_and_hostile_logits_as_the_reference(inputs, level):
    before = _C.simd_level()
    _C.set_simd_level(level)
    try:
        result = ops.detect(**inputs)
    finally:
        _C.set_simd_level(before)
    expected = reference.detect(**inputs)
    for i, (r, e) in enumerate(zip(result, expected, strict=True)):
        assert torch.equal(r, e) if i != 1 else torch.allclose(r, e, atol=1e-15)


def test_ties_by_hand(device):
    rows = [[0.0, 2.0, 2.0], [0.0, 2.0, 2.0], [0.0, 1.0, 3.0]]
    inputs = image(rows, device=device)
    assert found(inputs) == [(2, 2), (1, 0), (1, 1), (2, 0), (2, 1), (1, 2)]
    assert found(inputs, max_detections=2) == [(2, 2), (1, 0)]
    assert found(inputs, topk_per_class=1) == [(2, 2), (1, 0)]
    assert found(inputs, topk_per_class=2) == [(2, 2), (1, 0), (1, 1), (2, 0)]


def test_nms_by_hand(device):
    rows = [[0.0, 3.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0]]
    inputs = image(rows, [PRIOR] * 3, device=device)
    labels = lambda **arguments: ops.detect(**inputs, **arguments)[2][0]  # noqa: E731
    assert labels()[:3].tolist() == [1, 2, -1]
    assert labels(class_agnostic=True)[:2].tolist() == [1, -1]
    assert (labels(iou_threshold=1.0) >= 0).sum() == 6  # suppressed above 1 alone
    assert labels(topk_per_class=1)[:3].tolist() == [1, 2, -1]


def test_boxes_that_are_not_finite_are_kept_and_suppress_nothing(device):
    inputs = image([[0.0, 4.0], [0.0, 3.0], [0.0, 2.0], [0.0, 1.0]], [PRIOR] * 4, device=device)
    inputs["deltas"][0, 0, 0], inputs["deltas"][0, 1, 1] = math.nan, math.inf
    boxes, _, _, counts = ops.detect(**inputs)
    assert counts.tolist() == [3]  # the last is suppressed by the third
    assert boxes[0, 0, 0].isnan()
    assert boxes[0, 1, 1].isinf()
    assert boxes[0, 2].isfinite().all()


def test_sigmoid_has_no_column_for_background(device):
    inputs = image([[5.0, 1.0], [5.0, 6.0]], device=device)
    assert found(inputs) == [(1, 1), (1, 0)]
    assert found(inputs, activation="sigmoid") == [(2, 1), (1, 0), (1, 1), (2, 0)]


def check_thresholds(inputs, activation, count, topk=10**6):
    """A threshold of one of the scores, or next to it, leaves those above it, and nothing else changes."""
    classes = inputs["logits"].shape[2]
    same = {"iou_threshold": 1.0, "topk_per_class": topk, "max_detections": 200 * classes, "activation": activation}
    boxes, scores, labels, (found,) = ops.detect(**inputs, score_threshold=0.0, **same)
    for threshold in at_and_beside(scores[0, : int(found) : 1 + int(found) // count]):
        if not 0 <= threshold <= 1:
            continue
        above = int((scores[0] > threshold).sum())
        result = ops.detect(**inputs, score_threshold=threshold, **same)
        assert result[3].tolist() == [above]
        assert torch.equal(result[0][0, :above], boxes[0, :above])
        assert torch.equal(result[2][0, :above], labels[0, :above])


# Rows are rejected by their logits before any score is computed: that must decide as the score would.
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 20, 81])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_threshold_is_strict_at_every_score(activation, dtype, classes, layout, simd, generator):
    inputs = random_image(generator, 200, classes, background=6.0 if activation == "softmax" else 0.0, dtype=dtype)
    if layout == "columns":
        inputs["logits"] = inputs["logits"].mT.contiguous().mT
    for level in SIMD_LEVELS:
        simd(level)
        check_thresholds(inputs, activation, 15)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_threshold_is_strict_on_each_device(activation, device, generator):
    inputs = random_image(generator, 40, 3, background=6.0 if activation == "softmax" else 0.0)
    check_thresholds({k: v.to(device) for k, v in inputs.items()}, activation, 6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_threshold_is_strict_where_one_class_fills_the_lists(activation, device, generator):
    """All its priors are above the thresholds, and far fewer are wanted: a GPU makes the list of candidates anew."""
    inputs = random_image(generator, 40, 3)
    inputs["logits"][..., 2] += 8
    check_thresholds({k: v.to(device) for k, v in inputs.items()}, activation, 9, topk=4)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iou_threshold_decides_to_the_bit(dtype, class_agnostic, device, generator):
    """As NMS of the boxes that are detected where none is suppressed."""
    inputs = {k: v.to(device) for k, v in random_image(generator, 60, 3, dtype=dtype).items()}
    same = {"class_agnostic": class_agnostic, "score_threshold": 0.1}
    *every, (n,) = ops.detect(**inputs, iou_threshold=1.0, **same)
    boxes, scores, labels = (t[0, :n].cpu() for t in every)
    ious = reference.box_iou(boxes, boxes).unique()
    ious = ious[(ious > 0.05) & (ious < 1)]
    for threshold in at_and_beside(ious[:: len(ious) // 6]):
        keep = (
            reference.nms(boxes, scores, threshold)
            if class_agnostic
            else reference.batched_nms(boxes, scores, labels, threshold)
        )
        result = ops.detect(**inputs, iou_threshold=threshold, **same)
        assert result[3].tolist() == [len(keep)]
        assert torch.equal(result[0][0, : len(keep)].cpu(), boxes[keep])


def test_areas_that_are_denormal_numbers(device, generator):
    """The reference in float32 decides: in float64 the same IoUs are others."""
    inputs = random_image(generator, 60, 3)
    inputs["priors"] *= 7e-22
    result = ops.detect(**{k: v.to(device) for k, v in inputs.items()}, iou_threshold=0.3)
    expected = reference.detect(**inputs, iou_threshold=0.3)
    assert 50 < expected[3] < 110
    assert torch.equal(result[3].cpu(), expected[3])
    assert torch.equal(result[2].cpu(), expected[2])


def test_scores_at_the_ends_of_the_range(device):
    inputs = image([[0.0, 200.0], [0.0, -200.0], [0.0, 1e30], [-1e30, -1e30], [math.inf, 1.0]], device=device)
    assert ops.detect(**inputs)[1][0, :4].tolist() == [1.0, 1.0, 0.5, 0.0]
    assert found(inputs, score_threshold=0.0) == [(1, 0), (1, 2), (1, 3)]
    sigmoid = ops.detect(**inputs, score_threshold=0.0, activation="sigmoid")
    assert sigmoid[1][0, :4].tolist() == [1.0, 1.0, 1.0, pytest.approx(0.731, abs=1e-3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_halves_are_the_float32_result_rounded(dtype, activation, device, generator):
    inputs = {k: v.to(device, dtype) for k, v in random_image(generator, 300, 21, batch=2, background=3.0).items()}
    result = ops.detect(**inputs, activation=activation)
    wide = ops.detect(**{k: v.float() for k, v in inputs.items()}, activation=activation)
    for r, w in zip(result, wide, strict=True):
        assert torch.equal(r, w.to(r.dtype))


def test_any_mix_of_dtypes_is_computed_as_wide_as_it_promotes_to(device, generator):
    inputs = random_image(generator, 12, 5, background=2.0, dtype=torch.float64)
    for dtypes in itertools.product(FLOATS, repeat=3):
        given = {k: v.to(device, dtype) for (k, v), dtype in zip(inputs.items(), dtypes, strict=True)}
        promoted = functools.reduce(torch.promote_types, dtypes)
        computed = torch.promote_types(promoted, torch.float32)
        result = ops.detect(**given)
        wide = ops.detect(**{k: v.to(computed) for k, v in given.items()})
        assert result[0].dtype == result[1].dtype == promoted
        for r, w in zip(result, wide, strict=True):
            assert torch.equal(r, w.to(r.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_heads_in_half_beside_float32_priors(dtype, layout, device, generator):
    inputs = random_image(generator, 300, 21, batch=2, background=3.0)
    inputs["priors"] *= 1333
    given = {k: v.to(device, torch.float32 if k == "priors" else dtype) for k, v in inputs.items()}
    if layout == "columns":
        given["logits"] = given["logits"].mT.contiguous().mT
    result = ops.detect(**given, window=(0, 0, 1333, 800))
    expected = ops.detect(**{k: v.float() for k, v in given.items()}, window=(0, 0, 1333, 800))
    assert (result[3] > 20).all()
    for r, e in zip(result, expected, strict=True):
        assert r.dtype == e.dtype
        assert torch.equal(r, e)


@pytest.mark.parametrize(
    ("dtype", "window", "inside"),
    [
        (torch.bfloat16, (0.3, -1.1, 1333.0, 777.0), (154 / 512, -140 / 128, 1328.0, 776.0)),
        (torch.bfloat16, (0.0, 0.0, 1336.0, 776.0), (0.0, 0.0, 1336.0, 776.0)),
        (torch.float16, (-4097.0, 2049.0, 70000.0, 4097.0), (-4096.0, 2050.0, 65504.0, 4096.0)),
        (torch.float16, (-1e-9, 1e-9, 1.0, 1 - 1e-5), (0.0, 2**-24, 1.0, 1 - 2**-11)),
        (torch.float32, (0.0, 0.0, 1333.0, 777.0), (0.0, 0.0, 1333.0, 777.0)),
    ],
)
def test_rounding_never_leaves_the_window(dtype, window, inside, device):
    inputs = image([[0.0, 4.0]], [[0.0, 0.0, 6e4, 6e4]], device=device, dtype=dtype)
    inputs["deltas"][..., 2:] = 10.0  # seven times as large: beyond every window
    assert tuple(ops.detect(**inputs, window=window)[0][0, 0].tolist()) == inside
    inputs["priors"] = inputs["priors"].float()  # then float32 holds the edges
    boxes = ops.detect(**inputs, window=window)[0][0, 0]
    assert torch.equal(boxes, torch.tensor(window, device=device))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("n", [255, 257, 700])
def test_layout_changes_nothing(n, activation, generator):
    """A class's logits side by side are read for 256 priors at a time."""
    inputs = random_image(generator, n, 5, batch=2, background=2.0)
    expected = ops.detect(**inputs, activation=activation, topk_per_class=n, max_detections=5 * n)
    inputs["logits"] = inputs["logits"].mT.contiguous().mT
    result = ops.detect(**inputs, activation=activation, topk_per_class=n, max_detections=5 * n)
    for r, e in zip(result, expected, strict=True):
        assert torch.equal(r, e)


def test_an_image_does_not_depend_on_its_batch(generator):
    """The CPU cuts few images into slices, and many not."""
    inputs = random_image(generator, 2100, 4, batch=70, background=6.0)
    batch = ops.detect(**inputs)
    for b in (0, 1, 69):
        one = {"deltas": inputs["deltas"][b : b + 1], "logits": inputs["logits"][b : b + 1], "priors": inputs["priors"]}
        for whole, alone in zip(batch, ops.detect(**one), strict=True):
            assert torch.equal(whole[b], alone[0])


@pytest.mark.parametrize("classes", [2, 6])
def test_candidates_that_outnumber_every_list(classes, device, generator):
    """One class holds the best scores, and all boxes are alike: what counts comes last."""
    n = 5000 // classes + 100
    inputs = random_image(generator, n, classes, background=-3.0)
    inputs["deltas"].zero_()
    inputs["priors"][:] = torch.tensor(PRIOR)
    inputs["logits"][..., 1] += 6
    inputs["priors"][-1, 0] += 1
    inputs["logits"][0, -1] = -5 + inputs["logits"][0, -1] / 100
    inputs = {k: v.to(device) for k, v in inputs.items()}
    arguments = {"score_threshold": 0.001, "topk_per_class": n}
    boxes, _, labels, counts = ops.detect(**inputs, **arguments)
    double = {k: v.double() for k, v in inputs.items()}
    expected = reference.detect(**double, **arguments)
    assert torch.equal(counts, expected[3])
    assert torch.equal(labels, expected[2])
    assert (boxes[0, :, 0] > 1).sum() == classes - 1  # the prior apart, of each class


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_all_classes_are_rivals_on_each_device(activation, device, generator):
    """With sigmoid class 0 too."""
    inputs = random_image(generator, 120, 4)
    inputs["deltas"].zero_()  # the boxes of a prior are alike in all classes
    arguments = {"activation": activation, "class_agnostic": True, "score_threshold": 0.05}
    expected = ops.detect(**inputs, **arguments)
    assert expected[3] <= 120 < ops.detect(**inputs, **{**arguments, "class_agnostic": False})[3]
    result = ops.detect(**{k: v.to(device) for k, v in inputs.items()}, **arguments)
    for r, e in zip(result, expected, strict=True):
        assert torch.equal(r.cpu(), e)


def test_no_candidate_is_visited_twice(device):
    """More candidates than a kernel visits together, of equal scores and without area: all are kept, in order."""
    n = 1300
    inputs = image([[0.0, 4.0]] * n, [[10.0 * i, 0.0, 0.0, 1.0] for i in range(n)], device)
    expected = [(1, i) for i in range(n)]
    assert found(inputs, topk_per_class=n, max_detections=n + 1) == expected
    assert found(inputs, topk_per_class=n, max_detections=n + 1, class_agnostic=True) == expected


def test_scores_of_a_class_that_fill_shared_memory(device, generator):
    """More of them pass the threshold than a list of 100 a class has room for."""
    inputs = random_image(generator, 5100, 2)
    expected = ops.detect(**inputs, topk_per_class=100)
    result = ops.detect(**{k: v.to(device) for k, v in inputs.items()}, topk_per_class=100)
    for r, e in zip(result, expected, strict=True):
        assert torch.equal(r.cpu(), e)


def memory_peak(call):
    """Bytes that this process had more at its peak during the call than before."""
    read = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS:")
    call()
    return read("VmHWM:") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.skipif("sanitizers" in _C.build_info(), reason="a sanitizer keeps freed memory")
@pytest.mark.parametrize("layout", ["rows", "columns", "halves"])
def test_memory_is_bounded(layout, generator):
    """Untrained logits of 45 MB: neither a copy of them nor a list of all candidates."""
    inputs = random_image(generator, 8732, 81, batch=16)
    inputs["logits"] /= 40
    if layout == "columns":
        inputs["logits"] = inputs["logits"].mT.contiguous().mT
    if layout == "halves":
        inputs = {k: v.half() for k, v in inputs.items()}
    ops.detect(**inputs)
    assert memory_peak(lambda: ops.detect(**inputs)) < 8e6


def test_more_images_than_a_launch_has_blocks_for_are_refused(gpu):
    def call(deltas, logits, priors):
        return ops.detect(deltas.expand(2**28, 1, 4), logits.expand(2**28, 1, 2), priors)

    with pytest.raises(ValueError, match=r"must be at most 2147483647 on CUDA, got \[268435456, 1, 2\]"):
        gpu(call, image([[0.0, 1.0]]))


def test_no_gradient():
    inputs = image([[0.0, 1.0]])
    inputs["deltas"].requires_grad_()
    with pytest.raises(RuntimeError, match="detect is not differentiable: it selects boxes"):
        ops.detect(**inputs)[0].sum().backward()


def test_unpad(device, generator):
    inputs = {k: v.to(device) for k, v in random_image(generator, 50, 4, batch=3, background=2.0).items()}
    inputs["logits"][1] = math.nan
    boxes, scores, labels, counts = ops.detect(**inputs)
    images = ops.unpad(boxes, scores, labels, counts)
    assert [len(i["labels"]) for i in images] == counts.tolist()
    assert counts[1] == 0
    for b, i in enumerate(images):
        n = int(counts[b])
        assert torch.equal(i["boxes"], boxes[b, :n])
        assert torch.equal(i["scores"], scores[b, :n])
        assert torch.equal(i["labels"], labels[b, :n])
        assert (i["labels"] > 0).all()
