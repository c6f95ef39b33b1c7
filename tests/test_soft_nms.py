"""What only soft_nms must do."""

import itertools
import math

import pytest
import torch
from conftest import at_and_beside
from hypothesis import given, settings
from hypothesis import strategies as st

from opinfo.inputs import detector_candidates
from opinfo.soft_nms import SOFT_NMS, SOFT_NMS_PADDED
from opinfo.spec import convert
from ssd_ext import ops, reference

# Two boxes of IoU exactly 1/2 and one apart from both.
BOXES = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [8, 8, 9, 9]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [5, 100, 400])
def test_linear_is_the_reference_to_the_bit(dtype, n, device, generator):
    boxes, scores = (t.to(dtype) for t in detector_candidates(n, generator))
    for iou_threshold, score_threshold in itertools.product((0, 0.3, 1), (-1, 0, 0.05)):
        arguments = {"iou_threshold": iou_threshold, "score_threshold": score_threshold}
        keep, kept_scores = ops.soft_nms(boxes.to(device), scores.to(device), **arguments)
        expected_keep, expected_scores = reference.soft_nms(boxes, scores, **arguments)
        assert torch.equal(keep.cpu(), expected_keep)
        assert torch.equal(kept_scores.cpu(), expected_scores)


def test_by_hand(device):
    boxes, scores = BOXES.to(device), torch.tensor([0.8, 0.6, 0.5], device=device)
    keep, kept_scores = ops.soft_nms(boxes, scores)
    assert keep.tolist() == [0, 2, 1]
    torch.testing.assert_close(kept_scores.cpu(), torch.tensor([0.8, 0.5, 0.3]))
    keep, kept_scores = ops.soft_nms(boxes, scores, method="gaussian", sigma=0.25)
    assert keep.tolist() == [0, 2, 1]
    torch.testing.assert_close(kept_scores.cpu(), torch.tensor([0.8, 0.5, 0.6 * math.exp(-1)]))


def test_linear_decays_strictly_over_the_threshold(device):
    boxes, scores = BOXES[:2].to(device), torch.tensor([0.8, 0.6], device=device)
    assert ops.soft_nms(boxes, scores, iou_threshold=0.5)[1].tolist() == scores.tolist()
    below = math.nextafter(0.5, 0)
    assert ops.soft_nms(boxes.double(), scores.double(), iou_threshold=below)[1].tolist()[1] < 0.5


def test_score_threshold_is_strict(device):
    boxes, scores = BOXES.to(device), torch.tensor([0.5, 0.25, 0.25], device=device)
    assert ops.soft_nms(boxes, scores, score_threshold=0.25)[0].tolist() == [0]
    assert ops.soft_nms(boxes, scores, iou_threshold=1.0, score_threshold=0.2)[0].tolist() == [0, 1, 2]
    assert ops.soft_nms(boxes, scores, score_threshold=0.5)[0].tolist() == []


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_score_threshold_cuts_at_every_score(method, dtype, device, generator):
    boxes, scores = (t.to(device, dtype) for t in detector_candidates(40, generator))
    keep, kept_scores = ops.soft_nms(boxes, scores, score_threshold=0.0, method=method)
    assert len(keep) == 40
    for threshold in at_and_beside(kept_scores[::3]):
        found = ops.soft_nms(boxes, scores, score_threshold=threshold, method=method)
        above = int((kept_scores > threshold).sum())
        assert torch.equal(found[0], keep[:above])
        assert torch.equal(found[1], kept_scores[:above])


@pytest.mark.parametrize("n", [1, 7, 40, 1500])
def test_lowest_index_wins_a_tie(n, device):
    apart = torch.arange(n, device=device)[:, None] * 2.0
    boxes = torch.cat([apart, apart, apart + 1, apart + 1], 1)
    for method in ("linear", "gaussian"):
        keep, _ = ops.soft_nms(boxes, torch.full((n,), 0.5, device=device), method=method)
        assert keep.tolist() == list(range(n))


def test_negative_score_may_rise_over_a_negative_threshold(device):
    scores = torch.tensor([0.5, -0.4, -0.9], device=device)
    keep, kept_scores = ops.soft_nms(BOXES.to(device), scores, score_threshold=-0.3)
    assert keep.tolist() == [0, 1]
    torch.testing.assert_close(kept_scores.cpu(), torch.tensor([0.5, -0.2]))


def test_unusable_boxes_neither_decay_nor_are_decayed(device):
    boxes = torch.tensor([[0.0, 0, 2, 2]]).repeat(5, 1)
    boxes[0, 0], boxes[1, 1], boxes[2, 2], boxes[3, 3] = math.nan, -math.inf, math.inf, math.nan
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    for method in ("linear", "gaussian"):
        keep, kept_scores = ops.soft_nms(boxes.to(device), scores.to(device), method=method)
        assert keep.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(kept_scores.cpu(), scores)


def test_nan_score_is_never_taken(device):
    boxes = BOXES.to(device)
    scores = torch.tensor([math.nan, 0.6, -math.nan], device=device)
    for threshold in (0.001, -math.inf):
        assert ops.soft_nms(boxes, scores, score_threshold=threshold)[0].tolist() == [1]


def test_padded_holds_what_soft_nms_gives(device, generator):
    boxes, scores = (t.to(device) for t in detector_candidates(300, generator))
    for method in ("linear", "gaussian"):
        keep, kept_scores = ops.soft_nms(boxes, scores, score_threshold=0.1, method=method)
        padded_keep, padded_scores, count = ops.soft_nms_padded(boxes, scores, score_threshold=0.1, method=method)
        assert 0 < len(keep) < 300
        assert count == len(keep)
        assert torch.equal(padded_keep[:count], keep)
        assert torch.equal(padded_scores[:count], kept_scores)


def _few_steps(n, generator):
    """Boxes that a dozen of them decay below the threshold; many scores are equal. If n is even, some are too low."""
    kind = torch.randint(12, (n,), generator=generator)
    left = (kind // 2 * 3).float()
    boxes = torch.stack([left, torch.zeros(n), left + 2, 1.0 + kind % 2], 1)  # two kinds of IoU 1/2, six times
    scores = torch.randint(1 if n % 2 else -2, 40, (n,), generator=generator) / 40
    return {"boxes": boxes, "scores": scores, "iou_threshold": 0.25, "sigma": 0.1, "score_threshold": 0.01}


# The CUDA kernel: 32 lanes, 512 threads, 4 candidates of a thread in registers or 16, the others in memory.
@pytest.mark.parametrize("n", [31, 32, 33, 511, 512, 513, 1025, 2047, 2048, 2049, 3073, 8191, 8192, 8193, 9217])
@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_gives_the_cpu_result_at_every_size(n, method, dtype, gpu, generator):
    inputs = {**convert(_few_steps(n, generator), dtype), "method": method}
    inputs["scores"][-1] = 1.0  # the last one is taken first
    result, expected = (gpu(ops.soft_nms_padded, inputs), ops.soft_nms_padded(**inputs))
    assert expected[2] > 3
    assert expected[0][0] == n - 1
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


def test_more_boxes_than_the_kernel_counts_are_refused(gpu):
    def call(boxes, scores):
        return ops.soft_nms_padded(boxes.expand(2**31, 4), scores.expand(2**31))

    with pytest.raises(ValueError, match="at most 2147483647 boxes on CUDA, got 2147483648"):
        gpu(call, {"boxes": torch.zeros(1, 4), "scores": torch.zeros(1)})


def test_a_number_that_is_no_method_is_refused():
    with pytest.raises(ValueError, match=r"method must be 0 \(linear\) or 1 \(gaussian\), got 2"):
        torch.ops.ssd_ext.soft_nms_padded(BOXES, torch.rand(3), 0.5, 0.5, 0.0, 2)


@pytest.mark.parametrize("op", [ops.soft_nms, ops.soft_nms_padded])
def test_gradient_is_refused(op):
    scores = torch.rand(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="is not differentiable"):
        op(BOXES, scores)[1].sum().backward()


hostile = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, 1e30, -1e30, math.inf, -math.inf, math.nan])
number = st.one_of(hostile, st.floats(-2, 2, width=32))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(number, number, number, number, number), max_size=20),
    score_threshold=st.one_of(st.floats(-1, 1), st.sampled_from([-math.inf, math.inf])),
    iou_threshold=st.floats(0, 1),
)
def test_any_values_agree_with_the_reference(rows, score_threshold, iou_threshold):
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    arguments = {"iou_threshold": iou_threshold, "score_threshold": score_threshold}
    result = ops.soft_nms(table[:, :4], table[:, 4], **arguments)
    expected = reference.soft_nms(table[:, :4], table[:, 4], **arguments)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


def test_dynamic_shapes_compile_once(generator):
    torch._dynamo.reset()
    compiled = torch.compile(ops.soft_nms_padded, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (10, 30, 31):
        boxes, scores = detector_candidates(n, generator)
        for a, b in zip(compiled(boxes, scores), ops.soft_nms_padded(boxes, scores), strict=True):
            assert torch.equal(a, b)


def test_the_check_notices_wrong_results(generator):
    boxes, scores = detector_candidates(50, generator)
    inputs = {"boxes": boxes, "scores": scores}
    keep, kept_scores = ops.soft_nms(**inputs)
    expected = reference.soft_nms(boxes.double(), scores.double())
    assert SOFT_NMS.mismatch(inputs, (keep, kept_scores), expected) is None
    swapped = torch.arange(len(keep))
    swapped[[3, 4]] = swapped[[4, 3]]
    for wrong in (
        (keep[swapped], kept_scores[swapped]),
        (keep[:-1], kept_scores[:-1]),
        (keep.flip(0), kept_scores),
        (keep, kept_scores * 1.01),
        (torch.cat([keep, keep[:1]]), torch.cat([kept_scores, kept_scores[:1]])),
    ):
        assert SOFT_NMS.mismatch(inputs, wrong, expected) is not None

    equal = {"boxes": BOXES[[0, 2]], "scores": torch.full((2,), 0.5)}
    expected = reference.soft_nms(equal["boxes"].double(), equal["scores"].double())
    assert SOFT_NMS.mismatch(equal, (torch.tensor([1, 0]), equal["scores"]), expected) is not None

    keep, kept_scores, count = ops.soft_nms_padded(**inputs, score_threshold=0.3)
    inputs["score_threshold"] = 0.3
    expected = reference.soft_nms_padded(boxes.double(), scores.double(), score_threshold=0.3)
    assert SOFT_NMS_PADDED.mismatch(inputs, (keep, kept_scores, count), expected) is None
    assert SOFT_NMS_PADDED.mismatch(inputs, (keep.clamp(min=0), kept_scores, count), expected) is not None
    assert SOFT_NMS_PADDED.mismatch(inputs, (keep, kept_scores, count - 1), expected) is not None
