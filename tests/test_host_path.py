"""What the ops do on the host is what docs/gpu.md says: a call, an allocation or a copy more is noticed."""

import re

import pytest
import torch

from benchmarks.host_path import Counts, count, ops_to_count
from benchmarks.record import ROOT
from ssd_ext import _C, ops

pytestmark = pytest.mark.skipif("emulator" not in _C.build_info(), reason="needs a build with SSD_EXT_EMULATE")

TABLE = re.findall(r"^\| `(.+)` \|((?: \d+ \|){5})$", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
EXPECTED = {op: Counts(*map(int, numbers.split("|")[:-1])) for op, numbers in TABLE}


@pytest.fixture(scope="module")
def calls():
    return ops_to_count()


@pytest.mark.parametrize("op", EXPECTED)
def test_emulated_op_does_no_more_than_it_must(op, calls):
    assert count(calls[op]) == EXPECTED[op]


def test_every_emulated_op_is_counted(calls):
    assert calls.keys() == EXPECTED.keys()
    assert set(ops.__all__) - {"unpad"} <= calls.keys()


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
