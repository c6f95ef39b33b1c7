"""What match and assign_targets do beyond the generic suite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opinfo.inputs import random_boxes, ssd300_priors
from ssd_ext import ops, reference

# Corners on a small grid: IoUs are ratios of small integers, so ties are common, and equal in every precision.
coordinate = st.integers(-2, 6)
grid_box = st.tuples(coordinate, coordinate, coordinate, coordinate)
grid_prior = st.tuples(coordinate, coordinate, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
threshold = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


@settings(max_examples=300, deadline=None)
@given(
    images=st.lists(st.lists(grid_box, max_size=9), max_size=4),
    priors=st.lists(grid_prior, max_size=40),
    thresholds=st.tuples(threshold, threshold),
    force=st.sampled_from(["none", "last", "bipartite"]),
)
def test_agrees_with_reference_on_ties(images, priors, thresholds, force):
    low, high = sorted(thresholds)
    boxes, priors = [tensor(image) for image in images], tensor(priors)
    result = ops.match(boxes, priors, high, low, force=force)
    expected = reference.match([b.double() for b in boxes], priors.double(), high, low, force)
    assert torch.equal(result, expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=True, allow_infinity=True)] * 4), max_size=20))
def test_any_number_is_safe(rows):
    priors = ssd300_priors()[:300]
    matches = ops.match([tensor(rows)], priors)
    assert torch.equal(matches, reference.match([tensor(rows)], priors))
    labels, deltas = ops.assign_targets([tensor(rows)], [torch.ones(len(rows), dtype=torch.int64)], priors)
    assert torch.equal(labels > 0, matches >= 0)
    assert not bool(torch.isnan(deltas).any())  # infinite where a box is beyond float32 in a prior's terms


def test_every_ground_truth_gets_a_prior_by_bipartite(generator, device):
    boxes = [random_boxes(n, generator) for n in (1, 40, 7)]
    matches = ops.match([b.to(device) for b in boxes], ssd300_priors().to(device)).cpu()
    for row, image in zip(matches, boxes, strict=True):
        assert set(range(len(image))) <= set(row.tolist())


def test_a_box_that_meets_no_prior_still_gets_one():
    priors = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]])
    far = torch.tensor([[5.0, 5.0, 6.0, 6.0], [0.4, 0.4, 0.6, 0.6]])
    assert ops.match([far], priors).tolist() == [[1, 0]]
    assert ops.match([far], priors, force="none").tolist() == [[1, -1]]


@pytest.mark.slow
def test_a_thousand_equal_ground_truths(device):
    box = torch.tensor([[0.2, 0.3, 0.5, 0.6]], device=device)
    priors = ssd300_priors().to(device)
    matches = ops.match([box.repeat(1000, 1)], priors, iou_threshold=1.0).cpu()[0]
    claimed = matches >= 0
    assert sorted(matches[claimed].tolist()) == list(range(1000))
    # They took the 1000 priors of highest IoU, the first of them the best, equal ones by index.
    iou = reference.box_iou(box.cpu(), reference.matching._corners(priors.cpu()))[0]
    order = iou.argsort(descending=True, stable=True)[:1000]
    assert torch.equal(matches[order], torch.arange(1000))


def test_the_last_of_two_has_the_prior():
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]])
    boxes = torch.tensor([[0.3, 0.3, 0.7, 0.7], [0.3, 0.3, 0.6, 0.6]])
    assert ops.match([boxes], priors, force="last").tolist() == [[1, -1]]
    assert ops.match([boxes], priors, force="bipartite").tolist() == [[0, 1]]


def test_threshold_is_inclusive():
    priors = torch.tensor([[1.0, 1.0, 2.0, 2.0]])
    half = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    assert ops.match([half], priors, 0.5, force="none").item() == 0
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert ops.match([half], priors, above, force="none").item() == -1
    assert ops.match([half], priors, above, 0.5, force="none").item() == -2


def test_ignored_priors_have_label_minus_one():
    priors = torch.tensor([[1.0, 1.0, 2.0, 2.0], [9.0, 9.0, 2.0, 2.0]])
    half = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    labels, deltas = ops.assign_targets([half], [torch.tensor([7])], priors, 0.75, 0.25, force="none")
    assert labels.tolist() == [[-1, 0]]
    assert not deltas.any()


def test_both_forms_of_ragged_boxes_agree(generator, device):
    boxes = [random_boxes(n, generator).to(device) for n in (4, 0, 9)]
    labels = [torch.arange(1, len(b) + 1, device=device) for b in boxes]
    priors = ssd300_priors().to(device)
    pair = (torch.cat(boxes), torch.tensor([0, 4, 4, 13], device=device))
    assert torch.equal(ops.match(boxes, priors), ops.match(pair, priors))
    for a, b in zip(
        ops.assign_targets(boxes, labels, priors), ops.assign_targets(pair, torch.cat(labels), priors), strict=True
    ):
        assert torch.equal(a, b)


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
    inputs = {"gt_boxes": boxes, "gt_labels": labels, "priors": center_size.to(dtype), "force": force}
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
    matches = gpu(ops.match, {"gt_boxes": (boxes, offsets), "priors": priors, "force": force})
    assert torch.equal(matches, ops.match(rows, priors, force=force))


def test_an_image_without_objects_may_be_an_empty_tensor(device):
    priors = ssd300_priors().to(device)
    empty = torch.tensor([], device=device)
    labels, deltas = ops.assign_targets([empty, empty], [empty.long(), empty.long()], priors)
    assert labels.shape == (2, 8732)
    assert not labels.any()
    assert not deltas.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_empty_tensor_among_others_needs_no_dtype(dtype):
    box = torch.tensor([[0.25, 0.25, 0.75, 0.75]], dtype=dtype)
    priors = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=dtype)
    assert ops.match([torch.tensor([]), box], priors).tolist() == [[-1], [0]]
    with pytest.raises(ValueError, match=r"gt_boxes\[1\] must have the dtype of the others"):
        ops.match([box, box.float()], priors)


def test_shapes_are_checked_before_values():
    nan = torch.full((1, 4), torch.nan)
    with pytest.raises(ValueError, match=r"gt_boxes must be \[G, 4\], got \[4\]"):
        ops.match((nan[0], torch.tensor([0, 1])), torch.rand(3, 4), validate=True)
    with pytest.raises(ValueError, match="must run from 0 to the number of gt_boxes"):
        ops.match((nan, torch.tensor([0, 0])), torch.rand(3, 4), validate=True)


def test_number_of_classes_is_not_ignored():
    arguments = [torch.tensor([[0.1, 0.1, 0.5, 0.5]])], [torch.tensor([1])], ssd300_priors()
    with pytest.raises(ValueError, match="num_classes needs validate=True"):
        ops.assign_targets(*arguments, num_classes=21)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ops.assign_targets(*arguments, num_classes=1, validate=True)


def test_valid_ground_truth_passes_validation(generator):
    boxes = [random_boxes(3, generator), torch.empty(0, 4)]
    labels = [torch.tensor([1, 2, 20]), torch.empty(0, dtype=torch.int64)]
    ops.assign_targets(boxes, labels, ssd300_priors(), validate=True, num_classes=21)


def test_targets_are_constants():
    box = torch.tensor([[0.1, 0.1, 0.5, 0.5]], requires_grad=True)
    _, deltas = ops.assign_targets([box], [torch.tensor([1])], ssd300_priors())
    with pytest.raises(RuntimeError, match="assign_targets is not differentiable: targets are constants"):
        deltas.sum().backward()


def test_agrees_with_torchvision_matcher_on_ssd300(generator):
    det_utils = pytest.importorskip("torchvision.models.detection._utils")
    from torchvision.ops import box_convert, box_iou

    priors = ssd300_priors()
    corners = box_convert(priors, "cxcywh", "xyxy")
    boxes = [random_boxes(n, generator) for n in (1, 5, 60)]
    expected = torch.stack([det_utils.SSDMatcher(0.5)(box_iou(image, corners)) for image in boxes])
    assert torch.equal(ops.match(boxes, priors, force="last"), expected)


def test_labels_of_the_other_form_are_refused():
    boxes, priors = torch.tensor([[0.1, 0.1, 0.5, 0.5]]), ssd300_priors()
    with pytest.raises(ValueError, match=r"gt_labels must be a list like gt_boxes, got one tensor \[1\]"):
        ops.assign_targets([boxes], torch.tensor([1]), priors)
    with pytest.raises(ValueError, match=r"must be one \[G\] tensor to go with \(boxes, offsets\), got a list"):
        ops.assign_targets((boxes, torch.tensor([0, 1])), [torch.tensor([1])], priors)
