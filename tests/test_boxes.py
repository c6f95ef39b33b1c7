"""What encode, decode and box_iou do beyond the generic suite."""

import itertools
import math

import pytest
import torch

from opinfo.spec import FLOATS
from ssd_ext import ops


def ulps(result, exact):
    """The largest error in units of the last place of the result's dtype, where that is a normal number."""
    rounded = exact.to(result.dtype)
    spacing = torch.nextafter(rounded.abs(), torch.full_like(rounded, math.inf)).double() - rounded.abs().double()
    normal = torch.isfinite(rounded) & (rounded.abs() >= torch.finfo(result.dtype).tiny)
    return ((result.double() - exact).abs() / spacing)[normal].max().item()


def exp_by_decode(x):
    """exp(x): the width of a unit prior scaled by e^x, with x1 = 0.5 - e^x / 2, so x2 - 0.5 is half of it."""
    deltas = torch.zeros(len(x), 1, 4, dtype=x.dtype, device=x.device)
    deltas[:, 0, 2] = x
    prior = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=x.dtype, device=x.device)
    return ops.decode(deltas, prior, variances=(1.0, 1.0), bbox_xform_clip=math.inf)[:, 0, 2] * 2


def log_by_encode(x):
    boxes = torch.zeros(len(x), 1, 4, dtype=x.dtype, device=x.device)
    boxes[:, 0, 2], boxes[:, 0, 3] = x, 1
    prior = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=x.dtype, device=x.device)
    return ops.encode(boxes, prior, variances=(1.0, 1.0))[:, 0, 2]


@pytest.mark.parametrize(
    ("dtype", "low", "high", "allowed"), [(torch.float32, -104, 89, 2), (torch.float64, -700, 709, 1)]
)
def test_exp_is_within_two_ulp(dtype, low, high, allowed, device):
    x = torch.linspace(low, high, 1_000_003, dtype=dtype, device=device)
    assert ulps(exp_by_decode(x), x.double().exp()) <= allowed


def test_log_is_within_two_ulp(device):
    everywhere = torch.linspace(-103, 88, 1_000_003, dtype=torch.float64, device=device).exp().float()
    near_one = torch.linspace(0.5, 2, 1_000_003, device=device)
    for x in (everywhere, near_one):
        assert ulps(log_by_encode(x), x.double().log()) <= 2
    x = torch.linspace(1e-9, 4, 1_000_003, dtype=torch.float64, device=device)
    assert ulps(log_by_encode(x), x.log()) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_and_log_at_the_ends(dtype, device):
    inf, nan = math.inf, math.nan
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1e4, -1e4], dtype=dtype, device=device)
    expected = torch.tensor([nan, inf, 0, 1, 1, inf, 0], dtype=dtype)
    torch.testing.assert_close(exp_by_decode(x).cpu(), expected, rtol=0, atol=0, equal_nan=True)
    x = torch.tensor([nan, inf, 0.0, -1.0, 1.0, tiny, tiny / 8], dtype=dtype, device=device)
    torch.testing.assert_close(log_by_encode(x).cpu(), x.cpu().log(), rtol=1e-6, atol=0, equal_nan=True)


def test_encode_and_decode_are_inverse(generator):
    priors = torch.rand(200, 4, generator=generator) + 0.1
    deltas = torch.randn(3, 200, 4, generator=generator)
    torch.testing.assert_close(ops.encode(ops.decode(deltas, priors), priors), deltas, rtol=1e-4, atol=1e-4)


def test_clip_bounds_the_size():
    priors = torch.tensor([[0.5, 0.5, 0.1, 0.1]])
    deltas = torch.tensor([[0.0, 0.0, 500.0, 500.0]])
    size = ops.decode(deltas, priors)[0, 2:] - ops.decode(deltas, priors)[0, :2]
    torch.testing.assert_close(size, torch.full((2,), 0.1 * 1000 / 16))
    assert torch.isinf(ops.decode(deltas * 10, priors, bbox_xform_clip=math.inf)).any()


@pytest.mark.parametrize("op", [ops.encode, ops.decode])
def test_any_mix_of_dtypes_is_computed_as_wide_as_it_promotes_to(op, device, generator):
    priors = torch.rand(50, 4, generator=generator, dtype=torch.float64) + 0.1
    rows = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64).sort().values
    for dtypes in itertools.product(FLOATS, FLOATS):
        r, p = rows.to(device, dtypes[0]), priors.to(device, dtypes[1])
        promoted = torch.promote_types(*dtypes)
        computed = torch.promote_types(promoted, torch.float32)
        result = op(r, p)
        assert result.dtype == promoted
        assert torch.equal(result, op(r.to(computed), p.to(computed)).to(promoted))


def test_priors_in_float32_beside_deltas_in_half_lose_nothing(device):
    priors = torch.tensor([[1331.0, 777.0, 3.0, 5.0]], device=device)  # 1328, 776 in bfloat16
    deltas = torch.zeros(1, 1, 4, dtype=torch.bfloat16, device=device)
    assert ops.decode(deltas, priors).tolist() == [[[1329.5, 774.5, 1332.5, 779.5]]]
    boxes = torch.tensor([[[1320.0, 772.0, 1336.0, 784.0]]], dtype=torch.bfloat16, device=device)
    expected = [-10.0, 2.0, 5 * math.log(16 / 3), 5 * math.log(12 / 5)]
    assert ops.encode(boxes, priors).flatten().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("op", [ops.encode, ops.decode])
def test_gradients_of_mixed_dtypes(op, device, generator):
    """Of the dtype of the input that they are of, and computed as wide as the op computes."""
    priors = torch.rand(9, 4, generator=generator, dtype=torch.float64).to(device) + 0.1
    rows = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64).sort().values.to(device)
    for dtypes in itertools.product(FLOATS, FLOATS):
        computed = torch.promote_types(torch.promote_types(*dtypes), torch.float32)
        leaf, p = rows.to(dtypes[0]).requires_grad_(), priors.to(dtypes[1])
        wide = leaf.detach().to(computed).requires_grad_()
        (gradient,) = torch.autograd.grad(op(leaf, p).sum(), leaf)
        (expected,) = torch.autograd.grad(op(wide, p.to(computed)).sum(), wide)
        assert gradient.dtype == dtypes[0]
        assert torch.equal(gradient, expected.to(dtypes[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", [ops.encode, ops.decode])
def test_gradients_in_half_are_computed_in_float32(op, dtype, device):
    rows = torch.tensor([[0.0, 0.0, 1e-3, 1e-3], [0.0, 0.0, 20.7, 20.6]], dtype=dtype, device=device)
    priors = torch.tensor([[0.0, 0.0, 1e-3, 1e-3], [0.5, 0.5, 0.2, 0.2]], dtype=dtype, device=device)
    gradients = []
    for cast in (dtype, torch.float32):
        leaf = rows.to(cast).detach().requires_grad_()
        out = op(leaf, priors.to(cast))
        out.backward(torch.full_like(out, 100))
        gradients.append(leaf.grad.to(dtype))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("op", [ops.encode, ops.decode])
def test_priors_have_no_gradient(op):
    rows = torch.rand(2, 3, 4).sort(-1).values.requires_grad_()
    priors = (torch.rand(3, 4) + 0.1).requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient for priors"):
        op(rows, priors).sum().backward()


def test_iou_has_no_gradient():
    a = torch.rand(3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="box_iou is not differentiable: use a loss"):
        ops.box_iou(a, torch.rand(2, 4)).sum().backward()


def test_iou_of_boxes_too_large_for_their_dtype_is_zero(device):
    boxes = torch.tensor([[-3e38, -3e38, 3e38, 3e38], [0, 0, 1, 1]], device=device)
    assert torch.equal(ops.box_iou(boxes, boxes).cpu(), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize(
    ("dtype", "side", "with_itself", "with_half"),
    [
        (torch.float32, 1e38, 0.0, 0.0),
        (torch.float32, 1.85e19, 0.0, 0.0),  # its area is infinite
        (torch.float32, 1.84e19, 0.0, 0.0),  # its area and half of that have an infinite sum
        (torch.float32, 1.31e19, 0.0, 0.5),  # twice its area is infinite
        (torch.float32, 1.3e19, 1.0, 0.5),
        (torch.float32, 1.2e-19, 1.0, 0.5),
        (torch.float32, 4e-23, 1.0, 1.0),  # both areas round to the least number there is
        (torch.float32, 2.6e-23, 0.0, 0.0),  # its area rounds to 0
        (torch.float64, 1.35e154, 0.0, 0.0),
        (torch.float64, 1.3e154, 0.0, 0.0),
        (torch.float64, 9.5e153, 0.0, 0.5),
        (torch.float64, 9.4e153, 1.0, 0.5),
        (torch.float64, 1.6e-154, 1.0, 0.5),
        (torch.float64, 1.5e-162, 0.0, 0.0),
        (torch.bfloat16, 1.31e19, 0.0, 0.5),
        (torch.bfloat16, 2.5e-23, 0.0, 0.0),
        (torch.float16, 60000.0, 1.0, 0.5),
        (torch.float16, 6e-8, 1.0, 1.0),  # float32 holds the areas; half of the least float16 rounds to it or to 0
    ],
)
def test_iou_where_areas_leave_the_range(dtype, side, with_itself, with_half, device):
    whole = torch.tensor([[0, 0, side, side]], dtype=dtype, device=device)
    half = torch.tensor([[0, 0, side / 2, side]], dtype=dtype, device=device)
    assert ops.box_iou(whole, whole).item() == with_itself
    assert ops.box_iou(whole, half).item() == pytest.approx(with_half)
    scores = torch.tensor([0.9, 0.8], dtype=dtype, device=device)
    both = torch.cat([whole, whole])
    assert ops.nms(both, scores, 0.5).tolist() == ([0] if with_itself else [0, 1])
    assert len(ops.soft_nms(both, scores, score_threshold=0.5)[0]) == (1 if with_itself else 2)


def test_coding_has_no_areas(device):
    side = torch.tensor([1e38, 1.85e19, 1e-23, 1e-30], device=device)[:, None]
    boxes = side * torch.tensor([0.0, 0.0, 1.0, 1.0], device=device)
    priors = side * torch.tensor([0.5, 0.5, 1.0, 1.0], device=device)
    assert torch.equal(ops.encode(boxes, priors), torch.zeros_like(boxes))
    assert torch.equal(ops.decode(torch.zeros_like(boxes), priors), boxes)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ((torch.bool, torch.bool), "boxes1 must be float32, float64, float16 or bfloat16, got bool"),
        ((torch.uint16, torch.uint16), "boxes1 must be float32, float64, float16 or bfloat16, got UInt16"),
        ((torch.float16, torch.bfloat16), "boxes2 must have the dtype of boxes1, float16, got bfloat16"),
        ((torch.float64, torch.int64), "boxes2 must have the dtype of boxes1, float64, got int64"),
    ],
)
def test_dtypes_that_are_refused_are_named(dtypes, message):
    a, b = (torch.ones(1, 4).to(dtype) for dtype in dtypes)
    with pytest.raises(ValueError, match=message):
        ops.box_iou(a, b)


@pytest.mark.parametrize("dtypes", [(torch.int16,) * 2, (torch.int64,) * 2, (torch.uint8, torch.int32)])
def test_iou_of_integers_is_torchvisions(dtypes, device):
    tv_ops = pytest.importorskip("torchvision.ops")
    a = torch.tensor([[0, 0, 10, 10], [5, 5, 5, 9], [100, 3, 200, 250]], device=device).to(dtypes[0])
    b = torch.tensor([[0, 0, 10, 10], [5, 5, 15, 15], [0, 0, 250, 250]], device=device).to(dtypes[1])
    found = ops.box_iou(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, tv_ops.box_iou(a.long(), b.long()))
    with pytest.raises(ValueError, match="boxes1 must be float32"):
        ops.box_iou(a, b.float())


def test_iou_of_integers_beyond_floats():
    n = 2**24
    a, b = torch.tensor([[n, 0, n + 3, 1]]), torch.tensor([[n + 1, 0, n + 3, 1]])
    assert ops.box_iou(a, b).item() == pytest.approx(2 / 3)
