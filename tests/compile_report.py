"""What nvcc makes of every kernel for the H100: registers, memory, width of accesses, occupancy.

python tests/compile_report.py              compile csrc/*/*.cu, print the table and the faults
python tests/compile_report.py build.log    only look for spills, in the log of a build with -Xptxas=-v
"""

import ctypes
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = "sm_90"
MOST_THREADS = 2048  # of a multiprocessor

# Where the design moves four values at once: of the tensors' type (T: 16 bytes, halves 8), or of the
# type that it is computed in (C: 16 bytes).
WIDE = {
    "boxes::encode_kernel": "LDG:T STG:T",
    "boxes::decode_kernel": "LDG:T STG:T",
    "boxes::box_iou_kernel": "LDG:T",
    "matching::threshold_kernel": "LDG:T STG:T LDS:C STS:C",
    "matching::force_kernel": "LDG:T STG:T",
    "nms::gather_kernel": "LDG:T STG:C",
    "nms::earlier_kernel": "LDG:C",
    "nms::sweep_kernel": "LDG:C STG:C",
    "nms::suppress_kernel": "LDG:C",
    "soft_nms::soft_nms_kernel": "LDG:T STG:C",
}

# Dynamic shared memory, which the launchers choose: the most bytes a block of theirs asks for.
DYNAMIC_SHARED = {
    "detect::select_kernel": 40 * 1024,  # the cached scores
    "mining::hard_negatives_kernel": 40 * 1024 + 1816,  # the cached keys, and struct Selection
    "multibox_loss::mine_kernel": 40 * 1024 + 1816,
}


@dataclass
class Kernel:
    """A kernel as compiled for one architecture; sizes in bytes."""

    name: str
    symbol: str
    architecture: str
    registers: int
    barriers: int
    shared: int  # static
    stack: int  # local memory, of the kernel and what it calls
    spills: int
    threads: int = 0  # of a block, by __launch_bounds__; 0: not bounded
    code: str = ""  # disassembled
    blocks: int | None = None  # that one multiprocessor runs at a time

    @property
    def template(self):
        return self.name.split("<")[0]

    @property
    def dynamic_shared(self):
        """0 if there is none, None if DYNAMIC_SHARED does not tell."""
        uses_shared = re.search(r"\b(LDS|STS|ATOMS)\b", self.code)
        return DYNAMIC_SHARED.get(self.template, None if uses_shared and not self.shared else 0)

    @property
    def is_half(self):
        return "<half" in self.name or "<bfloat16" in self.name


def find_tool(name):
    """A program of this Python, of Triton (CUDA's disassemblers come with every torch for CUDA) or of PATH."""
    triton = importlib.util.find_spec("triton")
    bundled = [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else [])]
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), *bundled, os.environ["PATH"]]))


def missing():
    """What the report needs and this machine lacks."""
    programs = ("nvcc", "cmake", "ninja", "c++filt", "cuobjdump", "nvdisasm")
    lacking = [name for name in programs if not find_tool(name)]
    return lacking + ["pybind11"] * (not importlib.util.find_spec("pybind11"))


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


# ---- reading -------------------------------------------------------------------------------------


def readable(symbols):
    """boxes::encode_kernel<float>, for each mangled symbol."""
    names = []
    for name in run("c++filt", input="\n".join(symbols)).splitlines():
        name = re.sub(r"\(anonymous namespace\)::|\bssd_ext::|^void |\b__(nv_)?(?=half|bfloat16)", "", name)
        names.append(re.sub(r"\([\w:]+\)(?=-?\d)", "", name).split("(")[0])  # the casts of enumerators first
    return names


def read_ptxas(log):
    """The kernels in the output of ``ptxas -v``."""
    _, *reports = log.split("Compiling entry function ")
    found = [re.match(r"'(\w+)' for '(sm_\w+)'", report).groups() for report in reports]
    names = readable([symbol for symbol, _ in found])
    kernels = []
    for report, name, (symbol, architecture) in zip(reports, names, found, strict=True):

        def total(pattern, report=report):
            return sum(map(int, re.findall(pattern, report)))

        if not re.search(r"Used \d+ registers", report) or "bytes spill stores" not in report:
            raise ValueError(f"no word of registers or spills in this report of ptxas: {report}")
        counts = {
            "registers": total(r"Used (\d+) registers"),
            "barriers": total(r"used (\d+) barriers"),
            "shared": total(r"(\d+) bytes smem"),
            "stack": total(r"(\d+) bytes stack frame"),
            "spills": total(r"(\d+) bytes spill"),
        }
        kernels.append(Kernel(name, symbol, architecture, **counts))
    return kernels


def read_cubin(cubin, kernels):
    """Fills in what only the compiled file tells: the bound on threads, and the code."""
    dump = run(find_tool("cuobjdump"), "-elf", "-sass", cubin)
    by_symbol = {kernel.symbol: kernel for kernel in kernels}
    for section in re.split(r"^\.nv\.info\.", dump, flags=re.M)[1:]:
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(\w+) (\w+) (\w+)", section)
        if bound:
            x, y, z = (int(size, 16) for size in bound.groups())
            by_symbol[section.split(maxsplit=1)[0]].threads = x * y * z
    for section in re.split(r"^\s*Function : ", dump, flags=re.M)[1:]:
        symbol, code = section.split(maxsplit=1)
        by_symbol[symbol].code = code


# ---- compiling -----------------------------------------------------------------------------------


def compile_commands(folder):
    """CMake's own command for each .cu of the extension, for one architecture."""
    major, minor = ARCHITECTURE.removeprefix("sm_")
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    options = {
        "SSD_EXT_CUDA": "ON",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    run(find_tool("cmake"), "-S", ROOT, "-B", folder, "-GNinja", *definitions, env=environment)
    entries = json.loads((folder / "compile_commands.json").read_text())
    return {Path(e["file"]): shlex.split(e["command"]) for e in entries if e["file"].endswith(".cu")}


def compile_kernels(source, command, folder):
    """The kernels of one file, compiled by a command of compile_commands()."""
    cubin = folder / f"{source.stem}.cubin"
    flags = command[: command.index("-c")]
    log = run(*flags, "-cubin", "-Xptxas=-v", source, "-o", cubin)
    kernels = read_ptxas(log)
    read_cubin(cubin, kernels)
    return kernels


def compile_all(commands, folder):
    """Every kernel of csrc/*/*.cu, by name."""
    left_out = sorted(str(path) for path in set(ROOT.glob("csrc/*/*.cu")) - set(commands))
    if left_out:
        raise ValueError(f"CMakeLists.txt does not compile {', '.join(left_out)}")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        files = pool.map(lambda item: compile_kernels(*item, folder), commands.items())
        kernels = sorted((k for of_file in files for k in of_file), key=lambda k: k.name)
    count_blocks(kernels, folder)
    return kernels


def count_blocks(kernels, folder):
    """Sets how many blocks of each kernel a multiprocessor runs at a time, by cuda_occupancy.h."""
    library = folder / "occupancy.so"
    run(find_tool("nvcc"), "-shared", "-Xcompiler=-fPIC", "-cudart=none", ROOT / "tests/occupancy.cpp", "-o", library)
    count = ctypes.CDLL(str(library)).blocks_per_multiprocessor
    for k in kernels:
        k.blocks = count(k.threads, k.registers, k.barriers, k.shared, k.dynamic_shared or 0)


# ---- judging -------------------------------------------------------------------------------------

ACCESS = re.compile(r"\b((?:LD|ST)[GS])((?:\.\w+)*) [^;]*?\[([^][]+?)(?:\+(-?0x[0-9a-f]+))?\] ?[,;]")
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def accesses(kernel):
    """(instruction, bytes, base register, offset) of each access to global and shared memory."""
    for instruction, modifiers, base, offset in ACCESS.findall(kernel.code):
        size = next((BYTES[m] for m in modifiers.split(".") if m in BYTES), 4)
        yield instruction, size, base, int(offset or "0", 16)


def faults(kernel):
    """What the design does not allow, in words."""
    if not kernel.threads:
        yield "has no __launch_bounds__"
    if kernel.spills:
        yield f"spills {kernel.spills} bytes of registers"
    if kernel.stack:
        yield f"keeps {kernel.stack} bytes a thread in local memory"
    if kernel.blocks == 0:
        yield "does not fit a multiprocessor"
    for spin in set(re.findall(r"\bATOMS\S*SPIN\S*", kernel.code)):
        yield f"spins over an atomic in shared memory: {spin}"

    offsets = defaultdict(set)
    for instruction, size, base, offset in accesses(kernel):
        offsets[instruction, size, base].add(offset)
    for claim in WIDE.get(kernel.template, "").split():
        instruction, of = claim.split(":")
        wide = 8 if of == "T" and kernel.is_half else 16
        if not any((instruction, wide) == key[:2] for key in offsets):
            yield f"has no {instruction} of {wide} bytes"
    one_by_one = {
        (instruction, size)
        for (instruction, size, _), found in offsets.items()
        if instruction in ("LDG", "STG") and any({o, o + size, o + 2 * size, o + 3 * size} <= found for o in found)
    }
    for instruction, size in sorted(one_by_one):
        yield f"moves four neighbours of {size} bytes one by one: {instruction}"


def table(kernels):
    """One line a kernel."""
    sizes = ("shared", "dynamic", "local", "spills")
    columns = ("kernel", "registers", "threads", "blocks/SM", "occupancy", *sizes, "widest accesses, bytes")
    lines = [columns]
    for k in kernels:
        widest = defaultdict(int)
        for instruction, size, _, _ in accesses(k):
            widest[instruction] = max(widest[instruction], size)
        unknown = k.dynamic_shared is None
        occupancy = f"{'<= ' * unknown}{k.blocks * k.threads / MOST_THREADS:.0%}"
        sizes = (k.shared, "?" if unknown else k.dynamic_shared, k.stack, k.spills)
        wide = " ".join(f"{instruction} {size}" for instruction, size in sorted(widest.items()))
        lines.append((k.name, k.registers, k.threads, k.blocks, occupancy, *sizes, wide))
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines, strict=True)]
    alignments = "<" + ">" * (len(columns) - 2) + "<"
    return "\n".join(
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(line, alignments, widths, strict=True)).rstrip()
        for line in lines
    )


def check_log(path):
    """Spills in a log: told for every architecture, refused on the H100's."""
    kernels = read_ptxas(Path(path).read_text())
    spilling = [k for k in kernels if k.spills]
    for k in spilling:
        print(f"{k.name} spills {k.spills} bytes on {k.architecture}")
    architectures = sorted({k.architecture for k in kernels})
    print(f"{len(kernels)} kernels for {' '.join(architectures)}: {len(spilling)} spill")
    return ARCHITECTURE in architectures and not any(k.architecture == ARCHITECTURE for k in spilling)


def check_sources():
    """The table of the kernels for the H100, and their faults."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_all(compile_commands(Path(folder)), Path(folder))
    print(table(kernels))
    found = [f"{k.name} {fault}" for k in kernels for fault in faults(k)]
    print("\n".join(found) or "no faults")
    return not found


if __name__ == "__main__":
    sys.exit(not (check_log(sys.argv[1]) if sys.argv[1:] else check_sources()))
