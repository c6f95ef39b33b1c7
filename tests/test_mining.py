"""hard_negatives beyond what the generic suite asks of every op."""

import math

import pytest
import torch
from conftest import SIMD_LEVELS
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_ext import ops, reference

VALUES = [0.0, -0.0, 1e-45, 0.5, 0.5, 1.0, 3.0, -1.0, math.inf, -math.inf, math.nan, -math.nan]


@st.composite
def images(draw):
    batch, n = draw(st.integers(0, 3)), draw(st.integers(0, 60))
    count = batch * n
    loss = draw(st.lists(st.sampled_from(VALUES), min_size=count, max_size=count))
    labels = draw(st.lists(st.sampled_from([-2, 0, 0, 0, 0, 1, 80, 2**32, -(2**32)]), min_size=count, max_size=count))
    return {
        "loss": torch.tensor(loss, dtype=draw(st.sampled_from([torch.float32, torch.float64]))).view(batch, n),
        "target_labels": torch.tensor(labels, dtype=torch.int64).view(batch, n),
        "neg_to_pos_ratio": draw(st.sampled_from([0.0, 0.3, 1.0, 3.0, 1e308])),
        "min_negatives": draw(st.sampled_from([0, 1, 7, 30, 2**63 - 1])),
    }


@settings(deadline=None, max_examples=400)
@given(images(), st.sampled_from(SIMD_LEVELS))
def test_equals_reference(image, level):
    from ssd_ext import _C

    before = _C.simd_level()
    _C.set_simd_level(level)
    try:
        assert torch.equal(ops.hard_negatives(**image), reference.hard_negatives(**image))
    finally:
        _C.set_simd_level(before)


def mined(loss, labels, device="cpu", **arguments):
    mask = ops.hard_negatives(torch.tensor([loss], device=device), torch.tensor([labels], device=device), **arguments)
    return mask[0].nonzero().flatten().tolist()


def test_by_hand(device):
    loss, labels = [0.9, 0.1, 0.8, 0.3, 0.7, 0.2], [5, 0, 0, 0, -1, 0]
    assert mined(loss, labels, device) == [2, 3, 5]  # neither the positive nor the ignored one
    assert mined(loss, labels, device, neg_to_pos_ratio=1.9) == [2]
    assert mined(loss, labels, device, neg_to_pos_ratio=0.9) == []
    assert mined(loss, labels, device, neg_to_pos_ratio=0.9, min_negatives=2) == [2, 3]
    assert mined(loss, labels, device, neg_to_pos_ratio=9.0) == [1, 2, 3, 5]


def test_lowest_prior_wins_a_tie(device):
    assert mined([1.0] * 40, [0] * 40, device, min_negatives=3) == [0, 1, 2]
    assert mined([0.5] * 20 + [1.0] + [0.5] * 19, [0] * 40, device, min_negatives=3) == [0, 1, 20]
    assert mined([-0.0, 0.0, -0.0, 0.0], [0] * 4, device, min_negatives=2) == [0, 1]
    assert mined([-math.nan, math.nan, -math.nan], [0] * 3, device, min_negatives=2) == [0, 1]


def test_nan_is_the_largest_loss(device):
    assert mined([math.inf, 1.0, math.nan, -math.inf], [0] * 4, device, min_negatives=1) == [2]
    assert mined([math.inf, 1.0, -math.nan, -math.inf], [0] * 4, device, min_negatives=2) == [0, 2]


def test_denormals_are_ordered(device):
    assert mined([0.0, 1e-45, -1e-45, 3e-45], [0] * 4, device, min_negatives=2) == [1, 3]


def test_labels_beyond_32_bits(device):
    # as a 32-bit word each of these looks like a 0, or has another sign
    labels = [2**32, 0, -(2**32), 2**31, -(2**31) - 1, 0, 2**63 - 1, -(2**63)]
    assert mined([1.0] * 8, labels, device, neg_to_pos_ratio=0.4) == [1]  # of three positives


@pytest.mark.parametrize("n", [1, 15, 16, 17, 10_240, 10_241, 100_000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_every_bit_of_the_key_decides(n, share, device, generator):
    bits = torch.randint(-(2**31), 2**31 - 1, (2, n), generator=generator).int()
    loss = bits.view(torch.float32).to(device)
    labels = torch.zeros(2, n, dtype=torch.int64, device=device)
    wanted = int(share * n)
    mask = ops.hard_negatives(loss, labels, min_negatives=wanted)
    assert mask.sum(1).tolist() == [wanted] * 2
    # On the CPU: a GPU's sort need not put a NaN with the sign bit first.
    assert torch.equal(mask.cpu(), reference.hard_negatives(loss.cpu(), labels.cpu(), min_negatives=wanted))


@pytest.mark.slow  # for the emulator: a thousand threads for each of a million images
def test_a_million_images(device):
    labels = torch.tensor([[1, 0, 0], [0, 0, 0]], device=device).repeat(550_000, 1)
    mask = ops.hard_negatives(torch.zeros(labels.shape, device=device), labels, neg_to_pos_ratio=1.0)
    assert torch.equal(mask, torch.tensor([[False, True, False], [False] * 3], device=device).repeat(550_000, 1))


@pytest.mark.parametrize("last_bit", range(52))
def test_float64_is_not_rounded(last_bit, device):
    larger = 1.0 + 2.0 ** -(last_bit + 1)
    loss = torch.tensor([[1.0, larger, 1.0]], dtype=torch.float64, device=device)
    mask = ops.hard_negatives(loss, torch.zeros(1, 3, dtype=torch.int64, device=device), min_negatives=1)
    assert mask.tolist() == [[False, True, False]]


def test_the_loss_may_require_grad(device):
    logits = torch.randn(2, 9, 3, device=device, requires_grad=True)
    labels = torch.tensor([[0] * 8 + [1]] * 2, device=device)
    loss = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    mask = ops.hard_negatives(loss, labels)
    assert not mask.requires_grad
    loss[mask | (labels > 0)].sum().backward()
    assert logits.grad.abs().sum(-1).count_nonzero() == 2 * (1 + 3)


def test_more_priors_than_the_kernel_counts_are_refused(gpu):
    def call(loss, labels):
        return ops.hard_negatives(loss.expand(1, 2**32), labels.expand(1, 2**32))

    with pytest.raises(ValueError, match=r"4294967295 priors on CUDA, got \[1, 4294967296\]"):
        gpu(call, {"loss": torch.zeros(1, 1), "labels": torch.zeros(1, 1, dtype=torch.int64)})
