"""The bug report, and the sentence for an extension that does not load."""

import pytest
import torch

import ssd_ext
from ssd_ext import _C
from ssd_ext._loading import why_not_loaded
from ssd_ext.cli import main
from ssd_ext.environment import _gpus, covers, report


def test_report_tells_the_build_and_the_machine(simd):
    simd("baseline")
    text = report()
    info = _C.build_info()
    facts = dict(line.split(":", 1) for line in text.splitlines())
    assert facts["ssd_ext"].strip().startswith(ssd_ext.__version__)
    assert facts["SIMD level"].strip().startswith("baseline")
    assert torch.__version__ in facts["torch"]
    assert info["torch_headers"] in facts["torch"]
    assert facts["stable ABI"].strip() == "of torch 2.11.0"
    assert facts["built with CUDA"].split(",")[0].strip() == ("yes" if "cuda" in info else "no")
    assert ("architectures" in facts) == ("cuda" in info)
    assert {"Python", "OS", "CPU", "threads", "torch's CUDA", "GPU", "compiler"} <= set(facts)


def test_a_tree_that_is_built_but_not_installed_imports(python):
    code = """
from importlib import metadata
known = metadata.version
def version(name):
    if name == "ssd_ext":
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
import ssd_ext
print(ssd_ext.__version__)
"""
    assert python("-c", code).stdout == "unknown\n"


def test_the_command_prints_it(capsys):
    main(["env"])
    assert capsys.readouterr().out == report() + "\n"


@pytest.mark.slow
def test_it_needs_nothing_of_training_and_names_a_forced_level(python):
    code = "import sys; sys.modules['torchvision'] = sys.modules['tqdm'] = None; from ssd_ext.cli import main; main()"
    for line in (("-c", code, "env"), ("-m", "ssd_ext", "env")):
        done = python(*line, SSD_EXT_SIMD="baseline")
        assert "baseline (forced by SSD_EXT_SIMD)" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("architectures", "capability", "served"),
    [
        ("90-real", (9, 0), True),
        ("90-real", (8, 0), False),
        ("90-real", (10, 0), False),
        ("80-real", (8, 6), True),  # a later minor version of the same major
        ("86-real", (8, 0), False),
        ("75-real,80-real,90", (12, 0), True),  # by PTX
        ("90", (8, 9), False),
        ("90a-real", (9, 0), True),
        ("100a-real", (10, 3), False),
        ("100f-real", (10, 3), True),
        ("120f", (13, 0), False),
    ],
)
def test_architectures_against_a_gpu(architectures, capability, served):
    assert covers(architectures, capability) == served


def test_each_gpu_is_told_with_whether_the_build_serves_it(monkeypatch):
    capabilities = [(9, 0), (7, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", "AB".__getitem__)
    first, second = _gpus("80-real,90-real")
    assert first == "A, capability 9.0, covered by this build"
    assert second == "B, capability 7.0, NOT covered by this build"
    assert [gpu.split(", ")[-1] for gpu in _gpus(None)] == ["NOT covered by this build"] * 2


def test_why_not_loaded(tmp_path):
    package = tmp_path / "ssd_ext"
    package.mkdir()
    error = ImportError("undefined symbol: aoti_torch_x")
    assert "_C is missing" in why_not_loaded(error, package)
    (tmp_path / "CMakeLists.txt").touch()
    assert f"pip install -e {tmp_path}" in why_not_loaded(error, package)
    (package / "_C.cpython-36m-x86_64-linux-gnu.so").touch()
    assert "built for another Python (_C.cpython-36m" in why_not_loaded(error, package)
    (package / "_C.abi3.so").touch()
    told = why_not_loaded(error, package)
    assert f"under torch {torch.__version__}" in told
    assert "undefined symbol: aoti_torch_x" in told
