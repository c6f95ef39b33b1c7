"""What the ops do on the host, counted by benchmarks/host_path.py: a call, an allocation or a copy more is noticed."""

import pytest
import torch

from benchmarks.host_path import Counts, count, ops_to_count
from ssd_ext import _C, ops

pytestmark = pytest.mark.skipif("emulator" not in _C.build_info(), reason="needs a build with SSD_EXT_EMULATE")

EXPECTED = {  # calls, outputs, scratch, copies, launches
    "encode": Counts(1, 1, 0, 0, 1),
    "decode": Counts(1, 1, 0, 0, 1),
    "box_iou": Counts(1, 1, 0, 0, 1),
    "detect": Counts(1, 4, 1, 0, 3),
    "match": Counts(6, 1, 2, 1, 2),  # of a list: torch.tensor() makes the offsets, which are copied to the device
    "assign_targets": Counts(6, 2, 2, 1, 2),
    "hard_negatives": Counts(1, 1, 0, 0, 1),
    "multibox_loss": Counts(1, 2, 3, 0, 2),  # the ranks and divisors, which nobody keeps, are scratch too
    "nms": Counts(3, 1, 2, 1, 2),
    "batched_nms": Counts(3, 1, 2, 1, 2),
    "nms_padded": Counts(1, 2, 1, 0, 2),
    "soft_nms": Counts(4, 2, 2, 1, 1),
    "soft_nms_padded": Counts(1, 3, 1, 0, 1),
    "assign_targets, offsets": Counts(1, 2, 1, 0, 2),
    "match, offsets": Counts(1, 1, 1, 0, 2),
    "multibox_loss, training": Counts(1, 4, 1, 0, 2),
    "its backward": Counts(2, 2, 0, 0, 2),
}


@pytest.fixture(scope="module")
def calls():
    return ops_to_count()


@pytest.mark.parametrize("op", EXPECTED)
def test_emulated_op_does_no_more_than_it_must(op, calls):
    assert count(calls[op]) == EXPECTED[op]


def test_every_emulated_op_is_counted(calls):
    assert calls.keys() == EXPECTED.keys()
    assert set(ops.__all__) <= calls.keys()


def test_emulated_op_that_does_more_is_noticed(calls):
    boxes, priors, strided = torch.rand(8, 4), torch.rand(8, 4), torch.rand(4, 8).mT
    kept = []
    planted = {
        lambda: ops.encode(boxes, priors): Counts(1, 1, 0, 0, 1),
        lambda: ops.encode(boxes.clone(), priors): Counts(2, 1, 1, 1, 1),
        lambda: ops.encode(strided, priors): Counts(2, 1, 1, 1, 1),
        lambda: kept.append(torch.empty(4)): Counts(1, 1, 0, 0, 0),
        lambda: ops.encode(ops.encode(boxes, priors), priors): Counts(2, 1, 1, 0, 2),
    }
    for call, expected in planted.items():
        assert count(call) == expected


def test_emulated_kernels_do_not_run_in_a_dry_run():
    boxes = torch.rand(8, 4)
    _C.emulator.start(0, dry_run=True)
    try:
        assert (ops.box_iou(boxes, boxes) == 0).all()  # fresh memory is
        (launched,) = _C.emulator.launches()
    finally:
        _C.emulator.stop()
    assert "::box_iou_kernel" in launched
