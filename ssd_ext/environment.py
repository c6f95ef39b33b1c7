"""How this installation was built and where it runs: what ``ssd_ext env`` prints."""

import os
import platform
import re
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for ``architectures`` (``"80-real,90"``, as CMake writes them) runs on a GPU.

    Machine code (``-real``) serves its own major version from its minor version on; an entry without
    the suffix holds PTX too, which serves every later GPU. An ``a`` after the number serves that GPU
    alone, an ``f`` its family.
    """
    for entry in architectures.split(","):
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real)?", entry)
        if found is None:
            raise ValueError(f"architectures must be as CMake names them, such as 90-real, got {entry}")
        major, minor, special, real = found.groups()
        arch = int(major), int(minor)
        if capability == arch or (special != "a" and capability[0] == arch[0] and capability >= arch):
            return True
        if not real and not special and capability >= arch:
            return True
    return False


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"


def _gpus(architectures: str | None) -> list[str]:
    if not torch.cuda.is_available():
        return ["none visible to torch"]
    out = []
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        served = architectures is not None and covers(architectures, capability)
        name = f"{torch.cuda.get_device_name(i)}, capability {capability[0]}.{capability[1]}"
        out.append(f"{name}, {'covered' if served else 'NOT covered'} by this build")
    return out


def report() -> str:
    """The report as text, one fact a line."""
    import ssd_ext
    from ssd_ext import _C

    info = _C.build_info()
    forced = os.environ.get("SSD_EXT_SIMD")
    architectures = info.get("cuda_architectures")
    facts = [
        ("ssd_ext", f"{ssd_ext.__version__}, {PACKAGE}"),
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("OS", platform.platform()),
        ("CPU", _cpu()),
        ("SIMD level", _C.simd_level() + (" (forced by SSD_EXT_SIMD)" if forced else "")),
        ("threads", str(torch.get_num_threads())),
        ("torch", f"{torch.__version__} at run time; built with {info['torch_headers']} headers"),
        ("stable ABI", f"of torch {info['torch_target']}"),
        ("torch's CUDA", torch.version.cuda or "none (a CPU-only torch)"),
        ("built with CUDA", f"yes, toolkit {info['cuda']}" if "cuda" in info else "no"),
        *([("architectures", architectures)] if architectures else []),
        *(("GPU", gpu) for gpu in _gpus(architectures)),
        ("compiler", info["compiler"]),
        *((name, info[name]) for name in ("sanitizers", "emulator") if name in info),
    ]
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(f"{name + ':':{width}}{fact}" for name, fact in facts)
