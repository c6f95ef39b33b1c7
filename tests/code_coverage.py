"""Which lines and branches of csrc and ssd_ext the tests run, as one table, the worst file first.

    pip install coverage gcovr
    python tests/code_coverage.py

GCC builds a copy of the sources twice, in build/coverage: for the CPU, and with the emulator, where the .cu are C++.
The first build runs all tests but the slow ones, of these the command lines', the second those of the emulator, in one
order of threads and without what repeats calls to compare them. Nothing is inlined, so that no copy counts on its own;
of a template's instances and the SIMD levels that one counts which takes most of a line's branches, and no branch that
only an exception takes.

Exit status 1 below 95 % of lines or 85 % of branches, and where a line of csrc that no test runs is not explained in
uncovered.txt. --report prints the table of the last run again.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "coverage"
TREE = WORK / "tree"
LEAST = {"lines": 95, "branches": 85}

QUICK = "not slow or (test_commands or test_training) and not benchmark"
REPEATS = "opcheck or finite_differences or float64_reference or every_output or planted"
# Options of CMake, flags of the compiler, tests (-k, which knows marks too). Threads must not lose each other's counts;
# the emulator has one thread, and would not link with atomics in a kernel.
BUILDS = {
    "ordinary": (["-DSSD_EXT_CUDA=OFF"], "-fprofile-update=atomic", f"not emulated and ({QUICK})"),
    "emulated": (["-DSSD_EXT_CUDA=ON", "-DSSD_EXT_EMULATE=CHECK"], "", f"emulated-0 and not slow and not ({REPEATS})"),
}
COUNTED = "--coverage -O1 -fno-inline -Dalways_inline=__unused__ -w"


def pytest_configure(config):
    """As a plugin of the tests: a process counts until its end, for which pytest-xdist gives it ten seconds only."""
    from xdist import workermanage

    workermanage.NodeManager.EXIT_TIMEOUT = 600


def run(*command, check=True, **options):
    """Run a command in the copy of the sources; unless told otherwise, its failure ends the script."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # of this environment, active or not
    environment = {**os.environ, "PATH": path, **options.pop("environment", {})}
    done = subprocess.run(list(map(str, command)), cwd=TREE, env=environment, text=True, **options)
    if check and done.returncode:
        sys.exit(f"{done.stdout or ''}{' '.join(map(str, command))}: failed")
    return done.returncode == 0


def build(name):
    """Compile one of BUILDS; only what has changed since the last time."""
    options, flags, _ = BUILDS[name]
    flags = f"<FLAGS> {COUNTED} {flags}"  # behind those of CMakeLists.txt: the last -O counts
    compile_object = f"<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> {flags} -o <OBJECT> -c <SOURCE>"
    options = [*options, f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILE_OBJECT={compile_object}"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run("cmake", "-S", TREE, "-B", WORK / name, "-GNinja", "-DCMAKE_MODULE_LINKER_FLAGS=--coverage", *options, **quiet)
    run("cmake", "--build", WORK / name, **quiet)


def test(name):
    """Run its tests, and tell whether they passed; its module replaces that of the build before."""
    for module in (WORK / name).glob("_C*.so"):
        shutil.copy(module, TREE / "ssd_ext")
    return run(
        *(sys.executable, "-m", "coverage", "run", "-m", "pytest", "-q", "-p", "code_coverage", "-n", "auto"),
        *("--dist", "worksteal", "-k", BUILDS[name][2]),
        environment={"PYTHONPATH": f"{TREE}{os.pathsep}{TREE / 'tests'}", "COVERAGE_FILE": str(WORK / "python")},
        check=False,
    )


def measure():
    """Build, test and leave the tools' reports in WORK; tells which builds failed a test."""
    shutil.rmtree(TREE, ignore_errors=True)
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, tracked):
        (TREE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, TREE / name)
    for name in BUILDS:
        build(name)
    for counts in [*WORK.rglob("*.gcda"), *WORK.glob("python*")]:
        counts.unlink()
    failed = [name for name in BUILDS if not test(name)]
    data = f"--data-file={WORK / 'python'}"
    run(sys.executable, "-m", "coverage", "combine", "-q", data, WORK)
    run(sys.executable, "-m", "coverage", "xml", "-q", data, "-o", WORK / "ssd_ext.xml")
    options = ["--filter", "csrc/", "--exclude-throw-branches", "--exclude-unreachable-branches"]
    for name in BUILDS:
        report = ["--cobertura", WORK / f"{name}.xml", WORK / name]
        run(sys.executable, "-m", "gcovr", "--root", TREE, *options, *report)
    return failed


class Line(NamedTuple):
    """Whether a test runs it, and its branches: those taken, and all."""

    runs: bool
    taken: int
    branches: int


def read(folder, *reports):
    """Reports in Cobertura's format, which both tools write: file -> number -> Line.

    GCC counts the copies of a line apart, by function: the one that takes most of its branches counts.
    """
    files = defaultdict(dict)
    for found in (found for report in reports for found in ElementTree.parse(report).iter("class")):
        lines = files[f"{folder}/{found.get('filename').removeprefix(folder + '/')}"]
        for copy in found.iter("line"):
            taken, branches = re.search(r"\((\d+)/(\d+)\)", copy.get("condition-coverage", "(0/0)")).groups()
            line = Line(copy.get("hits") != "0", int(taken), int(branches))
            same = lines.setdefault(int(copy.get("number")), line)
            best = max(line, same, key=lambda line: (line.taken / max(line.branches, 1), line.branches))
            lines[int(copy.get("number"))] = best._replace(runs=line.runs or same.runs)
    return files


def percentages(lines):
    """Of the lines, and of their branches."""

    def percent(part, whole):
        return 100 * part / whole if whole else 100.0

    return {
        "lines": percent(sum(line.runs for line in lines), len(lines)),
        "branches": percent(sum(line.taken for line in lines), sum(line.branches for line in lines)),
    }


def ranges(numbers):
    """``{1, 2, 3, 7}`` -> ``1-3 7``."""
    first = [n for n in sorted(numbers) if n - 1 not in numbers]
    last = [n for n in sorted(numbers) if n + 1 not in numbers]
    return " ".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(first, last, strict=True))


def missed(lines):
    return {number for number, line in lines.items() if not line.runs}


def unexplained(files):
    """What is wrong with uncovered.txt: two lines each, FILE: LINE and why no test runs it."""
    text = (ROOT / "tests/uncovered.txt").read_text().splitlines()[2:]
    explained = {line for line in text if not line.startswith(" ")}
    sources = {name: (TREE / name).read_text().splitlines() for name in files}
    found = {f"{name}: {sources[name][n - 1].strip()}" for name, lines in files.items() for n in missed(lines)}
    there = {f"{name}: {line.strip()}" for name, lines in sources.items() for line in lines}
    found = {line for line in found if re.search(r"\w", line.partition(": ")[2])}  # a brace: exceptions clean up there
    yield from (f"no test runs this, nor does uncovered.txt explain it: {line}" for line in sorted(found - explained))
    yield from (f"explained in uncovered.txt, but gone: {line}" for line in sorted(explained - there))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only print the table of the last run")
    failed = [] if parser.parse_args().report else measure()
    faults = [f"tests of the {name} build failed" for name in failed]
    reports = {
        "csrc": read("csrc", *(WORK / f"{name}.xml" for name in BUILDS)),
        "ssd_ext": read("ssd_ext", WORK / "ssd_ext.xml"),
    }
    for folder, files in reports.items():
        print(f"\n{'file':44} lines   branches  lines that no test runs")
        for name, lines in sorted(files.items(), key=lambda file: percentages(file[1].values())["lines"]):
            part = percentages(lines.values())
            print(f"{name:44} {part['lines']:5.1f} %  {part['branches']:5.1f} %  {ranges(missed(lines))}")
        total = percentages([line for lines in files.values() for line in lines.values()])
        print(f"{'all of ' + folder:44} {total['lines']:5.1f} %  {total['branches']:5.1f} %")
        faults += [f"{folder}: fewer than {LEAST[of]} % of {of}" for of in LEAST if total[of] < LEAST[of]]
    faults += unexplained(reports["csrc"])
    print("", *faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
