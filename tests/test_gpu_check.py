"""tests/gpu_check/check.sh: what it concludes from what others print. That it runs, .ci/run shows by a dry run."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from benchmarks import record
from gpu_check import check as gpu_check
from gpu_check import gpu_profile, jobs, kernel_calls, machine, ncu, sanitizer
from gpu_check.check import Check, Outcome, exit_status, table
from gpu_check.jobs import Job, nothing, run
from gpu_check.machine import lacking
from opinfo import OPS

CALLS = "812 of 812 calls, 0 failed\n"
REPORTS = {
    "memcheck": """\
========= Invalid __global__ write of size 4 bytes
=========     at {}(float *, long)+0x50 in x.cu:12
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f5ddde00fa0 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f5ddde00000 of size 4,000 bytes
=========
""",
    "racecheck": """\
========= Error: Race reported between Write access at {0}(float *, long)+0x90 in x.cu:20
=========     and Read access at {0}(float *, long)+0xa0 in x.cu:21 [2048 hazards]
=========
""",
    "initcheck": """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at {}(float *, long)+0x70 in x.cu:14
=========     by thread (31,0,0) in block (0,0,0)
=========     Access to 0x7f3c7ec000fc
=========
""",
    "synccheck": """\
========= Barrier error detected. Divergent thread(s) in block.
=========     at {}(float *, long)+0xb0 in x.cu:30
=========     by thread (0,0,0) in block (0,0,0)
=========
""",
}
HOST = """\
========= Host API uninitialized memory access
=========     Uninitialized access to 0x7f3c7ec00000 on access by cudaMemcpy source
=========
"""
OURS = "void ssd_ext::nms::<unnamed>::chunk_kernel<float>"


def output(tool, *kernels, calls=CALLS, more="", count=None):
    """What ``tool`` prints where each of ``kernels`` errs once."""
    count = len(kernels) + bool(more) if count is None else count
    told = f"{count} error{'s' * (count != 1)}"
    end = f"RACECHECK SUMMARY: {count} hazards displayed ({told}, 0 warnings)" if tool == "racecheck" else ""
    end = end or f"ERROR SUMMARY: {told}"
    found = "".join(REPORTS[tool].format(kernel) for kernel in kernels)
    return f"$ compute-sanitizer\n========= COMPUTE-SANITIZER\n{calls}{found}{more}========= {end}\n"


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_a_tool_is_clean_where_it_reports_its_planted_fault_alone(tool):
    planted = f"ssd_ext::planted::{tool}"
    found = sanitizer.judge(output(tool, planted), 0)
    counts = {"calls": 812, "total": 812, "failed": 0, "in": None, "planted": 1, "ours": 0, "others": 0}
    assert found == {"verdict": "clean", **counts}
    # torch's own kernels are not ours to judge
    found = sanitizer.judge(output(tool, "void at::native::radixSort<int>", planted), 0)
    assert (found["verdict"], found["others"]) == ("clean", 1)


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_a_report_of_ours_or_silence_is_not_clean(tool):
    planted = f"ssd_ext::planted::{tool}"
    assert sanitizer.judge(output(tool, OURS, OURS, planted), 0)["verdict"] == "2 reports of ours, 0 calls failed"
    assert sanitizer.judge(output(tool, OURS, planted, calls=""), None)["verdict"].startswith("1 reports of ours")
    assert sanitizer.judge(output(tool), 0)["verdict"] == "did not notice the planted fault"
    assert sanitizer.judge(output(tool, planted, count=7), 0)["verdict"].startswith("6 reports that")


def test_an_output_that_no_kernel_wrote_is_ours():
    text = output("initcheck", "ssd_ext::planted::initcheck", more=HOST)
    assert sanitizer.judge(text, 0)["verdict"] == "1 reports of ours, 0 calls failed"


BEGUN = "call 1 of 812: nms, ties, torch.half\ncall 2 of 812: nms, large, torch.half\n"


@pytest.mark.parametrize(
    ("calls", "status", "verdict", "unfinished"),
    [
        ("812 of 812 calls, 3 failed\n", 0, "0 reports of ours, 3 calls failed", None),
        ("90 of 812 calls, 0 failed\n", 0, "timed out", None),
        ("0 of 812 calls, 0 failed\n", 0, "timed out", None),
        ("", None, "timed out", None),
        (BEGUN, None, "timed out", "nms, large, torch.half"),
        (BEGUN, -11, "ended by itself, exit status -11", "nms, large, torch.half"),
        ("FAILED: nms\n" + BEGUN, -11, "0 reports of ours, 1 calls failed", "nms, large, torch.half"),
        (BEGUN + "2 of 812 calls, 2 failed\n", 0, sanitizer.BROKEN, None),
        ("", 255, sanitizer.BROKEN, None),
    ],
)
def test_calls_that_were_not_made_are_told(calls, status, verdict, unfinished):
    text = output("memcheck", "ssd_ext::planted::memcheck", calls=calls)
    found = sanitizer.judge(text, status)
    assert (found["verdict"], found["in"]) == (verdict, unfinished)


def test_every_tool_has_its_options():
    for tool in sanitizer.TOOLS:
        options = sanitizer.options(tool)
        assert f"--tool={tool}" in options
        # initcheck must see what torch's kernels write
        assert any(option.startswith("--kernel-name") for option in options) == (tool != "initcheck")


def test_of_a_tools_lines_those_of_our_kernels_are_shown_once():
    show = sanitizer.of_ours()
    text = output("memcheck", OURS, OURS, "at::native::fill", "ssd_ext::planted::memcheck") + "FAILED: nms, hostile\n"
    shown = [line for line in map(show, text.splitlines()) if line]
    assert shown == [f"at {OURS}(float *, long)+0x50 in x.cu:12", "FAILED: nms, hostile"]


# What Nsight Compute prints with --csv --page=raw: names, units, a line for each launch.
NCU = """\
==PROF== Connected to process 4242
==PROF== Profiling "rank_kernel": 0%....50%....100% - 9 passes
case 3
"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"smsp__issue_active.avg.pct_of_peak_sustained_active","sm__warps_active.avg.per_cycle_active",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio","smsp__pcsamp_warps_issue_stalled_wait"
"","","ns","%","%","warp","inst","inst","inst",""
"0","void ssd_ext::multibox_loss::<unnamed>::rank_kernel<float, (int)16>(const T1 *, long)",\
"98,304","61.25","38.5","41.6","0.5","6.5","1","99"
"1","void ssd_ext::nms::<unnamed>::sweep_kernel(long *)","2048","n/a","3","2","3","1","1","0"
"""


def test_what_nsight_compute_measured_is_a_line_for_each_kernel():
    rank, sweep = ncu.read(NCU)
    assert rank == {
        "kernel": "multibox_loss::rank_kernel<float, 16>",
        **{"us": pytest.approx(98.304), "DRAM %": 61.25, "issue %": 38.5, "warps": 41.6},
        **{"stall": "long_scoreboard", "share": 6.5 / 8},
    }
    assert (sweep["DRAM %"], sweep["stall"], sweep["share"]) == (None, "barrier", 0.6)
    lines = ncu.table([rank, sweep])
    assert lines[1].split() == ["98.3", "61.2", "38.5", "41.6", "long_scoreboard", "81%", *rank["kernel"].split()]
    assert lines[2].split() == ["2.0", "?", "3.0", "2.0", "barrier", "60%", "nms::sweep_kernel"]


def test_stalls_that_were_sampled_are_read_too():
    sampled, none = ncu.read(NCU.replace("average_warps_issue", "other"))
    assert (sampled["stall"], sampled["share"]) == ("wait", 1)
    assert none["share"] is None


def test_kernels_of_one_template_are_told_apart():
    name = "void ssd_ext::soft_nms::<unnamed>::soft_nms_kernel<float, (ssd_ext::soft_nms::Method)0, (int)-4>(T1 *)"
    assert ncu.short(name) == "soft_nms::soft_nms_kernel<float, 0, -4>"


@pytest.mark.parametrize("text", ["", "==ERROR== ERR_NVGPUCTRPERM\n", NCU[: NCU.index('"0","void')]])
def test_nsight_compute_may_measure_nothing(text):
    assert ncu.read(text) == []


def test_of_each_kernel_the_median_is_told():
    rank = "void ssd_ext::multibox_loss::(anonymous namespace)::rank_kernel<float>(float const*, long)"
    events = [(rank, 7.0), ("Memset (Device)", 1.0), (rank, 9.0), (rank, 80.0)]
    found = gpu_profile.kernel_times(events, calls=2)
    assert found == {
        "multibox_loss::rank_kernel<float>": {"us": 9.0, "launches": 1.5},
        "Memset": {"us": 1.0, "launches": 0.5},
    }
    row = {"op": "multibox_loss", "case": "B=1", "gradients": True, "host_us": 40.4, "replay_us": 20.0}
    first, *kernels = gpu_profile.lines({**row, "kernels": found}, known={"Memset"})
    assert first == "multibox_loss, B=1, and gradients: kernels 14.0, replay 20.0, host 40 us"
    assert [line.split() for line in kernels] == [["9.0", "x", "1.5", "multibox_loss::rank_kernel<float>"]]


def test_what_is_profiled_and_timed_exists():
    for names in gpu_profile.CASES:
        op, case = gpu_profile.find(*names)
        assert case.benchmark
    for name, cases in gpu_check.BENCHMARK.items():
        (op,) = (op for op in OPS if op.name == name)
        assert set(cases) <= {case.name for case in op.cases if case.benchmark}


def test_kernels_of_the_gradients_and_of_a_real_size_are_called(monkeypatch, capsys):
    every = list(kernel_calls.calls())
    assert {dtype for *_, dtype in every if isinstance(dtype, torch.dtype)} == {torch.float32, torch.float64}
    assert {op.name for op, case, dtype in every if dtype in case.mixes} == {"encode", "decode", "detect"}
    assert {op.name for op, case, _ in every if case.name == "full size"} == {"multibox_loss", "detect"}
    (op,) = (op for op in OPS if op.name == "decode")

    def no_gradient(deltas, priors):
        return op.op(deltas.detach(), priors)

    broken = dataclasses.replace(op, op=no_gradient, cases=op.cases[:2])
    monkeypatch.setattr(kernel_calls, "OPS", [broken])
    assert kernel_calls.call_all("cpu", 60) == (4, 4, 4)
    said = capsys.readouterr().out
    assert said.startswith(f"call 1 of 4: decode, {op.cases[0].name}, torch.float32\nFAILED: decode, ")
    monkeypatch.setattr(kernel_calls, "OPS", [dataclasses.replace(broken, op=op.op)])
    assert kernel_calls.call_all("cpu", 60) == (4, 4, 0)


def test_a_device_that_is_lost_is_asked_nothing_more(monkeypatch, capsys):
    (op,) = (op for op in OPS if op.name == "decode")

    def break_device(*_, **__):
        monkeypatch.setattr(torch, "zeros", break_device)
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(kernel_calls, "OPS", [dataclasses.replace(op, op=break_device, cases=op.cases[:2])])
    assert kernel_calls.call_all("cpu", 60) == (1, 4, 1)
    assert kernel_calls.is_lost("cpu")


def test_an_op_that_hangs_ends_its_process(python):
    code = """
import sys, time
from gpu_check import kernel_calls
kernel_calls.torch.zeros = lambda *_, **__: None
kernel_calls.HANGS, kernel_calls.compare = 1, lambda *_: time.sleep(60)
sys.exit(kernel_calls.compare_all("cuda", None))
"""
    hung = python("-c", code)
    assert hung.returncode == 1
    assert hung.stdout.endswith(f"\n{OPS[0].name}: ")
    assert hung.stderr.startswith("Timeout (0:00:01)!\n")


def test_bits_that_differ_are_told(monkeypatch, capsys):
    (op,) = (op for op in OPS if op.name == "decode")
    calls = []

    def unsteady(deltas, priors):
        calls.append(1)
        return op.op(deltas, priors) * (1 + 1e-6 * (len(calls) == 2))

    def raising(**_):
        raise RuntimeError("CUDA error:\nan illegal memory access")

    planted = [dataclasses.replace(op, name="a", op=unsteady), dataclasses.replace(op, name="b", op=raising), op]
    monkeypatch.setattr(kernel_calls, "OPS", planted)
    assert kernel_calls.compare_all("cpu", after=None) == 0  # the CPU is not lost
    names, a, b, decode = capsys.readouterr().out.splitlines()
    assert names == "ops: a b decode"
    assert a.startswith(f"a: BITS DIFFER, {op.cases[0].name}, torch.float32, output 0: ")
    assert a.endswith(" in the GPU's")
    assert b == "b: RuntimeError: CUDA error: an illegal memory access"
    assert decode == "decode: OK"
    kernel_calls.compare_all("cpu", after="b")
    assert capsys.readouterr().out.splitlines()[1:] == ["decode: OK"]


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        (["passed", "passed"], 0),
        (["passed", "skipped"], 3),
        (["skipped", "timed out", "passed"], 1),
        (["failed", "skipped"], 1),
    ],
)
def test_exit_status_is_that_of_the_worst(verdicts, status):
    assert exit_status(verdicts) == status


def test_what_is_missing_is_one_sentence():
    assert lacking("pytest>=8") == []
    (sentence,) = lacking("pytest>=9999.1")
    assert sentence.startswith("needs pytest>=9999.1, found ")
    assert "install 'pytest>=9999.1', from a wheel" in sentence
    (sentence,) = lacking("no_such_package>=1")
    assert "found none" in sentence


def test_a_program_missing_from_the_toolkit_is_named(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda *_, **__: None)
    assert lacking("nvcc") == ["no nvcc: install the CUDA toolkit or set CUDA_HOME"]


def test_a_torch_that_does_not_import_ends_the_check(monkeypatch):
    monkeypatch.setattr(machine, "FACTS", "raise ImportError('no libcudart')")
    with pytest.raises(SystemExit, match="no libcudart"):
        machine.conditions(False, 60)
    monkeypatch.setattr(machine, "FACTS", "import time; time.sleep(60)")
    with pytest.raises(SystemExit, match="importing torch takes more than 1 s"):
        machine.conditions(False, 1)


# ---- running -------------------------------------------------------------------------------------


def alive(number):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_job_that_runs_too_long_is_ended_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "GRACE", 1)
    deaf = "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    child = deaf + "print(os.getpid(), flush=True); time.sleep(100)"
    parent = deaf + f"subprocess.run([sys.executable, '-c', {child!r}])"
    slow = Job([sys.executable, "-c", parent])
    quick = Job([sys.executable, "-c", "import sys; sys.exit(7)"])
    run(tmp_path / "log", 5, slow, quick)
    assert (slow.status, quick.status) == (None, 7)
    child_number = int(slow.lines[0])
    for _ in range(50):
        if not alive(child_number):
            break
        time.sleep(0.1)
    assert not alive(child_number)


@pytest.mark.slow
def test_a_job_that_runs_too_long_may_still_report(tmp_path):
    code = """
import time
try:
    print("begins", flush=True)
    time.sleep(100)
except KeyboardInterrupt:
    print("what it has")
"""
    job = Job([sys.executable, "-c", code])
    run(tmp_path / "log", 5, job)
    assert job.status is None
    assert job.lines == ["begins", "what it has"]


def test_output_is_shown_and_kept_as_it_comes(tmp_path, capsys):
    log = tmp_path / "log"
    code = f"import os; print('a'); print(os.path.getsize({str(log)!r})); print('c', end='')"
    chosen = Job([sys.executable, "-c", code], name="one", show=lambda line: line * 2 if line == "a" else None)
    run(log, 60, chosen)
    assert chosen.lines[0] == "a" and chosen.lines[2] == "c"
    assert int(chosen.lines[1]) > 0
    assert capsys.readouterr().out == "one| aa\n"
    assert log.read_text().splitlines()[1:] == [f"one| {line}" for line in chosen.lines]


def test_a_long_log_keeps_both_ends(tmp_path):
    code = f"print('first'); print('.\\n' * {jobs.LOG_BYTES}); print('last')"
    job = Job([sys.executable, "-c", code], show=nothing)
    run(tmp_path / "log", 60, job)
    content = (tmp_path / "log").read_text()
    assert len(content) < jobs.LOG_BYTES + 1000
    assert "\nfirst\n" in content and "\n[...]\n" in content
    assert content.endswith("\nlast\n")
    assert len(job.lines) > jobs.LOG_BYTES


POISON = """
import os, signal, sys, time, types
import pytest

def synchronize():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.parametrize("i", range(60))
def test_a(i):
    time.sleep(0.01)
    assert i != 3
    if i == 5:
        cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
        sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
        synchronize()

def test_b():
    pytest.skip("planted, for --by-function to count")

def test_interrupted():
    os.kill(os.getpid(), signal.SIGINT)
"""


def run_pytest(folder, *options):
    (folder / "test_x.py").write_text(POISON)
    command = [sys.executable, "-m", "pytest", "-q", "--by-function", "--tb=short", "-p", "progress"]
    job = Job([*command, *options, f"--rootdir={folder}", str(folder)], {"PYTHONPATH": str(record.ROOT / "tests")})
    run(folder / "log", 120, job)
    return job


def test_failures_are_named_when_they_come_and_a_poisoned_worker_leaves(tmp_path):
    pytest.importorskip("xdist")
    job = run_pytest(tmp_path, "-n", "2", "-k", "not interrupted")
    assert job.status == 1
    found = gpu_check.outcomes(job.text)
    assert found == {
        "test_x.py::test_a": Counter(passed=58, failed=3),  # the worker's end is one more
        "test_x.py::test_b": Counter(skipped=1),
    }
    came = job.lines[: job.lines.index(next(line for line in job.lines if gpu_check.BY_FUNCTION in line))]
    named = [line for line in came if line.startswith("FAILED ")]
    assert named[0] == "FAILED test_x.py::test_a[3]: assert 3 != 3"
    assert named[1].startswith("FAILED test_x.py::test_a[5]: RuntimeError: CUDA error: an illegal")
    assert "crashed while running 'test_x.py::test_a[5]'" in named[2]


def test_an_interrupted_run_keeps_the_names_of_its_failures(tmp_path):
    job = run_pytest(tmp_path, "-k", "test_a and 3 or interrupted")
    assert job.status == 2
    assert gpu_check.outcomes(job.text)["test_x.py::test_a"]["failed"] == 1
    assert sum(line.startswith("FAILED ") for line in job.lines) == 2  # when it came, and in pytest's summary


# ---- the stages ----------------------------------------------------------------------------------


@pytest.fixture
def check(tmp_path):
    under = {"commit": None, "sources": "0123456789ab", "capability": "9.0"}
    return Check(under, tmp_path, "x", dry_run=False, full=False, end=time.monotonic() + 1000)


@pytest.fixture
def scripted(monkeypatch):
    """A function that says what the next jobs print and end with; it returns the commands that were run."""
    script, commands = [], []

    def run(log, limit, *jobs):
        for job in jobs:
            commands.append(list(map(str, job.command)))
            text, job.status = script.pop(0)
            job.lines += text.splitlines()

    def say(*outputs):
        script[:] = outputs
        return commands

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "lacking", lambda *_: [])
    monkeypatch.setattr(gpu_check, "toolkit_program", lambda name: name)
    return say


def test_after_a_build_that_fails_its_last_lines_end_the_check(
    machine_with_gpu, monkeypatch, scripted, tmp_path, capsys
):
    scripted(("-- configured", 0), ("".join(f"line {i}.\n" for i in range(100)), 2))
    monkeypatch.setattr(gpu_check, "STAGES", {"build": gpu_check.build, "a": pytest.fail})
    monkeypatch.setattr(gpu_check, "LIMITS", {"facts": 1, "build": 1, "a": 1})
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count("line 60.") == said.count("line 99.") == 1
    assert "line 59." not in said
    assert "build: compiling failed, exit status 2" in said
    assert "stops here" in said


def test_smoke_names_what_each_op_did(check, scripted):
    commands = scripted(
        ("ops: a b c d e\na: OK\nb: BITS DIFFER in 1 of 4 elements\nc: RuntimeError: CUDA error\n  at: OK", 1),
        ("ops: a b c d e\nd: ", -11),
        ("ops: a b c d e\ne: OK", 0),
    )
    found = gpu_check.smoke(check)
    assert [command[-2:] for command in commands[1:]] == [["--after", "c"], ["--after", "d"]]
    assert (found.verdict, found.stop, found.counts) == ("failed", False, {"OK": 2, "wrong": 3})
    assert found.notes == [
        "b: BITS DIFFER in 1 of 4 elements",
        "c: RuntimeError: CUDA error",
        "d: ended its process, status -11",
    ]
    assert [line.split() for line in found.table][::4] == [["a:", "OK"], ["e:", "OK"]]


def test_smoke_passes_where_all_are_right_and_stops_where_nothing_works(check, scripted):
    scripted(("ops: a b\na: OK\nb: OK", 0))
    assert gpu_check.smoke(check) == Outcome(
        "passed", {"OK": 2, "wrong": 0}, [], ["a:                OK", "b:                OK"]
    )
    scripted(("ops: a b\na: RuntimeError: no kernel image\nb: RuntimeError: no kernel image", 0))
    found = gpu_check.smoke(check)
    assert (found.verdict, found.stop) == ("failed", True)
    scripted(("ImportError: no _C", 1))
    found = gpu_check.smoke(check)
    assert (found.verdict, found.stop, found.notes) == ("failed", True, ["no op was called"])
    scripted(("ops: a b\na: OK\nb: Traceback (most recent call last):\nKeyboardInterrupt", None))
    found = gpu_check.smoke(check)
    assert (found.verdict, found.stop, found.notes) == ("timed out", False, ["b: did not end in time"])
    scripted(("ops: a b\na: Timeout (0:00:10)!\nThread 0x7f (most recent call first):", 1), ("ops: a b\nb: OK", 0))
    found = gpu_check.smoke(check)
    assert (found.verdict, found.stop, found.notes) == ("failed", False, ["a: Timeout (0:00:10)!"])
    scripted(("", None))  # it may have begun slowly
    assert (gpu_check.smoke(check).verdict, found.stop) == ("timed out", False)


def test_cases_that_there_was_no_time_for_are_named(check, scripted):
    late = "decode, SSD300: host 3 us\nno time for nms, random N=1000 and what follows"
    for stage, verdict in ((gpu_check.profile, "timed out"), (gpu_check.nsight_compute, "timed out")):
        scripted((f"{NCU}{late}", 0))
        found = stage(check)
        assert (found.verdict, found.notes[0]) == (verdict, "no time for nms, random N=1000 and what follows")
    scripted((late, 1))
    assert gpu_check.profile(check).verdict == "failed"


TESTS = """\
....
FAILED tests/test_ops.py::test_cuda_gives_the_cpu_result[cuda-nms]: AssertionError: Tensor-likes are not equal!
======================= outcomes of each test function =======================
tests/test_ops.py::test_cuda_gives_the_cpu_result: 1 failed, 360 passed
tests/test_ops.py::test_captures_in_a_cuda_graph_without_host_sync: 281 passed
tests/test_ops.py::test_gradients_are_finite_differences: 9 passed, 20 skipped
=========================== short test summary info ============================
FAILED tests/test_ops.py::test_cuda_gives_the_cpu_result[cuda-nms] - AssertionError: Tensor-likes: equal
"""


def test_failures_are_named_and_counted_by_function(check, scripted):
    scripted((TESTS, 1))
    found = gpu_check.cuda(check)
    assert found.verdict == "failed"
    assert found.counts == {"failed": 1, "passed": 650, "skipped": 20}
    assert found.notes[0] == "pytest failed, exit status 1"
    assert found.notes[1:] == [TESTS.splitlines()[1]]
    assert found.table[1] == "tests/test_ops.py::test_captures_in_a_cuda_graph_without_host_sync: 281 passed"
    scripted((TESTS, None))
    assert gpu_check.cuda(check).verdict == "failed"  # more than out of time


def test_a_test_that_only_a_gpu_can_run_is_never_skipped(check, scripted):
    right = "\n".join(line for line in TESTS.splitlines() if "FAILED" not in line).replace("1 failed, ", "")
    scripted((right, 0))
    found = gpu_check.cuda(check)
    assert (found.verdict, found.notes) == ("passed", [])
    scripted((right.replace("281 passed", "280 passed, 1 skipped"), 0))
    found = gpu_check.cuda(check)
    assert found.verdict == "failed"
    assert "host_sync: 1 skipped, which must run here" in found.notes[0]
    scripted(("no tests ran", 0))
    assert gpu_check.cuda(check).verdict == "failed"
    scripted((right, None))
    assert gpu_check.cuda(check).verdict == "timed out"


def test_tests_run_without_the_plugins_that_are_missing(check, scripted, monkeypatch):
    commands = scripted((TESTS, 0), (TESTS, 0))
    gpu_check.cuda(check)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda _: None)
    found = gpu_check.cuda(check)
    assert {"-n", "--timeout"} <= set(commands[0]) and not {"-n", "--timeout"} & set(commands[1])
    assert found.notes[:2] == [
        "tests run one by one, for want of pytest-xdist",
        "a test that hangs is not ended, for want of pytest-timeout",
    ]


def test_what_nsight_compute_complains_of_is_named(check, scripted, capsys):
    scripted((NCU, 0))
    found = gpu_check.nsight_compute(check)
    assert (found.verdict, found.counts) == ("passed", {"kernels": 2})
    assert "\n".join(found.table) in capsys.readouterr().out
    scripted(("==ERROR== ERR_NVGPUCTRPERM - no permission\nand so on", 0))
    found = gpu_check.nsight_compute(check)
    notes = ["ncu measured nothing", "==ERROR== ERR_NVGPUCTRPERM - no permission"]
    assert (found.verdict, found.notes) == ("skipped", notes)
    for status, verdict in ((0, "failed"), (None, "timed out")):
        scripted(("", status))
        assert gpu_check.nsight_compute(check).verdict == verdict
    scripted((NCU, None))
    found = gpu_check.nsight_compute(check)
    assert (found.verdict, found.counts) == ("timed out", {"kernels": 2})


def test_the_sanitizers_run_two_by_two(check, scripted, capsys):
    clean = {tool: (output(tool, f"ssd_ext::planted::{tool}"), 0) for tool in sanitizer.TOOLS}
    compiled = ("", 0)
    commands = scripted(compiled, *clean.values())
    found = gpu_check.sanitize(check)
    assert (found.verdict, found.counts, found.notes) == ("passed", {"clean": 4}, [])
    assert [command[1] for command in commands[1:]] == [f"--tool={tool}" for tool in sanitizer.TOOLS]
    assert "racecheck: clean" in capsys.readouterr().out
    clean["racecheck"] = output("racecheck", OURS, "ssd_ext::planted::racecheck"), 0
    scripted(compiled, *clean.values())
    found = gpu_check.sanitize(check)
    assert (found.verdict, found.notes) == ("failed", ["racecheck: 1 reports of ours, 0 calls failed"])
    assert found.more["tools"]["memcheck"]["calls"] == 812
    clean["racecheck"] = output("racecheck", calls=""), 255
    scripted(compiled, *clean.values())
    found = gpu_check.sanitize(check)
    assert (found.verdict, found.counts, found.notes) == ("skipped", {"clean": 3}, [f"racecheck: {sanitizer.BROKEN}"])
    clean["synccheck"] = output("synccheck", calls=BEGUN), None
    scripted(compiled, *clean.values())
    found = gpu_check.sanitize(check)
    assert (found.verdict, found.notes[1]) == ("timed out", "synccheck: timed out, in nms, large, torch.half")


def test_a_benchmark_that_ran_out_of_time_tells_what_it_measured(check, monkeypatch):
    contenders = [{"name": "ssd_ext", "status": "timed", "median_ms": 0.0123}]
    contenders.append({"name": "CUDA graph", "status": "timed", "median_ms": 0.0101})
    result = {"op": "decode", "case": "B=8", "contenders": contenders, "bytes": 1, "gb_per_s": 1500.0}
    result |= {"memory_share": 0.5, "ratios": {"reference": 9.0, "torchvision": 4.2}, "best_peer": "torchvision"}
    made = {"conditions": {"memory_gb_per_s": 3000.0}, "results": [result]}

    def broken_off(log, limit, job):
        assert job.environment == {"SSD_EXT_COMMIT": "sources 0123456789ab"}
        assert "--no-compile" in job.command
        record.write_json(check.file("benchmark.json"), made)

    monkeypatch.setattr(gpu_check, "run", broken_off)
    found = gpu_check.benchmark(check)
    assert (found.verdict, found.counts) == ("timed out", {"cases": 1, "timed": 1, "fastest": 1})
    expected = "decode, B=8: 0.0123 ms, 0.0101 ms in a CUDA graph, 1500 GB/s, 50% of the copy rate, "
    assert found.table[0] == expected + "4.2x as fast as torchvision"
    contenders[1] = {"name": "CUDA graph", "status": "wrong"}
    assert "0.0123 ms, wrong in a CUDA graph, 1500" in gpu_check.benchmark(check).table[0]


# ---- the record ----------------------------------------------------------------------------------


@pytest.fixture
def machine_with_gpu(monkeypatch):
    """Conditions of a machine with a GPU and without git; and stages that only say so."""
    under = {"gpu": "NVIDIA H100 80GB HBM3", "commit": None, "sources": "0123456789ab", "torch": "2.11.0+cu130"}
    under |= {"date": "2026-11-24 10:00", "capability": "9.0"}
    monkeypatch.setattr(gpu_check, "conditions", lambda dry_run, limit: {**under, "dry_run": dry_run})
    stages = {name: lambda check, name=name: Outcome("passed", {"n": 1}, table=[f"of {name}"]) for name in "ab"}
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "LIMITS", {"facts": 1, "a": 1, "b": 1})
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    return under


def test_record_is_written_before_and_after_each_stage(machine_with_gpu, monkeypatch, tmp_path, capsys):
    file = tmp_path / "2026-11-24-nvidia-h100-80gb-hbm3-check.json"
    seen = []

    def stage(check):
        seen.append(json.loads(file.read_text())["stages"])
        raise OSError("out of paper")

    monkeypatch.setitem(gpu_check.STAGES, "b", stage)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert seen[0]["a"]["verdict"] == "passed"
    assert seen[0]["b"]["verdict"] == "running"
    made = json.loads(file.read_text())
    assert made["conditions"] == {**machine_with_gpu, "dry_run": False}
    assert made["stages"]["b"]["verdict"] == "failed"
    said = capsys.readouterr().out
    begins, ends = said.index("---- b: failed"), said.index("\n==== a\nof a\n")
    assert said.index("b: check.py itself: OSError: out of paper") < begins < ends
    assert said.endswith("b: check.py itself: OSError: out of paper\n" + table(made["stages"]) + "\n")


def test_a_check_that_is_ended_prints_its_tables(machine_with_gpu, monkeypatch, tmp_path, capsys):
    def killed(check):
        sys.exit(143)

    monkeypatch.setitem(gpu_check.STAGES, "b", killed)
    with pytest.raises(SystemExit, match="143"):
        gpu_check.main(["--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "\n==== a\nof a\n" in said
    assert said.splitlines()[-1].split() == ["b", "running", "0.0"]


def test_a_later_run_of_the_same_sources_keeps_the_other_stages(machine_with_gpu, tmp_path):
    file = tmp_path / "2026-11-24-nvidia-h100-80gb-hbm3-check.json"
    assert gpu_check.main(["--out", str(tmp_path), "a"]) == 0
    assert gpu_check.main(["--out", str(tmp_path), "b"]) == 0
    assert list(json.loads(file.read_text())["stages"]) == ["a", "b"]
    machine_with_gpu["sources"] = "ba9876543210"
    assert gpu_check.main(["--out", str(tmp_path), "b"]) == 0
    assert list(json.loads(file.read_text())["stages"]) == ["b"]


def test_sources_are_told_apart_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    kernel = tmp_path / "csrc" / "nms.cu"
    kernel.write_text("__global__")
    before = record.sources()
    (tmp_path / "csrc" / "nms.o").write_text("built")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "made.json").write_text("{}")
    assert record.sources() == before
    kernel.write_text("__global__ ")
    changed = record.sources()
    kernel.rename(tmp_path / "csrc" / "sms.cu")
    assert len({before, changed, record.sources()}) == 3


def test_an_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--dry-run", "test"])
    assert "no stage 'test': there are facts, build, smoke" in capsys.readouterr().err


def test_all_stages_end_within_ten_minutes(machine_with_gpu, monkeypatch, tmp_path):
    assert gpu_check.SECONDS + jobs.GRACE + 15 < 600  # what ignores the interrupt takes 15 s more
    left = []
    monkeypatch.setitem(gpu_check.STAGES, "b", lambda check: left.append(check.left) or Outcome("passed"))
    monkeypatch.setattr(gpu_check, "LIMITS", {"facts": 1, "a": 1, "b": 500})
    monkeypatch.setattr(gpu_check, "SECONDS", 50)
    gpu_check.main(["--out", str(tmp_path)])
    gpu_check.main(["--out", str(tmp_path), "--limit", "300"])  # who sets limits knows how long he has
    assert left[0] < 50 < left[1] <= 300


def test_every_stage_has_a_limit():
    assert list(gpu_check.LIMITS) == list(gpu_check.STAGES)


def test_clocks_are_told_once(monkeypatch):
    facts = {"torch": "2.11.0", "gpu": "NVIDIA H100", "capability": "9.0"}
    monkeypatch.setattr(machine, "FACTS", f"print({json.dumps(json.dumps(facts))})")
    monkeypatch.setattr(machine, "CLOCKS", ("clocks.sm", "power.limit"))
    monkeypatch.setattr(machine, "nvidia_smi", lambda *fields: ", ".join(f"{i} MHz" for i, _ in enumerate(fields)))
    told = machine.conditions(False, 60)
    assert told["gpu"] == "NVIDIA H100"
    assert told["clocks"] == "clocks.sm 0 MHz, power.limit 1 MHz"


def test_commit_of_a_tree_without_git_is_the_callers(monkeypatch):
    monkeypatch.setattr(record, "ask", lambda *_: None)
    monkeypatch.delenv("SSD_EXT_COMMIT", raising=False)
    assert record.commit() is None
    monkeypatch.setenv("SSD_EXT_COMMIT", "abc1234")
    assert record.commit() == "abc1234"


def test_the_script_needs_a_python():
    script = gpu_check.ROOT / "tests" / "gpu_check" / "check.sh"
    failed = subprocess.run([script], env={**os.environ, "PYTHON": "no-python"}, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "no no-python on PATH" in failed.stderr
