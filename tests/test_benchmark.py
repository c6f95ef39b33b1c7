"""benchmarks/run.py: what it measures is checked, what it prints and writes is complete. No timing is asserted."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import measure as measuring
from benchmarks import report, run
from benchmarks.cases import OPS
from benchmarks.cases.inputs import coco_gts
from benchmarks.cases.spec import Case, MissingPeerError
from benchmarks.measure import COMPILED, OURS, REFERENCE, Plan, contenders_of, measure, measure_scaling
from benchmarks.timing import LEAST_TURNS, WAITING, CpuClock, Turn, alternate, settle

ROOT = Path(__file__).resolve().parent.parent
BRIEF = Plan(seconds=0.01, rounds=1)
DECODE = next(op for op in OPS if op.name == "decode")
SMALL = DECODE.cases[0]


def contender(f):
    return lambda inputs: partial(f, **inputs)


def measured(contenders, op=DECODE, case=SMALL, plan=BRIEF):
    result = measure(op, case, contenders, CpuClock(), plan, memory_rate=1e9)
    return result, {row["name"]: row for row in result["contenders"]}


def off_by_a_thousandth(**inputs):
    return DECODE.reference(**inputs) + 1e-3


def test_a_wrong_contender_gets_no_speed():
    result, rows = measured({OURS: contender(DECODE.op), "planted": contender(off_by_a_thousandth)})
    assert rows["planted"].keys() == {"status", "note", "name"}
    assert rows["planted"]["status"] == "wrong"
    assert "off by 0.001" in rows["planted"]["note"]
    assert rows[OURS]["status"] == "timed"
    assert result["best_peer"] is None
    assert "WRONG: output 0 is off by 0.001" in report.op_table("decode", [result])


def test_ours_wrong_gets_no_speed_and_no_ratio():
    result, rows = measured({OURS: contender(off_by_a_thousandth), REFERENCE: contender(DECODE.reference)})
    assert rows[OURS]["status"] == "wrong"
    assert "ratios" not in result
    assert "WRONG" in report.summary([result])


def test_gradients_are_checked_and_timed_where_the_case_says_so():
    def no_gradient_of_a_corner(deltas, priors):
        boxes = DECODE.op(deltas, priors)
        return torch.cat([boxes[..., :3], boxes[..., 3:].detach()], -1)

    case = dataclasses.replace(SMALL, backward=True)
    op = dataclasses.replace(DECODE, peers={"planted": contender(no_gradient_of_a_corner)})
    _, rows = measured(contenders_of(op, case, BRIEF, compiled=False), op, case)
    assert rows[OURS]["status"] == rows[REFERENCE]["status"] == "timed"
    assert rows["planted"]["status"] == "wrong"
    _, rows = measured(contenders_of(op, SMALL, BRIEF, compiled=False), op)
    assert rows["planted"]["status"] == "timed"  # its boxes are right


def test_ours_wrong_sets_the_exit_status(monkeypatch, capsys):
    quick = dataclasses.replace(SMALL, benchmark=True, quick=True)
    monkeypatch.setattr(run, "OPS", [dataclasses.replace(DECODE, op=off_by_a_thousandth, cases=[quick])])
    monkeypatch.setattr(run, "QUICK", BRIEF)
    assert run.main(["--quick", "--no-compile", "--ops", "decode"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_all_are_checked_against_the_reference_in_float64():
    seen = []

    def reference(deltas, priors):
        seen.append((deltas.dtype, priors.dtype))
        return DECODE.reference(deltas, priors)

    op = dataclasses.replace(DECODE, reference=reference)
    _, rows = measured({OURS: contender(DECODE.op)}, op)
    assert seen == [(torch.float64, torch.float64)]
    assert rows[OURS]["status"] == "timed"


def test_whoever_is_missing_or_fails_is_named():
    def missing(inputs):
        raise MissingPeerError("no such library")

    def failing(**inputs):
        raise RuntimeError("out of paper")

    result, rows = measured({OURS: contender(DECODE.op), "absent": missing, "broken": contender(failing)})
    assert rows["absent"] == {"name": "absent", "status": "missing", "note": "no such library"}
    assert rows["broken"] == {"name": "broken", "status": "failed", "note": "RuntimeError: out of paper"}
    table = report.op_table("decode", [result])
    assert "left out: no such library" in table
    assert "FAILED: RuntimeError: out of paper" in table


def test_a_slow_contender_is_called_once():
    calls = []

    def counted(**inputs):
        calls.append(1)
        return DECODE.reference(**inputs)

    plan = dataclasses.replace(BRIEF, slow=0.0)
    _, rows = measured({"slow": contender(counted)}, plan=plan)
    assert rows["slow"]["status"] == "once"
    assert rows["slow"]["samples"] == len(calls) == 1


def test_contenders_are_everybody():
    assert list(contenders_of(DECODE, SMALL, BRIEF)) == [OURS, REFERENCE, COMPILED, *DECODE.peers]
    assert COMPILED not in contenders_of(DECODE, SMALL, BRIEF, compiled=False)
    alone = contenders_of(DECODE, Case("x", SMALL.make, peers=False), BRIEF)
    with pytest.raises(MissingPeerError, match="no such case"):
        alone["torchvision"]({})


def test_compiling_has_a_time_limit(monkeypatch):
    def endless(f, **_):
        def call(**inputs):
            while True:
                pass

        return call

    monkeypatch.setattr(torch, "compile", endless)
    with pytest.raises(MissingPeerError, match="gave up compiling"):
        measuring._compile_reference(DECODE, 0.05, lambda call, inputs: call, {})


def test_contenders_take_turns():
    order = []
    calls = {name: partial(order.append, name) for name in "ab"}

    class OneCall:
        def turn(self, call):
            call()
            return Turn([1.0])

    timings = alternate(calls, OneCall(), seconds=0, rounds=3)
    assert "".join(order) == "abababab"  # the first round warms up
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_disturbed_turns_are_dropped_while_enough_remain():
    calm, disturbed = Turn([1.0], 0.0), Turn([9.0], 2 * WAITING)
    timing = settle([calm, disturbed] * LEAST_TURNS)
    assert (timing.median, timing.dropped, timing.disturbed) == (1.0, LEAST_TURNS, False)
    timing = settle([disturbed] * 9)
    assert (len(timing.seconds), timing.dropped, timing.disturbed) == (LEAST_TURNS, 9 - LEAST_TURNS, True)


def test_scaling_checks_and_times_every_batch():
    rows = measure_scaling(DECODE, CpuClock(), BRIEF, [1, 2])
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(row["status"] == "timed" for row in rows)
    assert report.scaling_table("decode", rows).count("\n") == 3
    rows = measure_scaling(dataclasses.replace(DECODE, op=off_by_a_thousandth), CpuClock(), BRIEF, [1])
    assert rows[0]["status"] == "wrong"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "enocde"], "invalid choice: 'enocde'"),
        (["--threads", "0"], "must be at least 1, got 0"),
        (["--plot", "picture.gif"], "must end in .png or .svg, got picture.gif"),
        (["--json", "no/such/place.json"], "no such directory"),
        (["--scaling", "decode", "--plot", "a.png"], "not with --scaling"),
    ],
)
def test_a_wrong_argument_is_told_before_measuring(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_real_ground_truth():
    boxes, labels = coco_gts(200)  # more than there are: repeated
    assert len(boxes) == len(labels) == 200
    for b, n in zip(boxes, labels, strict=True):
        assert b.shape == (len(n), 4)
        assert len(n) > 0
        assert ((b >= 0) & (b <= 1)).all()
        assert (b[:, 2:] > b[:, :2]).all()
        assert ((n >= 1) & (n <= 80)).all()


def test_script_writes_figures_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    made, picture = tmp_path / "made.json", tmp_path / "picture.png"
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--quick", "--no-compile", "--threads", "1"]
    command += ["--ops", "encode", "--json", made, "--plot", picture]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert max(map(len, run.stdout.splitlines())) <= report.WIDTH
    for word in ("encode", OURS, "x best peer", "Summary", "Conditions: ", "1 thread,"):
        assert word in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")

    figures = json.loads(made.read_text())
    assert figures["conditions"].keys() == {
        *("device", "cpu", "gpu", "threads", "simd", "memory_gb_per_s", "versions", "commit", "date", "quick"),
        "l2_flushed",
    }
    assert figures["conditions"]["threads"] == 1
    assert figures["conditions"]["memory_gb_per_s"] > 0
    (encode,) = (op for op in OPS if op.name == "encode")
    assert [r["case"] for r in figures["results"]] == [case.name for case in encode.cases if case.quick]
    for result in figures["results"]:
        rows = {row["name"]: row for row in result["contenders"]}
        assert rows.keys() == {OURS, REFERENCE, *encode.peers}
        for row in rows.values():
            assert row["status"] in ("timed", "once", "missing")
            assert row["status"] == "missing" or row["median_ms"] > 0
        assert rows[OURS]["status"] == "timed"
        assert result["best_peer"] in rows
        assert result["gb_per_s"] > 0
        assert result["ratios"][REFERENCE] > 0
