"""What match and assign_targets do beyond the generic suite, and GroundTruth."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opinfo.inputs import random_boxes, ssd300_priors
from ssd_ext import _C, GroundTruth, MultiBoxLoss, ops, reference
from ssd_ext.ground_truth import are_valid, as_ground_truth
from ssd_ext.priors import PriorSpec

# Corners on a small grid: IoUs are ratios of small integers, so ties are common, and equal in every precision.
coordinate = st.integers(-2, 6)
grid_box = st.tuples(coordinate, coordinate, coordinate, coordinate)
grid_prior = st.tuples(coordinate, coordinate, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
threshold = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])
min_force_iou = st.none() | threshold


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def of(*boxes):
    """Ground truth of these boxes of each image."""
    return GroundTruth.from_lists(boxes)


@settings(max_examples=300, deadline=None)
@given(
    images=st.lists(st.lists(grid_box, max_size=9), max_size=4),
    priors=st.lists(grid_prior, max_size=40),
    thresholds=st.tuples(threshold, threshold),
    force=st.sampled_from(["none", "last", "bipartite"]),
    min_force_iou=min_force_iou,
)
def test_agrees_with_reference_on_ties(images, priors, thresholds, force, min_force_iou):
    low, high = sorted(thresholds)
    ground_truth, priors = of(*[tensor(image) for image in images]), tensor(priors)
    rule = {"iou_threshold": high, "low_threshold": low, "force": force, "min_force_iou": min_force_iou}
    result = ops.match(ground_truth, priors, **rule)
    assert torch.equal(result, reference.match(ground_truth.to(torch.float64), priors.double(), **rule))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=True, allow_infinity=True)] * 4), max_size=20))
def test_any_number_is_safe(rows):
    priors = ssd300_priors()[:300]
    matches = ops.match(of(tensor(rows)), priors)
    assert torch.equal(matches, reference.match(of(tensor(rows)), priors))
    target_deltas, target_labels = ops.assign_targets(of(tensor(rows)), priors)
    assert torch.equal(target_labels > 0, matches >= 0)
    assert not bool(torch.isnan(target_deltas).any())  # infinite where a box is beyond float32 in a prior's terms


def test_every_ground_truth_gets_a_prior_by_bipartite(generator, device):
    boxes = [random_boxes(n, generator) for n in (1, 40, 7)]
    matches = ops.match(of(*boxes).to(device), ssd300_priors().to(device)).cpu()
    for row, image in zip(matches, boxes, strict=True):
        assert set(range(len(image))) <= set(row.tolist())


@pytest.mark.parametrize("force", ["last", "bipartite"])
def test_a_box_that_meets_no_prior_gets_none_unless_asked_for(force, device):
    priors = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.75, 0.75, 0.25, 0.25]], device=device)
    touching = torch.tensor([[0.875, 0.7, 1.1, 0.9]], device=device)  # without overlapping
    far = torch.tensor([[5.0, 5.0, 6.0, 6.0], [0.4, 0.4, 0.6, 0.6]], device=device)
    assert ops.match(of(far, touching), priors, force=force).tolist() == [[1, -1], [-1, -1]]
    in_any_case = ops.match(of(far[:1], touching), priors, force=force, min_force_iou=None)
    assert in_any_case.tolist() == [[0, -1], [0, -1]]
    assert ops.match(of(far), priors, min_force_iou=None).tolist() == [[1, 0]]


@pytest.mark.parametrize("force", ["last", "bipartite"])
def test_claims_are_made_strictly_above_the_minimum(force, device):
    priors = torch.tensor([[1.0, 1.0, 2.0, 2.0]], device=device)
    quarter = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    below = torch.nextafter(torch.tensor(0.25), torch.tensor(0.0)).item()
    assert ops.match(of(quarter), priors, force=force, min_force_iou=0.25).item() == -1
    assert ops.match(of(quarter), priors, force=force, min_force_iou=below).item() == 0
    loss = MultiBoxLoss(priors, force=force, min_force_iou=0.25)
    predictions = torch.zeros(1, 1, 4, device=device), torch.zeros(1, 1, 2, device=device)
    target = [{"boxes": quarter, "labels": torch.ones(1, dtype=torch.int64, device=device)}]
    assert sum(loss(*predictions, target)) == 0  # no positive, so no negative


def crowd(name, count):
    """Boxes that want the same priors, by `count` of them: equal, within 0.01, nested, and equal cells."""
    box, side = torch.tensor([[0.3, 0.3, 0.5, 0.6]]), math.isqrt(count)
    cells = torch.stack([torch.arange(side).repeat(side), torch.arange(side).repeat_interleave(side)], 1) / side
    return {
        "equal": box.repeat(count, 1),
        "within 0.01": box + torch.rand(count, 4, generator=torch.Generator().manual_seed(count)) * 0.01,
        "nested": box + torch.linspace(0, 0.1, count)[:, None] * torch.tensor([-1.0, -1, 1, 1]),
        "cells": torch.cat([cells, cells + 1 / side], 1),
    }[name]


CROWDS = ["equal", "within 0.01", "nested", "cells"]


@pytest.mark.parametrize("count", [9, 196])
@pytest.mark.parametrize("name", CROWDS)
@pytest.mark.parametrize("min_force_iou", [0.0, None, 0.3])
def test_crowds_are_joined_by_rank(name, count, min_force_iou, device):
    boxes, priors = crowd(name, count), ssd300_priors()[-236:]
    rule = {"iou_threshold": 1.0, "min_force_iou": min_force_iou}
    expected = reference.match(of(boxes), priors, **rule)
    assert torch.equal(ops.match(of(boxes.to(device)), priors.to(device), **rule).cpu(), expected)
    if min_force_iou is None:
        assert (expected >= 0).sum() == count


@pytest.mark.skipif("emulator" not in _C.build_info(), reason="only the emulator counts the steps of a kernel")
@pytest.mark.parametrize("name", CROWDS)
def test_cuda_joins_a_crowd_in_steps_in_proportion_to_it(name, gpu):
    gpu(ops.match, {"ground_truth": of(crowd(name, 196)), "priors": ssd300_priors()[-236:]})
    # For each at most four searches by a block, of 72 barriers and exchanges, and one by a warp in each of 16 rounds.
    assert _C.emulator.meetings() < 500 * 196


FLUSHED_BY_ONE_THREAD = """
import sys, torch
from ssd_ext import GroundTruth, ops
from ssd_ext.reference import match
started, called = (mode == "1" for mode in sys.argv[1:])
torch.set_num_threads(2)
torch.set_flush_denormal(started)
(torch.rand(5_000_000) + 1).sum()  # starts torch's other thread, which keeps this mode
torch.set_flush_denormal(called)
side = 1e-18
priors = torch.tensor([[5.0, 5, 1, 1]]).repeat(2000, 1)
priors[-1] = torch.tensor([1.4e-18, 1.49e-18, side, side])  # meets the boxes in a subnormal intersection
boxes = GroundTruth.from_lists([torch.tensor([[0, 0, side, side]]).repeat(2, 1)])
matches = ops.match(boxes, priors)
torch.set_num_threads(1)
assert torch.equal(matches, ops.match(boxes, priors)) and torch.equal(matches, match(boxes, priors))
assert bool((matches >= 0).any()) != called
"""


@pytest.mark.parametrize("modes", ["01", "10"])
def test_all_threads_take_subnormal_numbers_as_the_caller_does(modes, python):
    done = python("-c", FLUSHED_BY_ONE_THREAD, *modes)
    assert done.returncode == 0, done.stderr


def test_the_last_of_two_has_the_prior():
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.1, 0.1]])
    boxes = torch.tensor([[0.3, 0.3, 0.7, 0.7], [0.3, 0.3, 0.6, 0.6]])
    assert ops.match(of(boxes), priors, force="last").tolist() == [[1, -1]]
    assert ops.match(of(boxes), priors, force="bipartite").tolist() == [[0, 1]]


def test_threshold_is_inclusive():
    priors = torch.tensor([[1.0, 1.0, 2.0, 2.0]])
    half = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    assert ops.match(of(half), priors, force="none").item() == 0
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert ops.match(of(half), priors, iou_threshold=above, force="none").item() == -1
    assert ops.match(of(half), priors, iou_threshold=above, low_threshold=0.5, force="none").item() == -2


def test_ignored_priors_have_label_minus_one():
    priors = torch.tensor([[1.0, 1.0, 2.0, 2.0], [9.0, 9.0, 2.0, 2.0]])
    half = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    target_deltas, target_labels = ops.assign_targets(
        of(half), priors, iou_threshold=0.75, low_threshold=0.25, force="none"
    )
    assert target_labels.tolist() == [[-1, 0]]
    assert not target_deltas.any()
    from_zero = ops.assign_targets(of(half), priors, iou_threshold=0.75, low_threshold=0.0, force="none")
    assert from_zero[1].tolist() == [[-1, -1]]


def test_regions_to_ignore_match_as_objects_do():
    priors = torch.tensor([[1.0, 1.0, 2.0, 2.0], [9.0, 9.0, 2.0, 2.0]])
    region = GroundTruth.from_lists([torch.tensor([[0.0, 0.0, 2.0, 2.0]])], [torch.tensor([-1])])
    assert ops.assign_targets(region, priors, validate=True)[1].tolist() == [[-1, 0]]


def test_targets_are_given_in_the_order_in_which_the_loss_takes_them(device, generator):
    ground_truth = of(random_boxes(3, generator), random_boxes(2, generator)).to(device)
    priors = ssd300_priors()[::50].contiguous().to(device)
    deltas, logits = torch.zeros(2, len(priors), 4, device=device), torch.zeros(2, len(priors), 2, device=device)
    loc, conf = ops.multibox_loss(deltas, logits, *ops.assign_targets(ground_truth, priors))
    assert loc > 0
    assert conf > 0


def test_every_form_of_ground_truth_gives_the_same(generator, device):
    boxes = [random_boxes(n, generator).to(device) for n in (4, 0, 9)]
    labels = [torch.arange(1, len(b) + 1, device=device) for b in boxes]
    priors = ssd300_priors().to(device)
    flat = GroundTruth.from_lists(boxes, labels)
    dicts = [{"boxes": b, "labels": k, "name": "x"} for b, k in zip(boxes, labels, strict=True)]
    assert torch.equal(ops.match(flat, priors), ops.match(dicts, priors))
    expected = ops.assign_targets(flat, priors)
    for form in (dicts, tuple(dicts), GroundTruth.from_targets(dicts), GroundTruth.from_targets(flat.to_targets())):
        for a, b in zip(ops.assign_targets(form, priors), expected, strict=True):
            assert torch.equal(a, b)


def test_a_box_without_dimensions_is_refused():
    scalar = GroundTruth(torch.tensor(1.0), torch.ones(1).long(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"ground_truth.boxes must be \[G, 4\], got \[\]"):
        ops.match(scalar, torch.rand(3, 4))


def test_ground_truth_of_lists():
    boxes = [torch.tensor([]), torch.tensor([[0, 1, 2, 3]]), torch.tensor([[4.0, 5, 6, 7], [1, 1, 2, 2]]).double()]
    given = GroundTruth.from_lists(boxes, [torch.tensor([]), torch.tensor([3]).int(), torch.tensor([1, -1])])
    assert given.num_images == 3
    assert given.boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [1, 1, 2, 2]]
    assert given.boxes.dtype == torch.float64
    assert given.labels.dtype == torch.int64
    assert given.labels.tolist() == [3, 1, -1]
    assert given.offsets.tolist() == [0, 0, 1, 3]
    assert [len(target["boxes"]) for target in given.to_targets()] == [0, 1, 2]
    assert given.to(torch.float16).labels.dtype == torch.int64
    assert GroundTruth.from_lists(boxes).labels.tolist() == [1, 1, 1]
    none = GroundTruth.from_lists([])
    assert (none.num_images, none.boxes.shape, none.offsets.tolist()) == (0, (0, 4), [0])
    assert GroundTruth.from_lists([torch.empty(0, 4).double()]).boxes.dtype == torch.float64
    assert GroundTruth.from_lists([torch.rand(2, 4)], [torch.tensor([1, 2]).int()]).labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("boxes", "labels", "said"),
    [
        (torch.rand(2, 4), None, "must be lists with a tensor for each image"),
        ([torch.rand(2, 4)], torch.ones(2), "must be lists with a tensor for each image"),
        ([torch.rand(2, 4), torch.rand(4)], None, r"boxes of image 1 must be \[G, 4\], got \[4\]"),
        ([torch.rand(2, 4)], [torch.ones(3)], r"labels of image 0 must be a tensor \[2\], as its boxes, got \[3\]"),
        ([torch.rand(2, 4)], [torch.ones(2, 1)], r"labels of image 0 must be a tensor \[2\], .* got \[2, 1\]"),
        ([torch.rand(2, 4)], [[1, 2]], r"labels of image 0 must be a tensor \[2\], as its boxes, got list"),
        ([[[0, 0, 1, 1]]], None, r"boxes of image 0 must be a tensor \[G, 4\], got list"),
        ([torch.rand(2, 4)], [], r"labels must be of 1 images, as boxes, got 0"),
        ([torch.rand(1, 4).to_sparse()], None, r"boxes of image 0 must be a tensor \[G, 4\], got .*torch.sparse_coo"),
        ([torch.rand(1, 4)], [torch.ones(1).to_sparse()], r"labels of image 0 must be a tensor .*torch.sparse_coo"),
    ],
)
def test_lists_that_are_no_ground_truth(boxes, labels, said):
    with pytest.raises(ValueError, match=said):
        GroundTruth.from_lists(boxes, labels)


def test_boxes_of_another_format_are_no_ground_truth():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    corners, others = (
        tv_tensors.BoundingBoxes(torch.rand(2, 4), format=form, canvas_size=(9, 9)) for form in ("XYXY", "XYWH")
    )
    assert type(GroundTruth.from_lists([corners]).boxes) is torch.Tensor
    with pytest.raises(ValueError, match=r"boxes of image 0 must be corners \(XYXY\), got XYWH"):
        GroundTruth.from_lists([others])


def test_dicts_are_compiled_and_exported():
    class Module(torch.nn.Module):
        def forward(self, boxes, labels, priors):
            return ops.assign_targets([{"boxes": boxes, "labels": labels}], priors)

    inputs = torch.tensor([[0.1, 0.1, 0.5, 0.5]]), torch.tensor([3]), ssd300_priors()[:50]
    expected = Module()(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(Module(), backend="aot_eager")(*inputs)
    exported = torch.export.export(Module(), inputs).module()(*inputs)
    for found in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


COUNTS = [(3, 2), (0, 2), (1, 0), (1, 1), (5, 1), (0, 0), (2, 7), (0, 1), (9, 0), (1, 4)]  # of objects in two images


def compiled_loss(priors, validate, **settings):
    criterion = MultiBoxLoss(priors, validate=validate)

    def train(deltas, logits, targets):
        matches = ops.match(targets, priors, validate=validate)
        return sum(criterion(deltas, logits, targets)) + matches.sum() * 0

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return train, torch.compile(train, backend="aot_eager", **settings)


@pytest.mark.parametrize("validate", [False, True])
def test_one_graph_and_a_dynamic_one_serve_all_counts(validate, generator):
    train, compiled = compiled_loss(ssd300_priors()[-50:], validate, fullgraph=True)
    deltas, logits = torch.randn(2, 50, 4, generator=generator), torch.randn(2, 50, 3, generator=generator)
    for counts in COUNTS:
        if sum(counts) < 2:
            continue  # torch makes a graph for tensors of no row, and one for those of a single row
        labels = [torch.randint(1, 3, (n,), generator=generator) for n in counts]
        targets = GroundTruth.from_lists([random_boxes(n, generator) for n in counts], labels)
        assert torch.equal(compiled(deltas, logits, targets), train(deltas, logits, targets))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compiled_code_warns_of_a_list(generator):
    train, compiled = compiled_loss(ssd300_priors()[-50:], validate=True)
    deltas, logits = torch.randn(2, 50, 4, generator=generator), torch.randn(2, 50, 3, generator=generator)
    targets = [{"boxes": random_boxes(n, generator), "labels": torch.ones(n, dtype=torch.int64)} for n in (0, 3)]
    with pytest.warns(UserWarning, match=r"again for each pattern .* GroundTruth\.from_targets\(targets\)"):
        found = compiled(deltas, logits, targets)
    assert torch.equal(found, train(deltas, logits, targets))


@pytest.mark.parametrize("form", [list, GroundTruth])
def test_images_without_objects_take_the_type_and_device_of_the_priors(form):
    priors, empty = ssd300_priors()[:50].double(), torch.tensor([])
    given = [{"boxes": empty, "labels": empty}]
    given = given if form is list else GroundTruth.from_targets(given)
    torch._dynamo.reset()
    compiled = torch.compile(ops.match, backend="eager", fullgraph=form is GroundTruth)
    for match in (ops.match, compiled):
        assert match(given, priors).eq(-1).all()
    moved = as_ground_truth(given, priors.to("meta"))
    assert {t.device.type for t in moved} == {"meta"}
    assert moved.boxes.dtype == torch.float64


def test_validation_in_a_graph_is_an_op_to_torch():
    given = of(torch.tensor([[0.1, 0.1, 0.5, 0.5]]))
    torch.library.opcheck(torch.ops.ssd_ext.validated_offsets.default, (*given, ssd300_priors()[:50], 2))


@pytest.mark.parametrize("part", GroundTruth._fields)
def test_validation_names_what_is_no_tensor(part):
    given = of(torch.tensor([[0.1, 0.1, 0.5, 0.5]]))
    with pytest.raises(ValueError, match=rf"ground_truth\.{part} must be a plain tensor, got list"):
        given._replace(**{part: getattr(given, part).tolist()}).validate()


def test_what_is_forced_by_default_is_the_same_everywhere(generator):
    far, priors = of(torch.tensor([[5.0, 5, 6, 6]])), ssd300_priors()[-4:]
    assert not ops.assign_targets(far, priors)[1].any()
    assert MultiBoxLoss(priors)(torch.zeros(1, 4, 4), torch.zeros(1, 4, 2), far)[0] == 0


def test_a_list_does_not_go_into_a_full_graph():
    priors, targets = ssd300_priors()[:50], [{"boxes": torch.rand(1, 4), "labels": torch.ones(1)}]
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"For fullgraph=True give an ssd_ext\.GroundTruth"):
        torch.compile(ops.match, fullgraph=True, backend="eager")(targets, priors)


def test_a_compiled_match_validates():
    priors = ssd300_priors()[:50]
    bad = of(torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.5, 0.5, 0.2, 0.6]]))
    torch._dynamo.reset()
    compiled = torch.compile(ops.assign_targets, fullgraph=True, backend="inductor")
    with pytest.raises(ValueError, match=r"x1 < x2.*\(image 0, box 1\)"):
        compiled(bad, priors, validate=True)
    with pytest.raises(ValueError, match=r"label must be in 1\.\.2 .*got 7"):
        compiled(
            bad._replace(boxes=bad.boxes.abs().sort(1).values, labels=torch.tensor([1, 7])),
            priors,
            validate=True,
            num_classes=3,
        )
    with pytest.raises(ValueError, match="number of boxes, 2, got 0 to 3"):
        compiled(bad._replace(offsets=torch.tensor([0, 3])), priors, validate=True)


@pytest.mark.parametrize("images", [1, 3])
def test_pixels_become_fractions_of_each_image(images, device, generator):
    boxes = [random_boxes(n, generator) for n in (2, 0, 3)[:images]]
    extents = torch.tensor([[300.0, 200, 300, 200], [7, 9, 7, 9], [64, 32, 64, 32]])[:images]
    given = of(*boxes)
    padded = given._replace(boxes=torch.cat([given.boxes, torch.rand(2, 4)]))  # rows of no image
    found = padded.to(device).normalized(extents.to(device)).boxes.cpu()
    expected = torch.cat([b / extent for b, extent in zip(boxes, extents, strict=True)])
    assert torch.equal(found[: len(expected)], expected)
    assert torch.equal(given.normalized(extents[:1]).boxes, given.boxes / extents[0])
    with pytest.raises(ValueError, match=rf"extents must be \[1, 4\] or \[{images}, 4\], got \[2, 4\]"):
        given.normalized(torch.ones(2, 4))


# The CUDA kernel: 64 priors a warp, 512 a block; 32 and 64 ground truths at a time, 512 of an image that claim in
# shared memory.
SIZES = [(31, 511), (32, 512), (33, 513), (63, 31), (64, 32), (65, 33), (5, 63), (5, 64), (5, 65), (513, 1100)]


@pytest.mark.parametrize(("gts", "num_priors"), SIZES)
@pytest.mark.parametrize("force", ["none", "last", "bipartite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_gives_the_cpu_result_at_every_size(gts, num_priors, force, dtype, gpu, generator):
    boxes = [random_boxes(n, generator, 0.02, 0.2).to(dtype) for n in (2, gts, 0)]
    labels = [torch.arange(1, len(b) + 1) for b in boxes]
    center_size = torch.cat([torch.rand(num_priors, 2, generator=generator), torch.full((num_priors, 2), 0.1)], 1)
    inputs = {"ground_truth": GroundTruth.from_lists(boxes, labels), "priors": center_size.to(dtype), "force": force}
    for a, b in zip(gpu(ops.assign_targets, inputs), ops.assign_targets(**inputs), strict=True):
        assert torch.equal(a, b)


WRONG_OFFSETS = {
    "falls": (20, 3),
    "falls late": (280, 7),
    "too great": (30, 41),
    "negative": (0, -1),
    "huge": (9, 2**62),
}


@pytest.mark.parametrize("wrong", WRONG_OFFSETS)
@pytest.mark.parametrize("force", ["none", "bipartite"])
def test_cuda_gives_images_no_rows_from_wrong_offsets_on(wrong, force, gpu, generator):
    """There it cannot refuse them without waiting for the GPU."""
    boxes, images = random_boxes(40, generator), 300  # more images than a block has threads
    priors = ssd300_priors()[-40:]
    offsets = torch.arange(images + 1).clamp(max=len(boxes))
    at, value = WRONG_OFFSETS[wrong]
    offsets[at] = value
    rows, right = [], offsets[0] >= 0
    for begin, end in offsets.unfold(0, 2, 1).tolist():
        right = right and begin <= end <= len(boxes)
        rows.append(boxes[begin:end] if right else boxes[:0])
    wrong = GroundTruth(boxes, torch.ones(len(boxes), dtype=torch.int64), offsets)
    matches = gpu(ops.match, {"ground_truth": wrong, "priors": priors, "force": force})
    assert torch.equal(matches, ops.match(of(*rows), priors, force=force))


def test_an_image_without_objects_may_be_an_empty_tensor(device):
    priors = ssd300_priors().to(device)
    empty = torch.tensor([], device=device)
    target_deltas, target_labels = ops.assign_targets(
        GroundTruth.from_lists([empty, empty], [empty, empty]), priors.double()
    )
    assert target_labels.shape == (2, 8732)
    assert target_deltas.dtype == torch.float64
    assert not target_labels.any()
    assert not target_deltas.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_empty_tensor_among_others_needs_no_dtype(dtype):
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]], dtype=dtype)
    priors = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=dtype)
    assert ops.match(of(torch.tensor([]), box), priors).tolist() == [[-1], [0]]


def test_shapes_are_checked_before_values():
    nan = of(torch.full((1, 4), torch.nan))
    with pytest.raises(ValueError, match=r"ground_truth.boxes must be \[G, 4\], got \[4\]"):
        ops.match(nan._replace(boxes=nan.boxes[0]), torch.rand(3, 4), validate=True)
    with pytest.raises(ValueError, match="must begin with 0 and end with at most the number of boxes, 1, got 0 to 2"):
        ops.match(nan._replace(offsets=torch.tensor([0, 2])), torch.rand(3, 4), validate=True)


def test_number_of_classes_is_not_ignored():
    arguments = of(torch.tensor([[0.1, 0.1, 0.5, 0.5]])), ssd300_priors()
    with pytest.raises(ValueError, match="num_classes needs validate=True"):
        ops.assign_targets(*arguments, num_classes=21)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ops.assign_targets(*arguments, num_classes=1, validate=True)
    ops.assign_targets(*arguments, num_classes=2, validate=True)


def test_valid_ground_truth_passes_validation(generator, recwarn):
    boxes = [random_boxes(4, generator), torch.empty(0, 4)]
    labels = [torch.tensor([1, 2, 20, -1]), torch.empty(0, dtype=torch.int64)]
    given = GroundTruth.from_lists(boxes, labels)
    padding = torch.full((1, 4), torch.nan)  # belongs to no image
    given = GroundTruth(torch.cat([given.boxes, padding]), torch.cat([given.labels, torch.tensor([99])]), given.offsets)
    ops.assign_targets(given, ssd300_priors(), validate=True, num_classes=21)
    assert not recwarn


def test_boxes_whose_area_their_dtype_does_not_hold():
    corners = torch.tensor([[0.0, 0, 300, 300], [0, 0, 1e-23, 1e-23], [0, 0, 1e20, 1e20]])
    assert are_valid(corners).tolist() == [True, False, False]
    assert are_valid(corners.double()).all()
    assert are_valid(corners[:1].half()).all()  # 90,000 is too much for a half, but not for what the ops compute in


def test_priors_that_are_corners_are_noticed(generator):
    box_convert = pytest.importorskip("torchvision.ops").box_convert
    given, priors = of(random_boxes(2, generator)), ssd300_priors()
    huge = PriorSpec((64, 64), ((2, 2), (1, 1)), (0.8, 0.9, 0.95), ((), ()))  # each is larger than any centre
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.match(given, huge.priors(), validate=True)
    for unit in (1, 300):
        with pytest.warns(UserWarning, match="priors look like corners.*box_convert") as warned:
            ops.match(given, box_convert(priors * unit, "cxcywh", "xyxy"), validate=True)
        assert warned[0].filename == __file__


def test_targets_are_constants():
    box = torch.tensor([[0.1, 0.1, 0.5, 0.5]], requires_grad=True)
    target_deltas, _ = ops.assign_targets(of(box), ssd300_priors())
    with pytest.raises(RuntimeError, match="assign_targets is not differentiable: targets are constants"):
        target_deltas.sum().backward()


def test_agrees_with_torchvision_matcher_on_ssd300(generator):
    det_utils = pytest.importorskip("torchvision.models.detection._utils")
    from torchvision.ops import box_convert, box_iou

    priors = ssd300_priors()
    corners = box_convert(priors, "cxcywh", "xyxy")
    boxes = [random_boxes(n, generator) for n in (1, 5, 60)]
    expected = torch.stack([det_utils.SSDMatcher(0.5)(box_iou(image, corners)) for image in boxes])
    assert torch.equal(ops.match(of(*boxes), priors, force="last"), expected)
