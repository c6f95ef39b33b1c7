"""benchmarks/gpu_check.sh: what it concludes from what others print. That it runs, .ci/run shows by a dry run."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_check, record, sanitizer
from benchmarks.gpu_check import Job, Outcome, exit_status, lacking, run, shorten, summary_counts, table

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
OURS = "void ssd_ext::nms::<unnamed>::sweep_kernel<float>"


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
    assert found == {"verdict": "clean", "calls": 812, "total": 812, "failed": 0, "planted": 1, "ours": 0, "others": 0}
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


@pytest.mark.parametrize(
    ("calls", "status", "verdict"),
    [
        ("812 of 812 calls, 3 failed\n", 0, "0 reports of ours, 3 calls failed"),
        ("90 of 812 calls, 0 failed\n", 0, "timed out"),
        ("", None, "timed out"),
        ("", 255, "made no call: the tool does not work here, or torch does not under it"),
    ],
)
def test_calls_that_were_not_made_are_told(calls, status, verdict):
    text = output("memcheck", "ssd_ext::planted::memcheck", calls=calls)
    assert sanitizer.judge(text, status)["verdict"] == verdict


def test_every_tool_has_its_options():
    for tool in sanitizer.TOOLS:
        options = sanitizer.options(tool)
        assert f"--tool={tool}" in options
        # initcheck must see what torch's kernels write
        assert any(option.startswith("--kernel-name") for option in options) == (tool != "initcheck")


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("1685 passed, 486 skipped in 263.57s (0:04:23)", {"passed": 1685, "skipped": 486}),
        ("= 2 failed, 1 passed, 3 deselected, 1 error in 0.12s =", {"failed": 2, "passed": 1, "error": 1}),
        ("254/2171 tests collected (1917 deselected) in 11.66s", {"collected": 254}),
        ("2171 tests collected in 5.31s", {"collected": 2171}),
        ("no tests collected (2171 deselected) in 5.31s", {}),
        ("Killed", {}),
    ],
)
def test_counts_are_those_of_pytest(line, counts):
    assert summary_counts(f"SKIPPED [1] 4 passed by\n{line}\n") == counts


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
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: None)
    assert lacking("nvcc") == ["no nvcc: install the CUDA toolkit or set CUDA_HOME"]


def alive(number):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_that_runs_too_long_is_ended_with_its_children(tmp_path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    slow = Job([sys.executable, "-c", parent], tmp_path / "slow")
    quick = Job([sys.executable, "-c", "import sys; sys.exit(7)"], tmp_path / "quick")
    run(5, slow, quick)
    assert (slow.status, quick.status) == (None, 7)
    child_number = int(slow.text.splitlines()[1])
    for _ in range(50):
        if not alive(child_number):
            break
        time.sleep(0.1)
    assert not alive(child_number)


def test_a_long_log_keeps_both_ends(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"first" + b"." * 2 * gpu_check.LOG_BYTES + b"last")
    shorten(log)
    content = log.read_bytes()
    assert len(content) < gpu_check.LOG_BYTES + 100
    assert content.startswith(b"first")
    assert content.endswith(b"last")


@pytest.fixture
def machine(monkeypatch):
    """Conditions of a machine with a GPU; and stages that only say so."""
    under = {"gpu": "NVIDIA H100 80GB HBM3", "commit": "abc1234", "torch": "2.11.0+cu130", "date": "2026-11-24 10:00"}
    monkeypatch.setattr(gpu_check, "conditions", lambda dry_run: {**under, "dry_run": dry_run})
    monkeypatch.setattr(gpu_check, "STAGES", {name: lambda check: Outcome("passed", {"n": 1}) for name in "ab"})
    monkeypatch.setattr(gpu_check, "LIMITS", {"a": 1, "b": 1})
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    return under


def test_record_is_written_before_and_after_each_stage(machine, monkeypatch, tmp_path, capsys):
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
    assert made["conditions"] == {**machine, "dry_run": False}
    assert made["stages"]["b"]["verdict"] == "failed"
    assert "OSError: out of paper" in made["stages"]["b"]["notes"][0]
    assert capsys.readouterr().out.endswith(table(made["stages"]) + "\n")


def test_a_later_run_on_the_same_commit_keeps_the_other_stages(machine, tmp_path):
    file = tmp_path / "2026-11-24-nvidia-h100-80gb-hbm3-check.json"
    assert gpu_check.main(["--out", str(tmp_path), "a"]) == 0
    assert gpu_check.main(["--out", str(tmp_path), "b"]) == 0
    assert list(json.loads(file.read_text())["stages"]) == ["a", "b"]
    machine["commit"] = "def5678"
    assert gpu_check.main(["--out", str(tmp_path), "b"]) == 0
    assert list(json.loads(file.read_text())["stages"]) == ["b"]


def test_a_benchmark_that_ran_out_of_time_tells_what_it_measured(monkeypatch, tmp_path):
    contenders = [{"name": "ssd_ext", "status": "timed", "median_ms": 0.0123}]
    result = {"op": "decode", "case": "B=8", "contenders": contenders, "bytes": 1, "gb_per_s": 1500.0}
    result |= {"memory_share": 0.5, "ratios": {"reference": 9.0, "torchvision": 4.2}, "best_peer": "torchvision"}
    made = {"conditions": {"memory_gb_per_s": 3000.0}, "results": [result]}

    def broken_off(limit, job):
        record.write_json(tmp_path / "x-benchmark.json", made)

    monkeypatch.setattr(gpu_check, "run", broken_off)
    found = gpu_check.benchmark(gpu_check.Check({"commit": "abc1234"}, tmp_path, "x", dry_run=False, full=False))
    assert (found.verdict, found.counts) == ("timed out", {"cases": 1, "timed": 1, "fastest": 1})
    expected = "decode, B=8: 0.0123 ms, 1500 GB/s, 50% of the copy rate, 4.2x as fast as torchvision"
    assert found.notes[0] == expected


def test_an_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--dry-run", "test"])
    assert "no stage 'test': there are build, tests, bits" in capsys.readouterr().err


def test_limits_leave_room_within_ten_minutes():
    assert set(gpu_check.LIMITS) == set(gpu_check.STAGES)
    assert sum(gpu_check.LIMITS.values()) < 9 * 60


def test_commit_of_a_tree_without_git_is_the_callers(monkeypatch):
    monkeypatch.setattr(record, "ask", lambda *_: None)
    monkeypatch.delenv("SSD_EXT_COMMIT", raising=False)
    assert record.commit() is None
    monkeypatch.setenv("SSD_EXT_COMMIT", "abc1234")
    assert record.commit() == "abc1234"


def test_the_script_needs_a_python():
    script = gpu_check.ROOT / "benchmarks" / "gpu_check.sh"
    failed = subprocess.run([script], env={**os.environ, "PYTHON": "no-python"}, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "no no-python on PATH" in failed.stderr
