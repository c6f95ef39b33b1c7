"""A shim: CMakeLists.txt holds every source, flag and architecture."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_build"))
from backend import MIN_TORCH, TORCH_REQUIREMENT, installed_torch, torch_version  # noqa: E402

FORWARDED = ("SSD_EXT_CUDA", "SSD_EXT_SANITIZE", "SSD_EXT_TORCH_DIR")


def find_torch():
    """The torch package to build against, or an error of one sentence."""
    spec = importlib.util.find_spec("torch")
    package = os.environ.get("SSD_EXT_TORCH_DIR") or installed_torch() or (spec and spec.submodule_search_locations[0])
    if not package:
        sys.exit(
            f"ssd_ext: no torch in this environment: pip install '{TORCH_REQUIREMENT}' first, "
            "or build without --no-build-isolation"
        )
    version = torch_version(package)
    if not version or version < MIN_TORCH:
        found = f"{version[0]}.{version[1]}" if version else "one without stable-ABI headers"
        sys.exit(f"ssd_ext: needs {TORCH_REQUIREMENT} to build, found {found} in {package}")
    return str(package)


def parallel_jobs():
    """Compilers to run at once: one per core, and 2 GiB of memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return os.environ.get("MAX_JOBS") or str(max(1, min(cores, memory >> 31)))


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        compiler = os.environ.get("CXX", "").split()[:1] or ["c++"]
        if not any(map(shutil.which, [*compiler, "g++", "clang++"])):
            sys.exit(f"ssd_ext: no C++17 compiler: looked for {compiler[0]}, g++ and clang++ (set CXX to name another)")
        options = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
        options["SSD_EXT_TORCH_DIR"] = find_torch()
        options["Python_EXECUTABLE"] = sys.executable
        options["CMAKE_LIBRARY_OUTPUT_DIRECTORY"] = str(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        build = Path(self.build_temp).resolve()
        # pip builds in the source tree: another run's choices (say, CUDA off) must not be inherited.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = shutil.which("cmake") or "cmake"
        configure = [cmake, "-S", str(ROOT), "-B", str(build), *(f"-D{k}={v}" for k, v in options.items())]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        subprocess.check_call(configure + os.environ.get("CMAKE_ARGS", "").split())
        subprocess.check_call([cmake, "--build", str(build), "--parallel", parallel_jobs()])


setup(ext_modules=[Extension("ssd_ext._C", [])], cmdclass={"build_ext": CMakeBuild})
