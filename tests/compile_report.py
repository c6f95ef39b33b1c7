"""What nvcc makes of every kernel for the H100: registers, memory, occupancy, loads in flight, width of accesses.

python tests/compile_report.py              compile csrc/*/*.cu, print the table and the faults
python tests/compile_report.py build.log    only look for spills, in the log of a build with -Xptxas=-v

Columns that need a word; a range is from the least to the most:

loads          global loads in flight: issued in a straight run of instructions before one of them is used. Of each
               innermost loop that loads, its longest run; of a kernel without such a loop, its longest
KB/SM          bytes of those loads, times the threads that a multiprocessor runs at a time. The H100's memory is
               busy from about 32 on
streamed       loads in flight of the source line that STREAMING names
instr/element  instructions of the loop around them for each element that a lane loads by that line; "<=" where a branch
               can skip some, "+ loops" where the instructions of loops inside would come on top
accesses       bytes that a lane moves. Two lanes fill a sector of memory (32 bytes) with stores of 16 bytes; with
               narrower stores, a row that begins anywhere leaves sectors that are written in part
"""

import ctypes
import importlib.util
import json
import math
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
from dataclasses import dataclass, field
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = "sm_90"
MOST_THREADS = 2048  # of a multiprocessor

# Where the design moves four values at once: of the tensors' type (T: 16 bytes, halves 8), of the outputs' where that
# is the kernel's last type (O), or of the type that it is computed in (C: 16 bytes).
WIDE = {
    "boxes::encode_kernel": "LDG:T STG:O",
    "boxes::decode_kernel": "LDG:T STG:O",
    "boxes::box_iou_kernel": "LDG:T",
    "matching::match_kernel": "LDG:T STG:T LDS:C STS:C",
    "nms::chunk_kernel": "LDG:T LDS:C STS:C",
    "multibox_loss::settle_kernel": "LDG:C",
    "multibox_loss::deltas_gradient_kernel": "LDG:C",
    "soft_nms::soft_nms_kernel": "LDG:T STG:C",
}

# What streams: kernel (a regular expression that its name begins with), LDG or STG, what an element is, and text of
# the source line that loads or stores it. Of these loads, LOADS_IN_FLIGHT or more are in flight at a time; none of
# these stores is narrower than 16 bytes, of halves 8. An element is of the tensors' type (T) or int64.
STREAMING = [
    ("boxes::encode_kernel", "STG", "T", "gpu::store_four(deltas"),
    ("boxes::decode_kernel", "STG", "T", "gpu::store_four(boxes"),
    ("detect::collect_kernel", "LDG", "T", "< classes ? *row"),
    ("matching::match_kernel", "STG", "T", "gpu::store_four(static_cast<T*>(out.deltas)"),
    ("mining::hard_negatives_kernel", "LDG", "int64", "gpu::key_of(labels[row + i]"),
    (r"multibox_loss::rank_kernel<multibox_loss::LogitsRow<\w+, \d+, (?!3)", "LDG", "T", "values[j] = is_class("),
    ("multibox_loss::settle_kernel", "LDG", "int64", "gpu::key_of(label[i]"),
    (r"multibox_loss::logits_gradient_kernel<\w+, true", "STG", "T", "reinterpret_cast<Wide*>(to)[i]"),
    (r"multibox_loss::deltas_gradient_kernel<\w+, true", "STG", "T", "gpu::store_four(gradient"),
]
LOADS_IN_FLIGHT = 4

# What makes arithmetic on the GPU equal to the CPU's, to the bit.
EXACT = ("-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false")

# Dynamic shared memory, which the launchers choose: the most bytes a block of theirs asks for.
DYNAMIC_SHARED = {
    "detect::finish_kernel": 40 * 1024,  # the cached scores of a class
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
    code: sass.Code = field(default_factory=sass.Code)
    blocks: int | None = None  # that one multiprocessor runs at a time

    @property
    def template(self):
        return self.name.split("<")[0]

    @property
    def dynamic_shared(self):
        """0 if there is none, None if DYNAMIC_SHARED does not tell."""
        uses_shared = self.code.named("LDS", "STS", "ATOMS")
        return DYNAMIC_SHARED.get(self.template, None if uses_shared and not self.shared else 0)

    @property
    def is_half(self):
        return "<half" in self.name or "<bfloat16" in self.name

    @property
    def streams(self):
        """What STREAMING says of this kernel."""
        return [claim for name, *claim in STREAMING if re.match(name, self.name)]

    def size_of(self, element):
        """Bytes of an element of STREAMING."""
        if element == "int64" or "<double" in self.name:
            return 8
        return 2 if self.is_half else 4


def find_tool(name):
    """A program of this Python, of Triton (CUDA's disassembler comes with every torch for CUDA) or of PATH."""
    triton = importlib.util.find_spec("triton")
    bundled = [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else [])]
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), *bundled, os.environ["PATH"]]))


def missing():
    """What the report needs and this machine lacks."""
    programs = ("nvcc", "cmake", "ninja", "c++filt", "nvdisasm")
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
    by_symbol = {kernel.symbol: kernel for kernel in kernels}
    for section in run(find_tool("nvdisasm"), "-gi", cubin).split("\n\t.section\t")[1:]:
        name = section.split(",")[0]
        if name.startswith(".text."):
            by_symbol[name.removeprefix(".text.")].code = sass.read(section)
        elif name.startswith(".nv.info."):
            bound = section.partition("EIATTR_MAX_THREADS")[2].split(".word")[1:4]
            if bound:
                threads = math.prod(int(size.split()[0], 16) for size in bound)
                by_symbol[name.removeprefix(".nv.info.")].threads = threads


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


def inexact_flags(command):
    """Those of EXACT that the command lacks, or undoes later on."""
    last = {flag.partition("=")[0]: flag for flag in command}
    return [flag for flag in EXACT if last.get(flag.partition("=")[0]) != flag]


def compile_kernels(source, command, folder, *more_flags):
    """The kernels of one file, compiled by a command of compile_commands()."""
    cubin = folder / f"{source.stem}.cubin"
    flags = command[: command.index("-c")]
    log = run(*flags, *more_flags, "-cubin", "-lineinfo", "-Xptxas=-v", source, "-o", cubin)
    kernels = read_ptxas(log)
    read_cubin(cubin, kernels)
    return kernels


def compile_all(commands, folder):
    """Every kernel of csrc/*/*.cu, by name."""
    left_out = sorted(str(path) for path in set(ROOT.glob("csrc/*/*.cu")) - set(commands))
    if left_out:
        raise ValueError(f"CMakeLists.txt does not compile {', '.join(left_out)}")
    for source, command in commands.items():
        if inexact_flags(command):
            raise ValueError(f"CMakeLists.txt compiles {source} without {' '.join(inexact_flags(command))}")
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

# What nvcc flushes to zero under -ftz=false, too, in results that are exact all the same: an instruction, and the
# one that made an operand of it.
FLUSHED = [
    (r"F2I\.FTZ\.U32\.TRUNC\.NTZ ", r"(VIADD|IADD3) .*, 0xffffffe\b"),  # division of integers: 2^32 / y, from below
    (r"FADD\.FTZ R\d+, -R\d+, -RZ$", r"FFMA .*, -1$"),  # 1 / x: the error of MUFU.RCP
    (r"FMUL\.FTZ ", r"MUFU\.RSQ "),  # a square root: the first guess
]


def inexact(code):
    """Opcodes, and subroutines of CUDA, that flush denormals to zero or round otherwise than the CPU.

    MUFU.RCP and MUFU.RSQ only begin the division or square root that other instructions make exact.
    """
    found = set()
    written_by = {}  # the last instruction that wrote each register
    for i in code.instructions:
        text = f"{i.opcode} {i.operands}"
        target, *sources = re.findall(r"\bR\d+\b", i.operands) or [None]
        makers = [written_by.get(register, "") for register in sources]
        exact = any(re.match(a, text) and any(re.match(b, maker) for maker in makers) for a, b in FLUSHED)
        if re.match(r"MUFU\.(?!RCP|RSQ)", text) or (".FTZ" in i.opcode and not exact):
            found.add(i.opcode)
        found |= set(re.findall(r"__cuda\w+_ftz_\w+", i.operands))
        if target and i.operands.startswith(target):
            written_by[target] = text
    return found


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
    for spin in sorted({i.opcode for i in kernel.code.named("ATOMS") if "SPIN" in i.opcode}):
        yield f"spins over an atomic in shared memory: {spin}"
    if "rough" not in kernel.name:
        for name in sorted(inexact(kernel.code)):
            yield f"does not compute what the CPU computes: {name}"
    for claim in kernel.streams:
        yield from streaming_faults(kernel, *claim)

    offsets = defaultdict(set)
    for i in kernel.code.named("LDG", "STG", "LDS", "STS"):
        base, offset = i.address
        offsets[i.name, i.bytes, base].add(offset)
    for claim in WIDE.get(kernel.template, "").split():
        instruction, of = claim.split(":")
        is_half = kernel.is_half if of == "T" else of == "O" and kernel.name.endswith(("half>", "bfloat16>"))
        wide = 8 if is_half else 16
        if not any((instruction, wide) == key[:2] for key in offsets):
            yield f"has no {instruction} of {wide} bytes"
    one_by_one = {
        (instruction, size)
        for (instruction, size, _), found in offsets.items()
        if instruction in ("LDG", "STG") and any({o, o + size, o + 2 * size, o + 3 * size} <= found for o in found)
    }
    for instruction, size in sorted(one_by_one):
        yield f"moves four neighbours of {size} bytes one by one: {instruction}"


def streaming_faults(kernel, instruction, element, text):
    accesses = [i for i in kernel.code.named(instruction) if i.is_from(text)]
    if not accesses:
        yield f"has no {instruction} in a line with: {text}"
    elif instruction == "STG":
        narrowest = min(i.bytes for i in accesses)
        if narrowest < (8 if kernel.is_half else 16):
            yield f"streams with stores of {narrowest} bytes a lane: {text}"
    else:
        in_flight, _ = kernel.code.streamed(text, kernel.size_of(element))
        if in_flight < LOADS_IN_FLIGHT:
            yield f"streams with {in_flight} of {LOADS_IN_FLIGHT} loads in flight: {text}"


def spread(values):
    """4, or 1-16 for the least and the most."""
    ordered = sorted(set(values))
    return "-".join(map(str, ordered[:1] + ordered[1:][-1:]))


def load_cells(kernel):
    runs = kernel.code.in_flight()
    in_flight = [sum(kernel.code.instructions[index].bytes for index in run) for run in runs]
    streamed = [
        kernel.code.streamed(text, kernel.size_of(element))
        for instruction, element, text in kernel.streams
        if instruction == "LDG"
    ]
    return (
        spread(map(len, runs)),
        spread(size * kernel.blocks * kernel.threads // 1024 for size in in_flight),
        " ".join(str(count) for count, _ in streamed),
        " ".join(cost for _, cost in streamed),
    )


def access_cell(kernel):
    sizes = defaultdict(list)
    for i in kernel.code.named("LDG", "STG", "LDS", "STS"):
        sizes[i.name].append(i.bytes)
    return " ".join(f"{name} {spread(of_name)}" for name, of_name in sorted(sizes.items()))


def table(kernels):
    """One line a kernel."""
    sizes = ("shared", "dynamic", "local", "spills")
    loads = ("loads", "KB/SM", "streamed", "instr/element")
    columns = ("kernel", "registers", "threads", "blocks/SM", "occupancy", *sizes, *loads, "accesses")
    lines = [columns]
    for k in kernels:
        unknown = k.dynamic_shared is None
        occupancy = f"{'<= ' * unknown}{k.blocks * k.threads / MOST_THREADS:.0%}"
        sizes = (k.shared, "?" if unknown else k.dynamic_shared, k.stack, k.spills)
        lines.append((k.name, k.registers, k.threads, k.blocks, occupancy, *sizes, *load_cells(k), access_cell(k)))
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
