"""A shim: CMakeLists.txt holds every source, flag and architecture."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_build"))
from backend import MIN_TORCH, TORCH_REQUIREMENT, installed_torch, torch_version  # noqa: E402

FORWARDED = ("SSD_EXT_CUDA", "SSD_EXT_SANITIZE", "SSD_EXT_EMULATE")
ISOLATION = "or build without --no-build-isolation"


def stop(reason):
    """End with one sentence, where an exception would bury it under a traceback."""
    sys.exit(f"ssd_ext: {reason}")


def find_torch():
    """The torch package to build against."""
    spec = importlib.util.find_spec("torch")
    package = os.environ.get("SSD_EXT_TORCH_DIR") or installed_torch() or (spec and spec.submodule_search_locations[0])
    if not package:
        stop(f"no torch in this environment: pip install '{TORCH_REQUIREMENT}' first, {ISOLATION}")
    version = torch_version(package)
    if not version or version < MIN_TORCH:
        found = f"{version[0]}.{version[1]}" if version else "one without stable-ABI headers"
        stop(f"needs {TORCH_REQUIREMENT} to build, found {found} in {package}")
    return package


def find_tool(name):
    """A program of this environment, which need not be the activated one, or of PATH."""
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def check_compiler():
    """Tell before CMake does, in forty lines."""
    named = os.environ.get("CXX", "").split()[:1]
    if named and not shutil.which(named[0]):
        stop(f"no C++ compiler: CXX names {named[0]}, which is not there")
    if not named and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        stop("no C++17 compiler: looked for c++, g++ and clang++ on PATH (set CXX to name another)")


def parallel_jobs():
    """Compilers to run at once: one per core, and 2 GiB of memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return os.environ.get("MAX_JOBS") or str(max(1, min(cores, memory >> 31)))


def run(step, command):
    """A step of CMake's, which prints its own errors."""
    if subprocess.call(command) != 0:
        stop(f"CMake could not {step}: the reason stands above")


class CMakeBuild(build_ext):
    """Runs CMake, which leaves the module where setuptools wants it."""

    def build_extension(self, ext):
        check_compiler()
        options = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
        options["SSD_EXT_TORCH_DIR"] = find_torch()
        if not importlib.util.find_spec("pybind11"):
            stop(f"no pybind11 in this environment: pip install pybind11 first, {ISOLATION}")
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        if not cmake:
            stop(f"no cmake: pip install cmake first, {ISOLATION}")
        options["Python_EXECUTABLE"] = sys.executable
        options["CMAKE_LIBRARY_OUTPUT_DIRECTORY"] = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        if ninja:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        # setuptools would build for an editable installation in a temporary folder, all anew each time.
        build = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()
        # pip builds in the source tree: another run's choices (say, CUDA off) must not be inherited.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [cmake, "-S", ROOT, "-B", build, *(f"-D{name}={value}" for name, value in options.items())]
        run("configure the build", configure + ["-GNinja"] * bool(ninja) + os.environ.get("CMAKE_ARGS", "").split())
        run("compile", [cmake, "--build", build, "--parallel", parallel_jobs()])


setup(ext_modules=[Extension("ssd_ext._C", [])], cmdclass={"build_ext": CMakeBuild})
