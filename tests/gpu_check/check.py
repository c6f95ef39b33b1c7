"""Builds, tests, profiles, sanitizes and measures ssd_ext on a GPU; a dry run checks all of that which needs none.

Stages, the most wanted first, each within its time limit::

    facts      GPU, driver, clocks, compilers, torch
    build      with CMake, without a network, for this GPU alone; leaves the extension in ssd_ext/
    smoke      each op, with blocking launches: OK, BITS DIFFER (from the CPU's) or what it raised (kernel_calls.py)
    profile    the time of each kernel, of a CUDA graph's replay, of the host (gpu_profile.py)
    cuda       the tests on CUDA: equal to the CPU to the bit, captured in CUDA graphs, no host synchronisation
    ncu        what binds each kernel at B=32 (ncu.py)
    sanitizer  memcheck and racecheck, then initcheck and synccheck, over every op (sanitizer.py)
    benchmark  the loss, detect and NMS against their peers; --full: everything, torch.compile too

The check ends where going on is useless: after a build that fails, or when no op works. What another stage finds does
not stop those that follow, and all of them together end within ``SECONDS``. All tables are printed again at the end.

A dry run builds for sm_90 and keeps nothing, calls on the CPU what the stages call on the GPU, collects the tests,
compiles the planted faults and benchmarks one op.

``DATE-GPU-check.json`` in the folder ``--out`` is written before and after each stage, and a stage that is run
again on the same sources replaces its earlier entry::

    {"conditions": {"gpu", "capability", "driver", "nvcc", "torch", "python", "cpu", "commit", "sources", "date",
                    "dry_run", ...},                  # null where the machine does not tell
     "stages": {"cuda": {"verdict": "passed",         # "failed", "timed out", "skipped", "running" (was killed)
                         "seconds": 61.3,
                         "counts": {"passed": 1700, "skipped": 230},
                         "notes": ["..."],            # what is missing or wrong
                         "table": ["..."],            # as printed
                         "tools": {...}}}}            # of sanitizer: see sanitizer.py

Beside it stand a log of everything that was run, the profile and the benchmark's own JSON. The exit status is 0 where
all passed, 1 where something failed or ran out of time, 3 where nothing failed but something could not be checked.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

if not __package__:  # run as a script
    sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])  # tests, the repository

from benchmarks.record import ROOT, write_json
from gpu_check import ncu, sanitizer
from gpu_check.jobs import Job, nothing, run
from gpu_check.machine import conditions, cores, environment_program, lacking, toolkit_program

SECONDS = 540  # of all stages, but for the ending of the last one's programs
LIMITS = {  # seconds
    "facts": 60,  # torch is imported for the first time
    "build": 60,
    "smoke": 25,
    "profile": 60,
    "cuda": 80,
    "ncu": 60,
    "sanitizer": 75 + 60,
    "benchmark": 80,
}
DRY_RUN_FACTOR = 3  # of all limits: a dry run may have but one core
BY_FUNCTION = "= outcomes of each test function ="
SELECTION = "cuda or mixed_devices"
NEVER_SKIPPED = re.compile("cuda_gives|cuda_graph|mixed_devices|gpu")  # in the names of tests that need a GPU
# Of each op what decides most, for a run without --full.
BENCHMARK = {
    "multibox_loss": ("SSD300 B=1", "SSD300 B=32", "SSD300 B=32, backward too"),
    "detect": ("trained, C=81 B=1", "trained, C=81 B=32"),
    "nms_padded": ("random N=1000",),
}
WORST = ("failed", "timed out", "skipped", "passed")  # verdicts, the worst first


@dataclass
class Outcome:
    """What a stage found."""

    verdict: str
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)  # further keys of its JSON
    stop: bool = False  # nothing that follows could work


@dataclass
class Check:
    """What the stages share."""

    conditions: dict[str, Any]
    out: Path
    stem: str  # of every file in `out`
    dry_run: bool
    full: bool
    end: float = 0.0  # of the stage that runs, on the monotonic clock

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    @property
    def left(self) -> float:
        return max(0.0, self.end - monotonic())

    def file(self, name: str) -> Path:
        return self.out / f"{self.stem}-{name}"

    def run(self, *jobs: Job, limit: float | None = None) -> None:
        run(self.file("check.log"), self.left if limit is None else min(limit, self.left), *jobs)


def script(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / name), *map(str, arguments)]


def ended(job: Job, failed: str) -> tuple[str, list[str]]:
    """Verdict and notes of a job by its exit status, and by what it had no time for."""
    unreached = [line for line in job.lines if line.startswith("no time for ")]
    if job.status:
        return "failed", [f"{failed}, exit status {job.status}", *unreached]
    return ("timed out" if job.status is None or unreached else "passed"), unreached


# ---- the stages ----------------------------------------------------------------------------------


def facts(check: Check) -> Outcome:
    for name, fact in check.conditions.items():
        if fact:
            print(f"{name + ':':<18}{fact}", flush=True)
    return Outcome("passed")


def build(check: Check) -> Outcome:
    if notes := lacking("compiler", "Python.h", "nvcc", "pybind11>=2.13", "cmake>=3.26"):
        return Outcome("skipped", notes=notes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if check.dry_run else ROOT / "build" / "gpu_check"
        cmake, ninja = environment_program("cmake"), environment_program("ninja")
        options = {
            "SSD_EXT_CUDA": "ON",
            "CMAKE_CUDA_FLAGS": "-lineinfo",  # for the sanitizer
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder / "module",
            "Python_EXECUTABLE": sys.executable,
            **({"CMAKE_MAKE_PROGRAM": ninja} if ninja else {}),
        }
        configure = [cmake, "-S", ROOT, "-B", folder, *(f"-D{name}={value}" for name, value in options.items())]
        environment = {"TORCH_CUDA_ARCH_LIST": check.conditions["capability"] or "9.0"}
        for what, job in {
            "CMake": Job(configure + ["-GNinja"] * bool(ninja), environment, show=nothing),
            "compiling": Job([cmake, "--build", folder, "--parallel", str(cores())], show=nothing),
        }.items():
            check.run(job)
            if job.status != 0:
                verdict, notes = ended(job, f"{what} failed")
                return Outcome(verdict, notes=notes, table=job.lines[-40:], stop=True)
        if check.dry_run:
            return Outcome("passed")
        module = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        (ROOT / "ssd_ext" / module).unlink(missing_ok=True)  # as a process may have it in use
        shutil.copy(folder / "module" / module, ROOT / "ssd_ext")
    report = Job([sys.executable, "-m", "ssd_ext", "env"])
    check.run(report)
    if not re.search(r"^GPU: .*, covered by this build$", report.text, re.MULTILINE):
        notes = ["what was built does not load, or not cover this GPU"]
        return Outcome("failed", notes=notes, table=report.lines[-40:], stop=True)
    return Outcome("passed")


def smoke(check: Check) -> Outcome:
    """An op that breaks CUDA for the rest of its process, hangs or ends it does not hide the others."""
    names: list[str] = []
    said: dict[str, str] = {}
    after: list[str] = []
    while True:
        command = script("tests/gpu_check/kernel_calls.py", "--compare", "--device", check.device, *after)
        job = Job(command, {"CUDA_LAUNCH_BLOCKING": "1"})
        check.run(job)
        names = names or re.findall(r"\w+", next((line[5:] for line in job.lines if line.startswith("ops: ")), ""))
        answers = [line.partition(": ") for line in job.lines]
        new = {name: what or f"ended its process, status {job.status}" for name, _, what in answers if name in names}
        if new and job.status is None:
            new[list(new)[-1]] = "did not end in time"
        said |= new
        if not new or job.status in (0, None):
            break
        after = ["--after", list(new)[-1]]
    table = [f"{name + ':':<18}{said.get(name, 'not reached')}" for name in names]
    wrong = [f"{name}: {said.get(name, 'not reached')}" for name in names if said.get(name) != "OK"]
    counts = {"OK": len(names) - len(wrong), "wrong": len(wrong)}
    if names and not wrong:
        return Outcome("passed", counts, table=table)
    verdict = "timed out" if job.status is None else "failed"
    works = any(what.startswith(("OK", "BITS DIFFER")) for what in said.values())
    return Outcome(verdict, counts, wrong or ["no op was called"], table, stop=verdict == "failed" and not works)


def profile(check: Check) -> Outcome:
    file = check.file("profile.json")
    file.unlink(missing_ok=True)
    only = ["--cases", "B=1"] if check.dry_run else ["--seconds", check.left - 10]  # a case takes a few
    job = Job(script("tests/gpu_check/gpu_profile.py", "--device", check.device, "--json", file, *only))
    check.run(job)
    cases = json.loads(file.read_text())["cases"] if file.is_file() else []
    verdict, notes = ended(job, "gpu_profile.py failed")
    return Outcome(verdict, {"measured": len(cases)}, notes, job.lines)


def cuda(check: Check) -> Outcome:
    if notes := lacking("pytest>=8"):
        return Outcome("skipped", notes=notes)
    command = [sys.executable, "-m", "pytest", "tests", "-q", "--tb=short", "--by-function", "-k", SELECTION]
    command.append("--continue-on-collection-errors")
    notes = []
    for module, package, options, without in (
        ("xdist", "pytest-xdist", ["-n", str(min(12, cores())), "--dist", "worksteal"], "tests run one by one"),
        ("pytest_timeout", "pytest-timeout", ["--timeout", "45"], "a test that hangs is not ended"),
    ):
        if importlib.util.find_spec(module):
            command += options
        else:
            notes.append(f"{without}, for want of {package}")
    if check.dry_run:
        job = Job([*command, "--collect-only"], show=nothing)
        check.run(job)
        verdict, wrong = ended(job, "pytest could not collect the tests")
        collected = sum(map(int, re.findall(r"^(\d+)(?:/\d+)? tests? collected", job.text, re.MULTILINE)))
        return Outcome(verdict, {"collected": collected}, notes + wrong, job.lines[-40:] if wrong else [])
    job = Job(command)
    check.run(job)
    functions = outcomes(job.text)
    came = itertools.takewhile(lambda line: BY_FUNCTION not in line, job.lines)  # before pytest's own summary
    failures = [line for line in came if line.startswith("FAILED ")]
    only_here = {name: found for name, found in functions.items() if NEVER_SKIPPED.search(name)}
    skipped = [f"{name}: {n['skipped']} skipped, which must run here" for name, n in only_here.items() if n["skipped"]]
    verdict, wrong = ended(job, "pytest failed")
    if failures or skipped:
        verdict = "failed"
    elif verdict == "passed" and not only_here:
        verdict, wrong = "failed", ["no test that only a GPU can run was selected"]
    table = [f"{name}: {', '.join(f'{n} {what}' for what, n in found.items())}" for name, found in functions.items()]
    counts = dict(sum(functions.values(), Counter()))
    return Outcome(verdict, counts, notes + wrong + skipped + failures[:20], table)


def outcomes(text: str) -> dict[str, Counter[str]]:
    """What ``--by-function`` prints (tests/progress.py)."""
    found = re.findall(r"^(\S+::\w+): (\d+ \w+(?:, \d+ \w+)*)$", text, re.MULTILINE)
    return {name: Counter({what: int(n) for n, what in re.findall(r"(\d+) (\w+)", told)}) for name, told in found}


def nsight_compute(check: Check) -> Outcome:
    notes, program = lacking("ncu"), toolkit_program("ncu")
    cases = "B=1" if check.dry_run else "B=32"
    call = script("tests/gpu_check/gpu_profile.py", "--once", "--device", check.device, "--cases", cases)
    if check.dry_run:
        job = Job(call)
        check.run(job)
        verdict, wrong = ended(job, "gpu_profile.py failed")
        return Outcome(verdict, notes=notes + wrong)
    if notes:
        return Outcome("skipped", notes=notes)
    job = Job(ncu.command(program, [*call, "--seconds", str(check.left * 0.7)]), show=ncu.complaint)
    check.run(job)
    complaints = list(filter(ncu.complaint, job.lines))[:5]
    rows = ncu.read(job.text)
    table = ncu.table(rows)
    print("\n".join(table), flush=True)
    verdict, wrong = ended(job, "ncu failed")
    if not any(row["us"] for row in rows):
        wrong.insert(0, "ncu measured nothing")
        if any(line.startswith("==ERROR==") for line in complaints):
            verdict = "skipped"  # what it may not or cannot do here says nothing of ours
        elif verdict == "passed":
            verdict = "failed"
    if verdict != "passed":
        wrong += complaints or job.lines[-5:]
    return Outcome(verdict, {"kernels": len(rows)}, wrong, table)


def sanitize(check: Check) -> Outcome:
    if notes := lacking("nvcc"):
        return Outcome("skipped", notes=notes)
    program = toolkit_program("compute-sanitizer")
    notes = lacking("compute-sanitizer")
    with tempfile.TemporaryDirectory() as folder:
        faults = Path(folder) / "faults.so"
        capability = (check.conditions["capability"] or "9.0").replace(".", "")
        compiled = Job(sanitizer.compile_command(toolkit_program("nvcc"), faults, capability))
        check.run(compiled)
        if compiled.status != 0:
            return Outcome("failed", notes=["the planted faults do not compile"])
        if check.dry_run:
            sanitizer.check_faults(faults)
            job = Job(sanitizer.calls_command("cpu"), show=sanitizer.of_ours())
            check.run(job)
            done, total, failed, _ = sanitizer.calls_made(job.text)
            refused = sanitizer.refused_options(program) if program else []
            good = job.status == 0 and 0 < done == total and not failed and not refused
            return Outcome("passed" if good else "failed", {"calls": done}, notes + refused)
        if notes:
            return Outcome("skipped", notes=notes)
        tools: dict[str, dict[str, Any]] = {}
        first = 75 / LIMITS["sanitizer"] * check.left
        for pair, limit in ((sanitizer.TOOLS[:2], first), (sanitizer.TOOLS[2:], check.left)):
            limit = min(limit, check.left)
            # A call that has begun goes on to its end, and Python and torch start slowly under the tools.
            jobs = [sanitizer.job(program, tool, limit * 0.6, faults) for tool in pair]
            check.run(*jobs, limit=limit)
            for job in jobs:
                tools[job.name] = sanitizer.judge(job.text, job.status)
                print(f"{job.name}: {sanitizer.in_words(tools[job.name])}", flush=True)
    said = {tool: sanitizer.in_words(found) for tool, found in tools.items()}
    stands_for = {"clean": "passed", "timed out": "timed out", sanitizer.BROKEN: "skipped"}
    verdict = min((stands_for.get(found["verdict"], "failed") for found in tools.values()), key=WORST.index)
    counts = {"clean": sum(found["verdict"] == "clean" for found in tools.values())}
    notes = [f"{tool}: {said[tool]}" for tool, found in tools.items() if found["verdict"] != "clean"]
    table = [f"{tool:<10} {found['calls']} of {found['total']} calls: {said[tool]}" for tool, found in tools.items()]
    return Outcome(verdict, counts, notes, table, {"tools": tools})


def benchmark(check: Check) -> Outcome:
    file = check.file("benchmark.json")
    file.unlink(missing_ok=True)
    command = script("benchmarks/run.py", "--device", check.device, "--json", file)
    if check.dry_run:
        command += ["--quick", "--no-compile", "--ops", "decode"]
    elif not check.full:
        command += ["--quick", "--no-compile", "--ops", *BENCHMARK]
        command += ["--cases", *(case for cases in BENCHMARK.values() for case in cases)]
    commit = check.conditions["commit"] or f"sources {check.conditions['sources']}"
    job = Job(command, {"SSD_EXT_COMMIT": commit})
    check.run(job)
    made = json.loads(file.read_text()) if file.is_file() else {"results": []}
    ours = [result for result in made["results"] if "ratios" in result]
    counts = {"cases": len(made["results"]), "timed": len(ours)}
    counts["fastest"] = sum(min(result["ratios"].values(), default=1) >= 1 for result in ours)
    table = [roofline(result) for result in ours]
    if ours:
        table.append(f"the device copies {made['conditions']['memory_gb_per_s']:.0f} GB/s; {file.name} holds the rest")
    verdict, notes = ended(job, "an op of ours is wrong or failed, or run.py stopped: see the log")
    return Outcome(verdict, counts, notes, table)


def roofline(result: dict[str, Any]) -> str:
    """One of run.py's results as a line: our time, its share of the copy rate, and the best peer."""
    rows = {row["name"]: row for row in result["contenders"]}
    peer = result["best_peer"]
    line = f"{result['op']}, {result['case']}: {rows['ssd_ext']['median_ms']:.4f} ms, "
    if graph := rows.get("CUDA graph"):
        line += f"{graph['median_ms']:.4f} ms" if "median_ms" in graph else graph["status"]
        line += " in a CUDA graph, "
    line += f"{result['gb_per_s']:.0f} GB/s, {result['memory_share']:.0%} of the copy rate"
    return line + (f", {result['ratios'][peer]:.1f}x as fast as {peer}" if peer else "")


STAGES: dict[str, Callable[[Check], Outcome]] = {
    "facts": facts,
    "build": build,
    "smoke": smoke,
    "profile": profile,
    "cuda": cuda,
    "ncu": nsight_compute,
    "sanitizer": sanitize,
    "benchmark": benchmark,
}

# ---- the record ----------------------------------------------------------------------------------


def earlier_stages(file: Path, under: dict[str, Any]) -> dict[str, Any]:
    """The stages of an earlier run of the same sources on the same GPU and torch."""
    if not file.is_file():
        return {}
    record = json.loads(file.read_text())
    same = all(record["conditions"].get(key) == under[key] for key in ("gpu", "sources", "torch", "dry_run"))
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
    parser = argparse.ArgumentParser(prog="tests/gpu_check/check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; none: all")
    parser.add_argument("--dry-run", action="store_true", help="check what needs no GPU; takes under 3 minutes")
    parser.add_argument("--full", action="store_true", help="benchmark all cases, and torch.compile; needs --limit")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of each stage, instead of its own")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for JSON and log (default: benchmarks/results)")
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
    end = math.inf if args.limit else monotonic() + SECONDS * (DRY_RUN_FACTOR if args.dry_run else 1)
    under = conditions(args.dry_run, limit(args, "facts"))
    gpu = "dry-run" if args.dry_run else re.sub(r"[^a-z0-9]+", "-", str(under["gpu"]).lower()).strip("-")
    check = Check(under, out, f"{under['date'][:10]}-{gpu}", args.dry_run, args.full)
    if not under["gpu"] and not args.dry_run:
        facts(check)
        sys.exit("gpu_check: torch sees no GPU here; --dry-run checks what needs none")
    file = check.file("check.json")
    record = {"conditions": under, "stages": earlier_stages(file, under)}
    done: dict[str, Any] = {}
    try:
        for name in STAGES:
            if args.stages and name not in args.stages:
                continue
            seconds = limit(args, name)
            print(f"\n==== {name} (at most {seconds:.0f} s)", flush=True)
            start = monotonic()
            check.end = min(start + seconds, end)
            row = {"verdict": "running", "seconds": 0.0, "counts": {}, "notes": [], "table": []}
            record["stages"][name] = done[name] = row
            write_json(file, record)
            try:
                outcome = STAGES[name](check)
            except Exception as e:
                outcome = Outcome("failed", notes=[f"check.py itself: {type(e).__name__}: {e}"])
            row |= {key: getattr(outcome, key) for key in ("verdict", "counts", "notes", "table")} | outcome.more
            row["seconds"] = round(monotonic() - start, 1)
            write_json(file, record)
            for note in outcome.notes:
                print(f"{name}: {note}")
            print(f"---- {name}: {outcome.verdict}, {row['seconds']} s", flush=True)
            if outcome.stop:
                print("gpu_check: stops here, as nothing that follows could work")
                break
    finally:
        for name, row in done.items():
            if row["table"]:
                print("\n".join([f"\n==== {name}", *row["table"]]))
        wrong = [f"{name}: {note}" for name, row in done.items() if row["verdict"] != "passed" for note in row["notes"]]
        print("\n".join([f"\n{file}", *wrong, table(done)]), flush=True)
    return exit_status([row["verdict"] for row in done.values()])


def limit(args: argparse.Namespace, name: str) -> float:
    return args.limit or LIMITS[name] * (DRY_RUN_FACTOR if args.dry_run else 1)


if __name__ == "__main__":
    sys.exit(main())
