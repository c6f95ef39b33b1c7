"""What this machine is and has, and how to bring what it lacks; imports no torch itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.record import ask, commit, cpu_model, sources

FACTS = """
import json, torch
facts = {"torch": torch.__version__, "cuda_runtime": torch.version.cuda}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    facts |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "multiprocessors": gpu.multi_processor_count}
    facts |= {"gpu_memory_gb": round(gpu.total_memory / 1e9, 1), "l2_mb": gpu.L2_cache_size >> 20}
print(json.dumps(facts))
"""
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")


def toolkit_program(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, in CUDA_HOME or beside nvcc."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    folders = [os.path.join(home, "bin") for home in [*homes, "/usr/local/cuda"] if home]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def environment_program(name: str) -> str | None:
    """A program of this Python's environment, which need not be the activated one, or of PATH."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def compiler() -> str | None:
    return shutil.which((os.environ.get("CXX") or "c++").split()[0]) or shutil.which("g++")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def nvidia_smi(*fields: str) -> str | None:
    told = ask("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return told.splitlines()[0] if told else None


def driver() -> str | None:
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", version.read_text()) if version.is_file() else None
    return nvidia_smi("driver_version") or (found and found[1])


def conditions(dry_run: bool, limit: float) -> dict[str, Any]:
    """What the record of a check holds; SystemExit where torch does not import within ``limit`` seconds."""
    try:
        told = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        sys.exit(f"gpu_check: importing torch takes more than {limit:.0f} s here")
    if told.returncode:
        reason = told.stderr.strip().splitlines()[-1:]
        sys.exit(f"gpu_check: {sys.executable} cannot use torch; set PYTHON to the Python that holds it: {reason}")
    nvcc, cxx, clocks = toolkit_program("nvcc"), compiler(), nvidia_smi(*CLOCKS)
    clocks = clocks and ", ".join(f"{name} {value}" for name, value in zip(CLOCKS, clocks.split(", "), strict=False))
    release = re.search(r"V(\d+\.\d+\.\d+)", (nvcc and ask(nvcc, "--version")) or "")
    return {
        "gpu": None,
        "capability": None,
        **json.loads(told.stdout.splitlines()[-1]),
        "clocks": clocks,
        "driver": driver(),
        "nvcc": release and release[1],
        "compiler": ((cxx and ask(cxx, "--version")) or "").partition("\n")[0] or None,
        "python": platform.python_version(),
        "cpu": f"{cpu_model()}, {cores()} cores",
        "commit": commit(),
        "sources": sources(),
        "date": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        "dry_run": dry_run,
    }


# Whether a program or file is there, and how to bring it.
TOOLS = {
    "compiler": (compiler, "install g++ or set CXX"),
    "Python.h": (
        lambda: os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")),
        "install the headers of this Python, python3-dev",
    ),
    **{
        name: (lambda name=name: toolkit_program(name), f"install {part} or set CUDA_HOME")
        for name, part in {
            "nvcc": "the CUDA toolkit",
            "ncu": "Nsight Compute",
            "compute-sanitizer": "that part of the CUDA toolkit (cuda-sanitizer)",
        }.items()
    },
}


def version_of(name: str) -> tuple[int, ...]:
    """Of a Python package, or of cmake, which may be either; () where it is missing."""
    try:
        told = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        program = environment_program(name) if name == "cmake" else None
        told = program and ask(program, "--version")
    return tuple(map(int, re.search(r"\d+(\.\d+)*", told)[0].split("."))) if told else ()


def lacking(*needed: str) -> list[str]:
    """A sentence for each of ``needed`` that this machine lacks: a name of ``TOOLS``, or ``package>=version``."""
    sentences = []
    for name in needed:
        if name in TOOLS:
            is_there, how = TOOLS[name]
            if not is_there():
                sentences.append(f"no {name}: {how}")
            continue
        package, _, least = name.partition(">=")
        found = version_of(package)
        if found < tuple(map(int, least.split("."))):
            bring = f"install '{name}', from a wheel that was downloaded elsewhere if there is no network"
            sentences.append(f"needs {name}, found {'.'.join(map(str, found)) or 'none'}: {bring}")
    return sentences
