"""Breaks the CUDA kernels one place at a time and sees whether the tests notice, in the emulator.

A mutant has one barrier removed (``__syncthreads``, ``__syncwarp``; a vote keeps the thread's own value)
or one ``<`` turned into ``<=``. All mutants are in one build, of a copy of the sources. Each runs the
cases of its room's ops in a process of its own, in every order of threads and against the CPU's bits, and
then the room's own tests. One that nothing notices must be explained below; exit status 1 otherwise.

    python tests/cuda_emulator/mutate.py [--rooms nms ...] [--kinds barrier less]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 8  # of CPU time that a call may take: a mutant that hangs is noticed
LARGE = 100_000  # bytes; cases above run in one order of threads only

BARRIER = re.compile(r"__sync(?:threads|warp)\(\);")
VOTE = re.compile(r"(__syncthreads_or)\((\w+)\)")
LESS = re.compile(r" < ")

# Device code that rooms share, and the room whose cases try it.
SHARED = {"mining": ["common/gpu_select.h"], "nms": ["common/gpu_tile.h"]}

# (file, line of source, which of them on that line, what) -> why nobody can notice.
_IDLE = "one more turn, in which no thread has an element"
_UNROLLED = "a register array one longer, whose last element nobody uses"
EXPLAINED: dict[tuple[str, str], str] = {
    ("detect.cu", "for (int r = 0; r < kPairs; ++r) {"): _UNROLLED,
    ("detect.cu", "for (int start = 0; start < classes && !full; start += kSumLanes) {"): _IDLE,
    ("detect.cu", "for (int64_t begin = 0; begin < priors; begin += kSelectThreads) {"): _IDLE,
    ("detect.cu", "for (int64_t begin = 0; begin < n; begin += kVisitThreads) {"): _IDLE,
    (
        "detect.cu",
        "if (thread < other && thread < size) {",
    ): "no thread is its own partner; behind the keys stand zeros",
    ("detect.cu", "if ((a < b) == ((thread & run) == 0)) {"): "keys differ, but for the zeros behind them",
    ("detect.cu", "while (count < most) {"): "a chunk is sorted of which no tile is looked at",
    (
        "detect.cu",
        "for (int tile = 0; tile * kTile < gathered && count < most; ++tile) {",
    ): "no box of that tile is valid",
}


@dataclass(frozen=True)
class Mutant:
    number: int
    room: str
    file: str
    line: int
    kind: str  # "barrier" or "less"
    source: str  # the line
    column: int

    def __str__(self):
        return f"{self.file}:{self.line}:{self.column + 1}: {self.kind}: {self.source}"


def mutate(source: str, room: str, file: str, first: int) -> tuple[str, list[Mutant]]:
    """The source with all its mutants, numbered from ``first``."""
    mutants: list[Mutant] = []

    def add(kind, row, line, match):
        mutants.append(Mutant(first + len(mutants), room, file, row, kind, line.strip(), match.start()))
        return mutants[-1].number

    lines = ['#include "mutants.h"']
    for row, line in enumerate(source.splitlines(), 1):
        code, comment = re.fullmatch(r"(.*?)(\s*//.*)?", line).groups()
        if "static_assert" not in code and "constexpr" not in code and "template" not in code:
            code = LESS.sub(lambda m, r=row, s=line: f" < ::emulator::Less{{{add('less', r, s, m)}}} > ", code)
        code = BARRIER.sub(
            lambda m, r=row, s=line: f"SSD_EXT_MUTANT_BARRIER({add('barrier', r, s, m)}, {m[0][:-1]});", code
        )
        code = VOTE.sub(
            lambda m, r=row, s=line: f"SSD_EXT_MUTANT_VOTE({add('barrier', r, s, m)}, {m[1]}, {m[2]})", code
        )
        lines.append(code + (comment or ""))
    return "\n".join(lines) + "\n", mutants


def build(tree: Path, rooms: list[str]) -> list[Mutant]:
    """Copy the sources to ``tree``, mutate the kernels there and compile; the module lies in its ssd_ext/."""
    for name in ("csrc", "ssd_ext", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    mutants: list[Mutant] = []
    for room in rooms:
        for file in (f"{room}/{room}.cu", *SHARED.get(room, ())):
            path = tree / "csrc" / file
            text, more = mutate(path.read_text(), room, path.name, len(mutants))
            path.write_text(text)
            mutants += more
    options = {
        "SSD_EXT_CUDA": "ON",
        "SSD_EXT_EMULATE": "CHECK",
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": tree / "ssd_ext",
    }
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # of this environment, active or not
    defines = [f"-D{key}={value}" for key, value in options.items()]
    for command in (
        ["cmake", "-S", tree, "-B", tree / "build", "-GNinja", *defines],
        ["cmake", "--build", tree / "build"],
    ):
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
        if run.returncode:
            sys.exit(run.stdout + run.stderr)
    return mutants


def run_room(room: str) -> None:
    """Raises if the kernels of a room do anything wrong."""
    import pytest
    import torch

    from benchmarks.cases import OPS
    from benchmarks.cases.spec import convert, tensors_in
    from ssd_ext import _C

    ops = [op for op in OPS if op.op.__module__.endswith("." + room)]
    runs = [
        (op.traffic(inputs, ()), op, case, convert(inputs, dtype))
        for op in ops
        for case in op.cases
        if not case.benchmark
        for inputs in [case.make(torch.Generator().manual_seed(20))]
        for dtype in case.dtypes
    ]
    for size, op, case, inputs in sorted(runs, key=lambda run: run[0]):
        expected = list(tensors_in(op.op(**inputs)))
        for seed in range(1 if size > LARGE else 3):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            _C.emulator.start(seed)
            result = list(tensors_in(op.op(**inputs)))
            _C.emulator.stop()
            for r, e in zip(result, expected, strict=True):
                if r.shape != e.shape or not torch.equal(r.nan_to_num(), e.nan_to_num()):
                    raise AssertionError(f"{op.name}, {case.name}, order {seed}: not the CPU's result")
    signal.setitimer(signal.ITIMER_PROF, 10 * SECONDS)
    os.chdir(ROOT_OF_TESTS)
    args = [
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "-k",
        "emulated",
        f"tests/test_{room}.py",
    ]
    code = pytest.main(args)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise AssertionError(f"tests/test_{room}.py fails")


ROOT_OF_TESTS = ""


def try_mutant(mutant: Mutant) -> str:
    """How a mutant is noticed; empty if it is not. Runs in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        from ssd_ext import _C

        _C.emulator.set_mutant(mutant.number)
        try:
            run_room(mutant.room)
        except Exception as e:
            os.write(writer, (str(e).splitlines() or ["?"])[0][:300].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        noticed = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return "hangs" if name == "SIGPROF" else f"crashes: {name}"
    return noticed


def main() -> int:
    global ROOT_OF_TESTS
    rooms = sorted(path.parent.name for path in (ROOT / "csrc").glob("*/*.cu"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="+", choices=rooms, default=rooms)
    parser.add_argument("--kinds", nargs="+", choices=["barrier", "less"], default=["barrier", "less"])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        tree = Path(folder)
        ROOT_OF_TESTS = folder
        mutants = [m for m in build(tree, arguments.rooms) if m.kind in arguments.kinds]
        print(f"{len(mutants)} mutants, built in {time.monotonic() - start:.0f} s", flush=True)
        sys.path[0] = folder
        import torch

        from benchmarks.cases import OPS  # noqa: F401  so that no mutant need import it

        torch.set_num_threads(1)
        with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
            survivors = []
            for mutant, noticed in zip(mutants, pool.imap(try_mutant, mutants), strict=True):
                print(f"{'noticed ' if noticed else 'SURVIVES'} {mutant}\n         {noticed}", flush=True)
                if not noticed:
                    survivors.append(mutant)
        counts = Counter((m.kind, m in survivors) for m in mutants)
        for kind in arguments.kinds:
            print(f"{kind}: {counts[kind, False]} of {counts[kind, False] + counts[kind, True]} noticed")
        unexplained = [m for m in survivors if (m.file, m.source) not in EXPLAINED]
        for mutant in survivors:
            why = EXPLAINED.get((mutant.file, mutant.source))
            print(f"survivor: {mutant}\n          {why or 'NOT EXPLAINED'}")
        print(f"{time.monotonic() - start:.0f} s in all")
        return len(unexplained) > 0


if __name__ == "__main__":
    sys.exit(main())
