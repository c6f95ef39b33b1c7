"""Fixtures of the suite."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if WORKERS > 1:  # each its part of the cores; threads that spin while they wait would take them from the others
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // WORKERS)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
if not any((ROOT / "ssd_ext").glob("_C*.so")):  # not built in this tree: the installed ssd_ext is meant
    sys.path = [path for path in sys.path if Path(path).resolve() != ROOT] + [str(ROOT)]

from progress import pytest_addoption, pytest_configure  # noqa: E402, F401

from opinfo.spec import convert  # noqa: E402
from ssd_ext import _C  # noqa: E402

# Files that cannot be imported without an optional package; of the others, single tests skip themselves.
NEEDED = {
    "torchvision": ("commands", "data", "evaluation", "integrations", "models", "training", "weights"),
    "tqdm": ("commands", "training"),
    "hypothesis": ("detect", "matching", "mining", "multibox_loss", "nms", "soft_nms"),
}
LEFT_OUT = {
    package: [f"test_{name}.py" for name in names]
    for package, names in NEEDED.items()
    if importlib.util.find_spec(package) is None
}
collect_ignore = [file for files in LEFT_OUT.values() for file in files]


def pytest_terminal_summary(terminalreporter):
    for package, files in LEFT_OUT.items():
        terminalreporter.write_line(f"left out, as {package} is not installed: {', '.join(files)}", red=True)
    if LEFT_OUT:
        terminalreporter.write_line('pip install -e ".[train,export,test,bench]" installs them')


# A build with the emulator (tests/cuda_emulator) runs the CUDA kernels on the CPU, in three orders of threads.
EMULATED = [f"emulated-{seed}" for seed in range(3)] if "emulator" in _C.build_info() else []
GPUS = EMULATED or (["cuda"] if torch.cuda.is_available() and "cuda" in _C.build_info() else [])
DEVICES = ["cpu", *GPUS[:1]]
SIMD_LEVELS = []
_widest = _C.simd_level()
for _name in ("baseline", "avx2", "avx512"):
    try:
        _C.set_simd_level(_name)
        SIMD_LEVELS.append(_name)
    except ValueError:
        pass
_C.set_simd_level(_widest)


@contextlib.contextmanager
def emulated(name):
    """Until it ends, ops on CPU tensors run their CUDA kernels in the emulator."""
    _C.emulator.start(int(name.removeprefix("emulated-")))
    try:
        yield
    finally:
        _C.emulator.stop()


@pytest.fixture(params=DEVICES)
def device(request):
    """The device for a test's tensors. The emulated one takes those of the CPU."""
    if request.param not in EMULATED:
        yield request.param
        return
    with emulated(request.param):
        yield "cpu"


needs_gpu = pytest.mark.skip(reason="needs a GPU and a CUDA build, or the emulator")


GPU_PARAMS = GPUS or [pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(params=GPU_PARAMS)
def gpu(request):
    """A function that runs an op on the GPU, emulated or not, whose inputs and outputs are on the CPU."""

    def run(op, inputs):
        if request.param in EMULATED:
            with emulated(request.param):
                return op(**inputs)
        return convert(op(**convert(inputs, device=request.param)), device="cpu")

    return run


def at_and_beside(numbers):
    """Each number, the next below and the next above."""
    return torch.stack([numbers, numbers.nextafter(numbers - 1), numbers.nextafter(numbers + 1)]).T.flatten().tolist()


@pytest.fixture
def simd():
    """A function that switches the SIMD level; the level is restored afterwards."""
    before = _C.simd_level()
    yield _C.set_simd_level
    _C.set_simd_level(before)


@pytest.fixture
def threads():
    """A function that sets torch's thread count; it is restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def python(tmp_path):
    """A function that runs another Python, which imports the same ssd_ext; keywords are environment variables."""

    def run(*arguments, **environment):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20)
