"""How check.py runs compute-sanitizer, and reads what it says.

Each tool runs kernel_calls.py, which plants the tool's own fault after the calls. A tool's verdict is "clean" where
it reports that fault and nothing else of ours, and where every call was made::

    {"verdict": "clean",  # or what is wrong, in words
     "calls": 812,        # made; "total" there are, "failed" raised
     "in": null,          # the call during which the program ended, or was ended
     "planted": 1,        # reports of the planted fault
     "ours": 0,           # of our kernels, or of an output that no kernel wrote
     "others": 0}         # of torch's own kernels: not ours to judge
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check.jobs import Job

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOLDER = Path(__file__).resolve().parent
# Each tensor in an allocation of its own: its bounds are seen, and no earlier tensor has initialised it.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
OURS, PLANTED = "ssd_ext::", "ssd_ext::planted::"
BROKEN = "no call works under the tool here"  # which says nothing of ours


def compile_command(nvcc: str, library: Path, capability: str) -> list[str]:
    target = f"arch=compute_{capability},code=sm_{capability}"
    flags = ["-std=c++17", "-O2", "-lineinfo", "-shared", "-Xcompiler=-fPIC", f"-gencode={target}"]
    return [nvcc, *flags, "-o", str(library), str(FOLDER / "faults.cu")]


def check_faults(library: Path) -> None:
    """AttributeError where one is missing."""
    loaded = ctypes.CDLL(str(library))
    for tool in TOOLS:
        getattr(loaded, f"plant_{tool}")


def calls_command(device: str) -> list[str]:
    return [sys.executable, str(FOLDER / "kernel_calls.py"), "--device", device]


def options(tool: str) -> list[str]:
    chosen = [f"--tool={tool}", f"--port={50000 + 100 * TOOLS.index(tool)}"]  # they run at the same time
    # A kernel that errs is ended, not the program; its exit status says nothing that the log does not.
    chosen += ["--destroy-on-device-error=kernel", "--check-exit-code=no", "--target-processes=application-only"]
    # By default a program that makes no CUDA call in its first ten seconds runs on unchecked.
    chosen += ["--launch-timeout=0", "--show-backtrace=device", "--print-limit=5000"]
    if tool == "memcheck":
        # torch asks for what a driver need not have; our launches check their own errors
        chosen += ["--padding=512", "--report-api-errors=no"]
    if tool != "initcheck":  # which must see torch's kernels write to know what is initialised
        chosen.append("--kernel-name=kns=ssd_ext")
    return chosen


def job(program: str, tool: str, seconds: float, faults: Path) -> Job:
    calls = [*calls_command("cuda"), "--seconds", f"{seconds:.0f}", "--plant", str(faults), tool]
    return Job([program, *options(tool), *calls], ENVIRONMENT, show=of_ours(), name=tool)


def of_ours() -> Callable[[str], str | None]:
    """What to show of a tool's lines: where a kernel of ours errs, once each, and calls that raised."""
    shown = set()

    def show(line: str) -> str | None:
        if line in shown or not (line.startswith("FAILED") or (OURS in line and PLANTED not in line)):
            return None
        shown.add(line)
        return line.strip("= ")

    return show


def refused_options(program: str) -> list[str]:
    """A sentence for each tool whose options this version does not take; needs no GPU."""
    refused = []
    for tool in TOOLS:
        run = [program, *options(tool), "--require-cuda-init=no", "/bin/true"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=60)
        if done.returncode:
            refused.append(f"{tool}: {(done.stdout + done.stderr).strip().splitlines()[-1:]} to {' '.join(run)}")
    return refused


def calls_made(text: str) -> tuple[int, int, int, str | None]:
    """(made, there are, raised, the one that did not end), as kernel_calls.py tells."""
    if found := re.search(r"^(\d+) of (\d+) calls, (\d+) failed$", text, re.MULTILINE):
        return *map(int, found.groups()), None
    begun = re.findall(r"^call (\d+) of (\d+): (.*)$", text, re.MULTILINE)
    number, total, call = begun[-1] if begun else (1, 0, None)
    return int(number) - 1, int(total), len(re.findall("^FAILED: ", text, re.MULTILINE)), call


def reports(text: str) -> list[str]:
    """The tool's reports: each a line and those indented below it. Most of its other lines stand alone."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("========="):
            continue
        said = line.removeprefix("=========")
        if said.startswith("  ") and found:
            found[-1].append(said.strip())
        else:
            found.append([said.strip()])
    alone = re.compile("Race reported|Barrier error")
    return ["\n".join(lines) for lines in found if len(lines) > 1 or alone.search(lines[0])]


def summary(text: str) -> int:
    """How many errors or hazards the tool itself counts."""
    return sum(map(int, re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)))


def judge(text: str, status: int | None) -> dict[str, Any]:
    """The verdict of one tool from its output and exit status; None: killed at its limit."""
    done, total, failed, unfinished = calls_made(text)
    all_reports = reports(text)
    planted = sum(PLANTED in report for report in all_reports)
    # A copy of uninitialised memory to the host names no kernel: it is an output that was not written.
    ours = sum(OURS in report or "Host API" in report for report in all_reports) - planted
    unread = max(0, summary(text) - len(all_reports))
    found = {"calls": done, "total": total, "failed": failed, "in": unfinished}
    found |= {"planted": planted, "ours": ours, "others": len(all_reports) - planted - ours}
    none_works = not total or 0 < failed == done
    if none_works and not ours and not unfinished and status is not None:
        verdict = BROKEN
    elif ours or failed:
        verdict = f"{ours} reports of ours, {failed} calls failed"
    elif status is None:
        verdict = "timed out"
    elif unfinished:
        verdict = f"ended by itself, exit status {status}"
    elif done < total:
        verdict = "timed out"
    elif not planted:
        verdict = "did not notice the planted fault"
    elif "Internal Sanitizer Error" in text:
        verdict = "the tool itself failed: its log tells where"
    elif unread:
        verdict = f"{unread} reports that sanitizer.py could not read"
    else:
        verdict = "clean"
    return {"verdict": verdict} | found


def in_words(found: dict[str, Any]) -> str:
    """The verdict of :func:`judge`, and in which call the program ended."""
    return found["verdict"] + (f", in {found['in']}" if found["in"] else "")
