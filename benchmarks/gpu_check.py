"""Builds, tests, sanitizes and measures ssd_ext on a GPU; a dry run checks all of that which needs none.

Stages, each within its time limit; what one finds does not stop the next::

    build      pip install, without isolation and network, for this GPU alone; leaves the extension in ssd_ext/
    tests      the whole suite, on the CPU and on CUDA, but for the two selections below
    bits       CPU against CUDA to the bit, every op, case and dtype
    graphs     capture and replay in a CUDA graph of every capturable op, and no host synchronisation
    sanitizer  memcheck, racecheck, initcheck, synccheck over every op, and that each notices a planted fault
    benchmark  the device's copy rate, then every op against its peers; --full: all cases, and torch.compile

A dry run builds for sm_90 and keeps nothing, collects the tests, compiles the planted faults, makes the
sanitizer's calls on the CPU and benchmarks one op there.

``DATE-GPU-check.json`` in the folder ``--out`` is written before and after each stage, and a stage that is run
again on the same commit replaces its earlier entry::

    {"conditions": {"gpu", "capability", "gpu_memory_gb", "driver", "cuda_runtime", "nvcc", "torch", "python", "cpu",
                    "commit", "date", "dry_run"},     # null or "unknown" where the machine does not tell
     "stages": {"tests": {"verdict": "passed",        # "failed", "timed out", "skipped", "running" (was killed)
                          "seconds": 101.3,
                          "counts": {"passed": 1700, "skipped": 230},
                          "notes": ["..."],           # what is missing or wrong
                          "tools": {...}}}}           # of sanitizer: see sanitizer.py

Beside it stand a log of each stage and the benchmark's own JSON. The exit status is 0 where all passed, 1 where
something failed or ran out of time, 3 where nothing failed but something could not be checked.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import sanitizer
from benchmarks.record import ROOT, ask, commit, cpu_model, write_json

LIMITS = {"build": 85, "tests": 150, "bits": 60, "graphs": 45, "sanitizer": 115, "benchmark": 75}  # 530 s together
BITS, GRAPHS = "test_cuda_gives_the_cpu_result", "test_captures_in_a_cuda_graph_without_host_sync"
LOG_BYTES = 300_000
WORST = ("failed", "timed out", "skipped", "passed")  # verdicts, the worst first

FACTS = """
import json, torch
facts = {"torch": torch.__version__, "cuda_runtime": torch.version.cuda, "gpu": None}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    facts |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"}
    facts["gpu_memory_gb"] = round(gpu.total_memory / 1e9, 1)
print(json.dumps(facts))
"""


@dataclass
class Outcome:
    """What a stage found."""

    verdict: str
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)  # further keys of its JSON


# ---- the machine ---------------------------------------------------------------------------------


def toolkit_program(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in CUDA_HOME or beside nvcc."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    folders = [os.path.join(home, "bin") for home in [*homes, "/usr/local/cuda"] if home]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def cores() -> int:
    return len(os.sched_getaffinity(0))


def driver() -> str | None:
    told = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if told:
        return told.splitlines()[0]
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", version.read_text()) if version.is_file() else None
    return found[1] if found else None


def conditions(dry_run: bool) -> dict[str, Any]:
    told = ask(sys.executable, "-c", FACTS)
    if told is None:
        sys.exit(f"gpu_check: {sys.executable} cannot import torch; set PYTHON to the Python that holds it")
    nvcc = toolkit_program("nvcc")
    release = re.search(r"V(\d+\.\d+\.\d+)", (nvcc and ask(nvcc, "--version")) or "")
    facts = {
        "gpu": None,
        "capability": None,
        "gpu_memory_gb": None,
        "driver": driver(),
        "cuda_runtime": None,
        "nvcc": release[1] if release else None,
        "torch": None,
        "python": platform.python_version(),
        "cpu": f"{cpu_model()}, {cores()} cores",
        "commit": commit() or "unknown",
        "date": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        "dry_run": dry_run,
    }
    return facts | json.loads(told.splitlines()[-1])


def bring(package: str) -> str:
    return f"install '{package}', from a wheel that was downloaded elsewhere if there is no network"


# Whether a program or file is there, and how to bring it.
TOOLS = {
    "compiler": (
        lambda: shutil.which((os.environ.get("CXX") or "c++").split()[0]) or shutil.which("g++"),
        "install g++ or set CXX",
    ),
    "Python.h": (
        lambda: os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")),
        "install the headers of this Python, python3-dev",
    ),
    "nvcc": (lambda: toolkit_program("nvcc"), "install the CUDA toolkit or set CUDA_HOME"),
    "compute-sanitizer": (
        lambda: toolkit_program("compute-sanitizer"),
        "install that part of the CUDA toolkit (cuda-sanitizer) or set CUDA_HOME",
    ),
}


def version_of(name: str) -> tuple[int, ...]:
    """Of a Python package, or of cmake, which may be either; () where it is missing."""
    try:
        told = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        told = ask(name, "--version") if name == "cmake" else None
    return tuple(map(int, re.search(r"\d+(\.\d+)*", told)[0].split("."))) if told else ()


def lacking(*needed: str) -> list[str]:
    """A sentence for each of ``needed`` that this machine lacks: a name of ``TOOLS``, or ``package>=version``."""
    sentences = []
    for name in needed:
        if name in TOOLS:
            is_there, how = TOOLS[name]
            if not is_there():
                sentences.append(f"no {name}: {how}")
        else:
            package, _, least = name.partition(">=")
            found = version_of(package)
            if found < tuple(map(int, least.split("."))):
                sentences.append(f"needs {name}, found {'.'.join(map(str, found)) or 'none'}: {bring(name)}")
    return sentences


# ---- running -------------------------------------------------------------------------------------


@dataclass
class Job:
    """A command, its log, and its exit status once it has run; None where it was killed at its limit."""

    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    status: int | None = None

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


def run(limit: float, *jobs: Job) -> None:
    """Run ``jobs`` at the same time, none for longer than ``limit`` seconds; leave none of their processes behind."""
    end = monotonic() + limit
    processes = []
    try:
        for job in jobs:
            with job.log.open("ab") as log:
                log.write(f"$ {' '.join(map(str, job.command))}\n".encode())
                log.flush()
                environment = {**os.environ, "PYTHONUNBUFFERED": "1", **job.environment}
                options = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL}
                processes.append(
                    subprocess.Popen(job.command, stdout=log, stderr=log, preexec_fn=os.setpgrp, **options)
                )
        for job, process in zip(jobs, processes, strict=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.status = process.wait(max(0.0, end - monotonic()))
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)


def shorten(log: Path) -> None:
    """Keep a third of ``LOG_BYTES`` from the beginning of a longer log and the rest from its end."""
    content = log.read_bytes()
    if len(content) > LOG_BYTES:
        head = LOG_BYTES // 3
        log.write_bytes(content[:head] + b"\n[...]\n" + content[head - LOG_BYTES :])


# ---- the stages ----------------------------------------------------------------------------------


@dataclass
class Check:
    """What the stages share."""

    conditions: dict[str, Any]
    out: Path
    stem: str  # of every file in `out`
    dry_run: bool
    full: bool
    limit: float = 0.0  # of the stage that runs

    def log(self, stage: str) -> Path:
        return self.out / f"{self.stem}-{stage}.log"


def build(check: Check) -> Outcome:
    needed = ["compiler", "Python.h", "nvcc", "setuptools>=77", "pybind11>=2.13", "cmake>=3.26", "pip>=21.3"]
    if notes := lacking(*needed):
        return Outcome("skipped", notes=notes)
    with tempfile.TemporaryDirectory() as site:
        environment = {
            "SSD_EXT_CUDA": "ON",
            "TORCH_CUDA_ARCH_LIST": check.conditions["capability"] or "9.0",
            "CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "") + " -DCMAKE_CUDA_FLAGS=-lineinfo",  # for the sanitizer
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        pip = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps"]
        install = Job([*pip, "--target", site, str(ROOT)], check.log("build"), environment)
        run(check.limit, install)
        if install.status is None:
            return Outcome("timed out")
        built = glob.glob(f"{site}/ssd_ext/_C*.so")
        if install.status or not built:
            return Outcome("failed", notes=["pip install failed: its log tells why"])
        show = f"import sys; sys.path[0] = {site!r}; from ssd_ext import env; print(env.report())"
        report = ask(sys.executable, "-c", show)
        with install.log.open("a") as log:
            log.write(report or "python -m ssd_ext.env failed\n")
        if not report or not re.search(r"built with CUDA: +yes", report):
            return Outcome("failed", notes=["what was built holds no CUDA, or does not load"])
        if not check.dry_run:
            if not re.search(r"^GPU: .*, covered by this build", report, re.MULTILINE):
                return Outcome("failed", notes=["what was built does not cover this GPU"])
            for stale in glob.glob(f"{ROOT}/ssd_ext/_C*.so"):
                os.remove(stale)
            shutil.copy(built[0], ROOT / "ssd_ext")
    return Outcome("passed")


def summary_counts(text: str) -> dict[str, int]:
    """The numbers of pytest's last line, or of its line about collected tests."""
    for line in reversed(text.splitlines()):
        if collected := re.match(r"(?:(\d+)/)?(\d+) tests? collected", line):
            return {"collected": int(collected[1] or collected[2])}
        counts = re.findall(r"(\d+) (passed|failed|skipped|error|xfailed|xpassed)", line)
        if counts and re.search(r" in [\d.]+s", line):
            return {name: int(number) for number, name in counts}
    return {}


def run_pytest(check: Check, stage: str, selection: str, none_skipped: bool) -> Outcome:
    if notes := lacking("pytest>=8", "hypothesis>=6"):
        return Outcome("skipped", notes=notes)
    command, environment, notes = [sys.executable, "-m", "pytest", "-q", "-k", selection], {}, []
    if check.dry_run:
        command.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, max(1, cores() // 2)))]
        environment["OMP_NUM_THREADS"] = "2"
    elif stage == "tests":
        command += ["-m", "not slow"]
        notes = [f"the slow tests are left out, for want of pytest-xdist: {bring('pytest-xdist')}"]
    job = Job(command, check.log(stage), environment)
    run(check.limit, job)
    counts = summary_counts(job.text)
    if job.status is None:
        return Outcome("timed out", counts)
    if job.status != 0:
        return Outcome("failed", counts, ["pytest's log tells why"])
    if none_skipped and counts.get("skipped"):
        return Outcome("failed", counts, ["each of these must run here, but some were skipped: see the log"])
    if not counts.get("collected" if check.dry_run else "passed"):
        return Outcome("failed", counts, [f"no test is selected by {selection}"])
    return Outcome("passed", counts, notes)


def tests(check: Check) -> Outcome:
    return run_pytest(check, "tests", f"not {BITS} and not {GRAPHS}", none_skipped=False)


def bits(check: Check) -> Outcome:
    return run_pytest(check, "bits", BITS, none_skipped=True)


def graphs(check: Check) -> Outcome:
    return run_pytest(check, "graphs", GRAPHS, none_skipped=True)


def sanitize(check: Check) -> Outcome:
    if notes := lacking("nvcc"):
        return Outcome("skipped", notes=notes)
    log = check.log("sanitizer")
    end = monotonic() + check.limit
    program = toolkit_program("compute-sanitizer")
    with tempfile.TemporaryDirectory() as folder:
        faults = Path(folder) / "gpu_faults.so"
        capability = (check.conditions["capability"] or "9.0").replace(".", "")
        compiled = Job(sanitizer.compile_command(toolkit_program("nvcc"), faults, capability), log)
        run(end - monotonic(), compiled)
        if compiled.status != 0:
            return Outcome("failed", notes=["the planted faults do not compile: the log tells why"])
        if check.dry_run:
            sanitizer.check_faults(faults)
            called = Job(sanitizer.calls_command("cpu"), log)
            run(end - monotonic(), called)
            done, total, failed = sanitizer.calls_made(called.text)
            good = called.status == 0 and 0 < done == total and not failed
            notes = sanitizer.refused_options(program) if program else lacking("compute-sanitizer")
            refused = bool(program and notes)
            return Outcome("passed" if good and not refused else "failed", {"calls": done}, notes)
        if not program:
            return Outcome("skipped", notes=lacking("compute-sanitizer"))
        # A call that has begun is not broken off, and Python and torch start slowly under the tools.
        seconds = (end - monotonic()) * 0.6
        jobs = {
            tool: Job(sanitizer.command(program, tool, seconds, faults), Path(folder) / tool, sanitizer.ENVIRONMENT)
            for tool in sanitizer.TOOLS
        }
        run(end - monotonic(), *jobs.values())
        tools = {tool: sanitizer.judge(job.text, job.status) for tool, job in jobs.items()}
        for tool, job in jobs.items():
            shorten(job.log)
            with log.open("a") as file:
                file.write(f"\n==== {tool}: {tools[tool]['verdict']}\n{job.text}")
    verdicts = {found["verdict"] for found in tools.values()}
    verdict = "passed" if verdicts == {"clean"} else "timed out" if verdicts <= {"clean", "timed out"} else "failed"
    counts = {"clean": sum(found["verdict"] == "clean" for found in tools.values())}
    counts |= {f"{tool} calls": found["calls"] for tool, found in tools.items()}
    notes = [f"{tool}: {found['verdict']}" for tool, found in tools.items() if found["verdict"] != "clean"]
    return Outcome(verdict, counts, notes, {"tools": tools})


def benchmark(check: Check) -> Outcome:
    file = check.out / f"{check.stem}-benchmark.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--json", str(file)]
    if check.dry_run:
        command += ["--quick", "--no-compile", "--ops", "decode"]
    else:
        command += ["--device", "cuda"] + ([] if check.full else ["--quick", "--no-compile"])
    job = Job(command, check.log("benchmark"), {"SSD_EXT_COMMIT": check.conditions["commit"]})
    run(check.limit, job)
    made = json.loads(file.read_text()) if file.is_file() else {"results": []}
    ours = [result for result in made["results"] if "ratios" in result]
    counts = {"cases": len(made["results"]), "timed": len(ours)}
    counts["fastest"] = sum(min(result["ratios"].values(), default=1) >= 1 for result in ours)
    notes = [roofline(result) for result in ours]
    if ours:
        notes.append(f"the device copies {made['conditions']['memory_gb_per_s']:.0f} GB/s; {file.name} holds the rest")
    if job.status is None:
        return Outcome("timed out", counts, notes)
    if job.status != 0:
        return Outcome("failed", counts, [*notes, "an op of ours is wrong or failed, or run.py stopped: see the log"])
    return Outcome("passed", counts, notes)


def roofline(result: dict[str, Any]) -> str:
    """One of run.py's results as a line: our time, its share of the copy rate, and the best peer."""
    (ours,) = (row for row in result["contenders"] if row["name"] == "ssd_ext")
    peer = result["best_peer"]
    line = f"{result['op']}, {result['case']}: {ours['median_ms']:.4f} ms, {result['gb_per_s']:.0f} GB/s, "
    line += f"{result['memory_share']:.0%} of the copy rate"
    return line + (f", {result['ratios'][peer]:.1f}x as fast as {peer}" if peer else "")


STAGES: dict[str, Callable[[Check], Outcome]] = {
    "build": build,
    "tests": tests,
    "bits": bits,
    "graphs": graphs,
    "sanitizer": sanitize,
    "benchmark": benchmark,
}

# ---- the record ----------------------------------------------------------------------------------


def earlier_stages(file: Path, under: dict[str, Any]) -> dict[str, Any]:
    """The stages of an earlier run on the same GPU, commit and torch; of an unknown or changed tree, none."""
    if not file.is_file() or under["commit"] == "unknown" or under["commit"].endswith("-dirty"):
        return {}
    record = json.loads(file.read_text())
    same = all(record["conditions"][key] == under[key] for key in ("gpu", "commit", "torch", "dry_run"))
    return record["stages"] if same else {}


def table(stages: dict[str, Any]) -> str:
    lines = [f"{'stage':<10} {'verdict':<10} {'seconds':>8}  counts"]
    for name, row in stages.items():
        counts = ", ".join(f"{number} {what}" for what, number in row["counts"].items())
        lines.append(f"{name:<10} {row['verdict']:<10} {row['seconds']:>8.1f}  {counts}".rstrip())
    return "\n".join(lines)


def exit_status(verdicts: list[str]) -> int:
    worst = min(verdicts, key=WORST.index)
    return {"passed": 0, "skipped": 3}.get(worst, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; none: all")
    parser.add_argument("--dry-run", action="store_true", help="check what needs no GPU; takes under 3 minutes")
    parser.add_argument("--full", action="store_true", help="benchmark all cases, and torch.compile; needs --limit")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of each stage, instead of its own")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for JSON and logs (default: benchmarks/results)")
    args = parser.parse_args(arguments)
    for name in args.stages:
        if name not in STAGES:
            parser.error(f"no stage {name!r}: there are {', '.join(STAGES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `run` ends what it has started

    with contextlib.ExitStack() as stack:
        out = args.out or ROOT / "benchmarks" / "results"
        if args.dry_run and not args.out:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out.mkdir(parents=True, exist_ok=True)
        return check_all(args, out.resolve())


def check_all(args: argparse.Namespace, out: Path) -> int:
    under = conditions(args.dry_run)
    if not under["gpu"] and not args.dry_run:
        sys.exit("gpu_check: torch sees no GPU here; --dry-run checks what needs none")
    gpu = "dry-run" if args.dry_run else re.sub(r"[^a-z0-9]+", "-", under["gpu"].lower()).strip("-")
    check = Check(under, out, f"{under['date'][:10]}-{gpu}", args.dry_run, args.full)
    file = out / f"{check.stem}-check.json"
    record = {"conditions": under, "stages": earlier_stages(file, under)}
    print(", ".join(f"{key} {value}" for key, value in under.items() if value is not None), flush=True)

    chosen = [name for name in STAGES if name in args.stages or not args.stages]
    for name in chosen:
        check.limit = args.limit or LIMITS[name] * (3 if args.dry_run else 1)  # a dry run may have but one core
        print(f"\n==== {name} (at most {check.limit:.0f} s)", flush=True)
        check.log(name).unlink(missing_ok=True)
        start = monotonic()
        record["stages"][name] = {"verdict": "running", "seconds": 0.0, "counts": {}, "notes": []}
        write_json(file, record)
        try:
            outcome = STAGES[name](check)
        except Exception as e:
            outcome = Outcome("failed", notes=[f"gpu_check.py itself: {type(e).__name__}: {e}"])
        seconds = round(monotonic() - start, 1)
        row = {"verdict": outcome.verdict, "seconds": seconds, "counts": outcome.counts, "notes": outcome.notes}
        record["stages"][name] = row | outcome.more
        write_json(file, record)
        if check.log(name).is_file():
            shorten(check.log(name))
            lines = check.log(name).read_text(errors="replace").splitlines()
            print("\n".join(lines[-3 if outcome.verdict == "passed" else -40 :]))
        for note in outcome.notes:
            print(f"{name}: {note}")
        print(f"---- {name}: {outcome.verdict}, {seconds} s", flush=True)

    print(f"\n{file}\n{table({name: record['stages'][name] for name in chosen})}", flush=True)
    return exit_status([record["stages"][name]["verdict"] for name in chosen])


if __name__ == "__main__":
    sys.exit(main())
