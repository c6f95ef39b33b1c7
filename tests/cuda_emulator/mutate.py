"""Breaks the CUDA kernels one place at a time and sees whether the tests notice, in the emulator.

A mutant has one barrier removed (``__syncthreads``, ``__syncwarp``, ``__threadfence``; a vote keeps the thread's own
value) or one ``<`` turned into ``<=``. All mutants are in one build, of a copy of the sources. Each runs the
cases of its room's ops in a process of its own, in every order of threads and against the CPU's bits, and
then the room's own tests. One that nothing notices must be explained in survivors.txt; exit status 1 otherwise.

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

BARRIER = re.compile(r"__(?:sync(?:threads|warp)|threadfence)\(\);")
VOTE = re.compile(r"(__syncthreads_or)\((\w+)\)")
LESS = re.compile(r" < ")


@dataclass(frozen=True)
class Mutant:
    number: int
    file: str
    line: int
    kind: str  # "barrier" or "less"
    text: str  # of the broken line
    rooms: tuple[str, ...]  # whose kernels it is part of

    @property
    def key(self):
        return f"{self.file}: {self.text}"

    def __str__(self):
        return f"{self.file}:{self.line}: {self.text}"


def explained() -> dict[str, str]:
    """``FILE: BROKEN LINE`` -> why nobody can notice."""
    lines = (Path(__file__).parent / "survivors.txt").read_text().splitlines()[2:]
    return {line: reason.strip() for line, reason in zip(lines[::2], lines[1::2], strict=True)}


def mutate(path: Path, rooms: tuple[str, ...], first: int) -> tuple[str, list[Mutant]]:
    """The source with all its mutants, numbered from ``first``."""
    mutants: list[Mutant] = []

    def add(kind, row, match, broken):
        text = match.string[: match.start()] + broken + match.string[match.end() :]
        text = re.sub(r" < ::emulator::Less\{\d+\} > ", " < ", text)
        mutants.append(Mutant(first + len(mutants), path.name, row, kind, (text + comment).strip(), rooms))
        return mutants[-1].number

    lines = ['#include "mutants.h"']
    for row, line in enumerate(path.read_text().splitlines(), 1):
        code, comment = re.fullmatch(r"(.*?)(\s*//.*|)", line).groups()
        if not re.search(r"^\s*#|static_assert|constexpr|template", code):
            code = LESS.sub(lambda m, r=row: f" < ::emulator::Less{{{add('less', r, m, ' <= ')}}} > ", code)
        code = BARRIER.sub(
            lambda m, r=row: f"SSD_EXT_MUTANT_BARRIER({add('barrier', r, m, '/* barrier */;')}, {m[0][:-1]});", code
        )
        code = VOTE.sub(
            lambda m, r=row: f"SSD_EXT_MUTANT_VOTE({add('barrier', r, m, f'/* vote */ {m[2]}')}, {m[1]}, {m[2]})", code
        )
        lines.append(code + comment)
    return "\n".join(lines) + "\n", mutants


def build(tree: Path, rooms: list[str]) -> list[Mutant]:
    """Copy the sources to ``tree``, mutate the kernels there and compile; the module lies in its ssd_ext/."""
    for name in ("csrc", "ssd_ext", "opinfo", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    mutants: list[Mutant] = []
    kernels = {room: tree / "csrc" / room / f"{room}.cu" for room in rooms}
    for path in [*kernels.values(), *sorted((tree / "csrc" / "common").glob("gpu_*.h"))]:
        users = [room for room, file in kernels.items() if path == file or f"common/{path.name}" in file.read_text()]
        text, more = mutate(path, tuple(users), len(mutants))
        path.write_text(text)
        mutants += more if users else []
    options = {
        "SSD_EXT_CUDA": "ON",
        "SSD_EXT_EMULATE": "CHECK",
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": tree / "ssd_ext",
    }
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # of this environment, active or not
    defines = [f"-D{key}={value}" for key, value in options.items()]
    for command in (
        ["cmake", "-S", tree, "-B", tree / "build" / "mutants", "-GNinja", *defines],
        ["cmake", "--build", tree / "build" / "mutants"],
    ):
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
        if run.returncode:
            sys.exit(run.stdout + run.stderr)
    return mutants


def check(op, name: str, inputs: dict, seeds: int) -> None:
    """Raises unless an op gives the CPU's bits in the emulator."""
    import torch

    from opinfo.spec import tensors_in
    from ssd_ext import _C

    expected = list(tensors_in(op.op(**inputs)))
    for seed in range(seeds):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        _C.emulator.start(seed)
        result = list(tensors_in(op.op(**inputs)))
        _C.emulator.stop()
        for r, e in zip(result, expected, strict=True):
            if r.shape != e.shape or not torch.equal(r.nan_to_num(), e.nan_to_num()):
                raise AssertionError(f"{op.name}, {name}, order {seed}: not the CPU's result")


def run_room(room: str) -> None:
    """Raises if the kernels of a room do anything wrong."""
    import pytest
    import torch

    from opinfo import OPS

    ops = [op for op in OPS if op.op.__module__.endswith("." + room)]
    runs = [
        (op.traffic(inputs, ()), op, case, inputs)
        for op in ops
        for case in op.cases
        if not case.benchmark
        for inputs in [case.make(torch.Generator().manual_seed(20))]
    ]
    for size, op, case, inputs in sorted(runs, key=lambda run: run[0]):
        check(op, case.name, inputs, seeds=1 if size > LARGE else 3)
    for op in ops:
        inputs = op.full_size_case.make(torch.Generator().manual_seed(20))
        check(op, "full size", inputs, seeds=1)
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
            for room in mutant.rooms:
                run_room(room)
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
        built = build(tree, arguments.rooms)
        mutants = [m for m in built if m.kind in arguments.kinds]
        print(f"{len(mutants)} mutants, built in {time.monotonic() - start:.0f} s", flush=True)
        sys.path[0] = folder
        import torch

        from opinfo import OPS  # noqa: F401  so that no mutant need import it

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
        reasons = explained()
        for mutant in survivors:
            print(f"survivor: {mutant}\n          {reasons.get(mutant.key, 'NOT EXPLAINED')}")
        stale = [m for m in mutants if m.key in reasons and m not in survivors]
        for mutant in stale:
            print(f"explained in survivors.txt, but noticed: {mutant}")
        files, keys = {m.file for m in built}, {m.key for m in built}
        gone = [key for key in reasons if key.partition(": ")[0] in files and key not in keys]
        for key in gone:
            print(f"explained in survivors.txt, but no mutant: {key}")
        print(f"{time.monotonic() - start:.0f} s in all")
        return any(m.key not in reasons for m in survivors) or bool(stale or gone)


if __name__ == "__main__":
    sys.exit(main())
