"""What nms, batched_nms and their padded forms do beyond the generic suite."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opinfo.inputs import detector_candidates, random_boxes
from ssd_ext import ops, reference

coordinate = st.integers(-2, 6)
grid_box = st.tuples(coordinate, coordinate, coordinate, coordinate)
score = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, math.inf, math.nan])
candidate = st.tuples(grid_box, score, st.sampled_from([-5, 0, 7, 2**40]))


@settings(max_examples=300, deadline=None)
@given(st.lists(candidate, max_size=60), st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]))
def test_agrees_with_reference_on_ties(candidates, threshold):
    boxes = torch.tensor([c[0] for c in candidates], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([c[1] for c in candidates], dtype=torch.float32)
    idxs = torch.tensor([c[2] for c in candidates], dtype=torch.int64)
    double = boxes.double(), scores.double()
    assert torch.equal(ops.nms(boxes, scores, threshold), reference.nms(*double, threshold))
    expected = reference.batched_nms(*double, idxs, threshold)
    assert torch.equal(ops.batched_nms(boxes, scores, idxs, threshold), expected)
    keep, count = ops.batched_nms_padded(boxes, scores, idxs, threshold)
    assert torch.equal(keep[:count], expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=True, allow_infinity=True)] * 5), max_size=80))
def test_any_number_is_safe(rows):
    rows = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    keep = ops.nms(rows[:, :4], rows[:, 4], 0.5)
    assert torch.equal(keep, reference.nms(rows[:, :4], rows[:, 4], 0.5))


def below(number):
    """The next float32."""
    return torch.nextafter(torch.as_tensor(number), torch.tensor(0.0)).item()


def test_class_ids_above_what_half_holds(device):
    """torchvision shifts coordinates by class, which overflows in half: ids are compared here."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]], device=device).repeat(3, 1).half()
    scores = torch.tensor([0.9, 0.8, 0.7], device=device).half()
    idxs = torch.tensor([65505, 65504, 65505], device=device)
    assert ops.batched_nms(boxes, scores, idxs, 0.5).tolist() == [0, 1]


def test_classes_are_not_optional():
    for op in (ops.batched_nms, ops.batched_nms_padded):
        with pytest.raises(ValueError, match=r"idxs must be \[N\] integers, got None"):
            op(torch.rand(3, 4), torch.rand(3), None, 0.5)


def test_indices_are_int64_whatever_the_ids_are(device):
    boxes, scores, idxs = torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int32)
    for f in (ops.batched_nms, reference.batched_nms):
        assert f(boxes.to(device), scores.to(device), idxs.to(device), 0.5).dtype == torch.int64


def test_threshold_is_exclusive():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]])
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert ops.nms(boxes, scores, below(0.5)).tolist() == [0]


def test_threshold_so_low_that_products_with_it_are_denormal_numbers(device):
    side = torch.tensor(3e-15)
    for k in range(8, 24):  # steps of float32 by which two squares of that side overlap in x and in y
        x = side * (1 - k * 2.0**-23)
        boxes = torch.stack([torch.stack([at, at, at + side, at + side]) for at in (side - side, x)])
        iou = reference.box_iou(boxes[:1], boxes[1:])[0, 0]
        assert 0 < iou.double() * side.double() ** 2 < torch.finfo(torch.float32).tiny
        kept = [ops.nms(boxes.to(device), torch.tensor([0.9, 0.8], device=device), t) for t in (iou.item(), below(iou))]
        assert [keep.tolist() for keep in kept] == [[0, 1], [0]]


def test_nan_scores_are_dropped_and_nan_boxes_suppress_nothing():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 4)
    boxes[1, 0] = math.nan
    scores = torch.tensor([math.nan, 0.9, 0.8, 0.7])
    assert ops.nms(boxes, scores, 0.5).tolist() == [1, 2]


def test_equal_scores_keep_the_lowest_index():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 5)
    assert ops.nms(boxes, torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0]), 0.5).tolist() == [0]


def test_a_chain_is_resolved_in_order():
    """Each box overlaps only its neighbours: every second one stays."""
    x = torch.arange(1000.0)
    boxes = torch.stack([x, torch.zeros(1000), x + 2, torch.ones(1000)], 1)
    scores = 1 - x / 2000
    assert torch.equal(ops.nms(boxes, scores, 0.3), torch.arange(0, 1000, 2))


def _assert_cpu_result(gpu, boxes, scores, idxs=None):
    inputs = {"boxes": boxes, "scores": scores, "iou_threshold": 0.5} | ({} if idxs is None else {"idxs": idxs})
    op = ops.nms_padded if idxs is None else ops.batched_nms_padded
    keep, count = gpu(op, inputs)
    expected, expected_count = op(**inputs)
    assert torch.equal(keep, expected)
    assert torch.equal(count, expected_count)


def test_more_boxes_than_a_kernel_counts_are_refused():
    boxes, scores = torch.zeros(1, 4).expand(2**31 - 1, 4), torch.zeros(1).expand(2**31 - 1)
    with pytest.raises(ValueError, match="nms: at most 2147482623 boxes, got 2147483647"):
        ops.nms(boxes, scores, 0.5)


@pytest.mark.parametrize("n", [255, 256, 257, 2049])
def test_sizes_about_the_steps_and_chunks_of_the_gpu(gpu, n, generator):
    _assert_cpu_result(gpu, *detector_candidates(n, generator))


def test_a_whole_chunk_of_the_gpu_is_kept(gpu):
    x = torch.arange(2048.0)
    _assert_cpu_result(gpu, torch.stack([x, torch.zeros(2048), x + 1, torch.ones(2048)], 1), -x)


@pytest.mark.parametrize("n", [4095, 4096, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_about_the_sorts_of_the_gpu(gpu, n, dtype, generator):
    """Most scores are NaN, which leaves little to compare."""
    boxes, scores = detector_candidates(n, generator)
    scores[torch.rand(n, generator=generator) < 0.95] = math.nan
    _assert_cpu_result(gpu, boxes.to(dtype), scores.to(dtype))


def test_a_large_class_among_small_ones(gpu, generator):
    """It takes three chunks of the GPU, the others one."""
    boxes, scores = detector_candidates(4500, generator)
    idxs = torch.randint(-60, 60, (4500,), generator=generator)
    idxs[torch.randperm(4500, generator=generator)[:4200]] = 7
    scores[torch.rand(4500, generator=generator) < 0.4] = math.nan
    _assert_cpu_result(gpu, boxes, scores, idxs)


def test_more_classes_than_blocks(gpu, generator):
    boxes, scores = detector_candidates(4200, generator)
    idxs = torch.randint(600, (4200,), generator=generator) * 2**40
    _assert_cpu_result(gpu, boxes, scores, idxs)


@pytest.mark.slow
def test_more_boxes_than_a_bitmask_could_hold(device, generator):
    boxes, scores = detector_candidates(100_000, generator, per_object=1000)
    keep = ops.nms(boxes.to(device), scores.to(device), 0.3)
    assert torch.equal(keep.cpu(), reference.nms(boxes, scores, 0.3))


def _far_outliers(boxes):
    boxes[7] += 1e6
    boxes[8], boxes[9] = boxes[8] - 1e30, boxes[9] * torch.tensor([1e5, -1e5, 1e5, -1e5])


def _huge_boxes(boxes):
    boxes[::100] = torch.tensor([-1e6, -1e6, 1e6, 1e6])
    boxes[5:7] = torch.tensor([[-1e18, -1e18, 1e18, 1e18], [-3e38, -3e38, 3e38, 3e38]])


def _no_numbers(boxes):
    boxes[::10, 0], boxes[1::10, 3], boxes[2::10, 1] = math.nan, math.inf, -math.inf
    boxes[3::50] = math.nan


def _two_clusters(boxes):
    boxes[len(boxes) // 2 :] += 1e3


def _line(boxes):
    boxes[:, 1], boxes[:, 3] = 0.5, 0.5001
    boxes[:, 0] *= 100
    boxes[:, 2] += boxes[:, 0] * 0.99


def _points(boxes):
    boxes[:, 2:] = boxes[:, :2]
    boxes[::3] = torch.tensor([0.2, 0.2, 0.3, 0.3])


def _all_nan(boxes):
    boxes[:] = math.nan


@pytest.mark.parametrize(
    "change",
    [_far_outliers, _huge_boxes, _no_numbers, _two_clusters, _line, _points, _all_nan],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("scores_of", ["random", "equal"])
def test_boxes_that_are_hard_to_lay_out_in_cells(change, scores_of, generator):
    boxes = random_boxes(2400, generator, high=0.06)
    change(boxes)
    scores = torch.rand(2400, generator=generator) if scores_of == "random" else torch.ones(2400)
    order = scores.argsort(descending=True, stable=True)
    suppressed = (reference.box_iou(boxes[order], boxes[order]) > 0.4).triu(1).numpy()
    is_kept = torch.ones(2400, dtype=torch.bool).numpy()
    for i in range(2400):
        if is_kept[i]:
            is_kept &= ~suppressed[i]
    assert torch.equal(ops.nms(boxes, scores, 0.4), order[torch.from_numpy(is_kept)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_that_share_groups_give_what_each_group_gives(threads, dtype, generator):
    """Enough pairs of boxes for three threads; groups of any size, an empty one among them."""
    boxes, scores = random_boxes(12000, generator, high=0.2).to(dtype), torch.rand(12000, generator=generator).to(dtype)
    idxs = torch.tensor([3, 5, 6])[torch.randint(3, (12000,), generator=generator)]
    idxs[:30] = torch.arange(10, 40)
    scores[::50] = math.nan
    members = [(idxs == i).nonzero()[:, 0] for i in idxs.unique()]
    kept = torch.cat([m[ops.nms(boxes[m], scores[m], 0.5)] for m in members]).sort().values
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(ops.batched_nms(boxes, scores, idxs, 0.5), kept)


@pytest.mark.slow
def test_cells_of_boxes_change_nothing(generator):
    """Sizes over six decades, clusters, and boxes far outside the rest."""
    boxes, scores = detector_candidates(8000, generator)
    scale = 10.0 ** torch.randint(-3, 4, (8000, 1), generator=generator)
    boxes = boxes * scale
    boxes[::97] += 1e6
    boxes[5, 0], boxes[6, 3], boxes[7] = math.nan, math.inf, -boxes[7]
    for threshold in (0.0, 0.3, 0.9):
        assert torch.equal(ops.nms(boxes, scores, threshold), reference.nms(boxes, scores, threshold))
        idxs = (torch.arange(8000) % 5 == 0).long()
        expected = reference.batched_nms(boxes, scores, idxs, threshold)
        assert torch.equal(ops.batched_nms(boxes, scores, idxs, threshold), expected)
