"""The emulator's own nets: each checker must notice its planted fault, and every kernel must have run."""

import re

import pytest
import torch
from conftest import EMULATED, emulated
from test_ops import spread

from opinfo import OPS
from opinfo.spec import FLOATS, convert, map_tensors, tensors_in
from ssd_ext import _C

pytestmark = pytest.mark.skipif(not EMULATED, reason="needs a build with SSD_EXT_EMULATE (see CONTRIBUTING.md)")

FAULTS = _C.emulator.fault_names() if EMULATED else []
BUILD = _C.build_info()
CHECKED = BUILD.get("emulator") == "CHECK"
SANITIZED = "sanitizers" in BUILD

# Noticed in every build, because threads cannot go on. The others take the checks or the sanitizers.
ALWAYS = ("divergent", "warp operation", "the calling lane", "a shuffle", "invalid launch", "dynamic shared memory")
SANITIZER_REPORTS = {
    "out of bounds: behind an input": "AddressSanitizer: heap-buffer-overflow",
    "out of bounds: before an input": "AddressSanitizer: heap-buffer-overflow",
    "out of bounds: behind an output": "AddressSanitizer: heap-buffer-overflow",
    "out of bounds: carved array": "AddressSanitizer: use-after-poison",
    "sanitizer: behind a shared array": "runtime error: index 64 out of bounds|global-buffer-overflow",
    "sanitizer: misaligned": "runtime error: .* misaligned address",
    "sanitizer: overflow": "runtime error: signed integer overflow",
}


def is_seen(fault):
    """In this build, by the emulator itself; "none" is a kernel without a fault."""
    return fault.startswith(("none", *ALWAYS)) or (CHECKED and not fault.startswith("sanitizer"))


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if is_seen(fault)])
@pytest.mark.parametrize("order", EMULATED)
def test_planted_fault_is_reported(fault, order):
    checker = fault.split(":")[0]
    with emulated(order):
        if checker == "none":
            _C.emulator.run_fault(fault)
            return
        with pytest.raises(RuntimeError, match=f"emulator: {checker}"):
            _C.emulator.run_fault(fault)


@pytest.mark.skipif(not SANITIZED, reason="needs a build with SSD_EXT_SANITIZE too")
@pytest.mark.parametrize("fault", SANITIZER_REPORTS)
def test_planted_fault_is_seen_by_a_sanitizer(fault, python):
    run = python("-c", f"from ssd_ext import _C\n_C.emulator.start(0)\n_C.emulator.run_fault({fault!r})")
    assert run.returncode != 0
    assert re.search(SANITIZER_REPORTS[fault], run.stderr), run.stderr


def test_sanitizers_are_asked_for_faults_that_exist():
    assert {fault for fault in FAULTS if fault.startswith("sanitizer")} <= set(SANITIZER_REPORTS) <= set(FAULTS)


def test_emulated_cases_launch_every_kernel(generator):
    def missing(room):
        return sorted(kernel for kernel in kernels - launched if f"::{room}::" in kernel)

    kernels, launched = set(_C.emulator.kernels()), set()
    rooms = {op.name: op.op.__module__.split(".")[-1].removeprefix("_") for op in OPS}
    assert {kernel.split("::")[1] for kernel in kernels} == set(rooms.values())

    def launch(op, given):
        leaves = [given[name].requires_grad_() for name in op.differentiable]
        with emulated(EMULATED[0]):
            outputs = op.op(**given)
            if leaves:
                torch.autograd.grad(sum(t.sum() for t in tensors_in(outputs)), leaves)
        launched.update(_C.emulator.launches())

    for op in OPS:
        room = rooms[op.name]
        made = [(case.make(generator), case.mixes) for case in op.cases if not case.benchmark]
        made.sort(key=lambda case: op.traffic(case[0], ()))
        for inputs, mixes in made:
            for change in (lambda t: t, spread):
                for dtype in (*FLOATS, *mixes):
                    if not (before := missing(room)):
                        break
                    launch(op, map_tensors(convert(inputs, dtype), change))
                    if dtype == FLOATS[0] and not mixes and missing(room) == before:
                        break  # the other types have hardly another kernel
    for room in rooms.values():
        assert missing(room) == []
