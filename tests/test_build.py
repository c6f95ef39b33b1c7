"""The build's own promises: what it asks of pip, what it ships, and how it fails."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_ext import _C, ops

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ("setuptools", "pybind11", "cmake", "ninja")


@pytest.fixture
def sources(tmp_path):
    """A copy of the tree, in which a test may build."""
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", ".*", "build", "dist", "venv*", "data")
    shutil.copytree(ROOT, tree, ignore=skipped)
    return tree


@pytest.fixture
def fake_torch(tmp_path):
    """A function that makes a folder which looks like a torch of some version to the build."""

    def make(major, minor, site=tmp_path / "site"):
        header = site / "torch/include/torch/headeronly/version.h"
        header.parent.mkdir(parents=True)
        header.write_text(f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n")
        return site / "torch"

    return make


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(ROOT / "_build")
    import backend

    yield backend
    del sys.modules["backend"]


@pytest.mark.parametrize(
    ("installed", "asks"), [(None, True), ((2, 10), True), ((2, 11), False), ((2, 14), False), ((3, 0), False)]
)
def test_asks_pip_for_torch_only_where_there_is_none(backend, fake_torch, monkeypatch, tmp_path, installed, asks):
    site = tmp_path / "site"
    if installed:
        fake_torch(*installed)
    monkeypatch.delenv("SSD_EXT_TORCH_DIR", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda scheme: str(site))
    monkeypatch.setattr(backend._setuptools, "get_requires_for_build_wheel", lambda config_settings: ["x"])
    assert backend.get_requires_for_build_wheel() == ["x"] + ["torch>=2.11"] * asks
    assert backend.get_requires_for_build_editable() == ["x"] + ["torch>=2.11"] * asks


def build(tree, *arguments, **environment):
    """Run setup.py in ``tree``; a variable of None is unset."""
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def sentence_of(failed):
    """The last line of a failed build: ours, and no traceback before it."""
    assert failed.returncode != 0
    assert "Traceback" not in failed.stderr, failed.stderr
    return failed.stderr.strip().splitlines()[-1]


def require_build_tools():
    for name in BUILD_TOOLS:
        pytest.importorskip(name)
    pytest.importorskip("setuptools", minversion="77")  # the licence field of pyproject.toml


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PATH": "/nonexistent", "CXX": None}, "no C++17 compiler: looked for c++, g++ and clang++ on PATH"),
        ({"CXX": "/nonexistent/g++ -m64"}, "no C++ compiler: CXX names /nonexistent/g++, which is not there"),
        ({"SSD_EXT_TORCH_DIR": "{old}"}, "needs torch>=2.11 to build, found 2.10 in {old}"),
        ({"SSD_EXT_TORCH_DIR": "/nonexistent"}, "found one without stable-ABI headers in /nonexistent"),
        ({"SSD_EXT_CUDA": "YES"}, "CMake could not configure the build: the reason stands above"),
    ],
)
def test_failure_is_one_sentence(sources, fake_torch, environment, expected):
    require_build_tools()
    old = fake_torch(2, 10)
    environment = {k: v and v.format(old=old) for k, v in environment.items()}
    failed = build(sources, "build_ext", **environment)
    assert expected.format(old=old) in sentence_of(failed)
    if "SSD_EXT_CUDA" in environment:
        assert "SSD_EXT_CUDA must be AUTO, ON or OFF, got YES" in failed.stderr


@pytest.mark.slow
def test_cuda_on_without_nvcc_is_an_error(sources):
    require_build_tools()
    failed = build(sources, "build_ext", SSD_EXT_CUDA="ON", CUDACXX="/nonexistent/nvcc")
    assert "CMake could not configure" in sentence_of(failed)
    assert "SSD_EXT_CUDA=ON, but no working nvcc" in failed.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_unreadable_architectures_are_an_error(sources):
    require_build_tools()
    failed = build(sources, "build_ext", SSD_EXT_CUDA="ON", TORCH_CUDA_ARCH_LIST="Hopper")
    assert "CMake could not configure" in sentence_of(failed)
    assert 'TORCH_CUDA_ARCH_LIST must look like "8.0;9.0+PTX", got "Hopper"' in failed.stderr


@pytest.mark.slow
def test_source_distribution_has_every_source(sources, tmp_path):
    """.ci/wheel builds a wheel from it."""
    require_build_tools()
    shipped = tmp_path / "shipped"
    made = build(sources, "sdist", "--dist-dir", str(tmp_path))
    assert made.returncode == 0, made.stderr
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), shipped)
    (tree,) = shipped.iterdir()
    for folder in ("csrc", "ssd_ext", "_build"):
        expected = {path.relative_to(sources) for path in (sources / folder).rglob("*") if path.is_file()}
        assert expected == {path.relative_to(tree) for path in (tree / folder).rglob("*") if path.is_file()}


def types_of(function):
    """Of the arguments, then of the result."""
    arguments = function.args.posonlyargs + function.args.args
    return [ast.unparse(t).lower() for t in (*(a.annotation for a in arguments), function.returns)]


def test_stub_of_the_extension_is_shipped_and_true():
    stub = ast.parse(Path(_C.__file__).with_name("_C.pyi").read_text())
    described = {f.name: types_of(f) for f in stub.body if isinstance(f, ast.FunctionDef)}
    names = {name for name in vars(_C) if not name.startswith("__")} - {"emulator"}
    # pybind11 begins each docstring with the signature
    signatures = [ast.parse(f"def {getattr(_C, name).__doc__.splitlines()[0]}: ...").body[0] for name in names]
    assert described == {f.name: types_of(f) for f in signatures}


def test_a_type_checker_reads_a_call_of_every_op():
    text = (ROOT / "tests/public_types.py").read_text()
    assert set(re.findall(r"assert_type\(ops\.(\w+)\(", text)) == set(ops.__all__)


def test_pre_commit_has_the_versions_of_ci():
    pins = [
        re.findall(r"([\w-]+)==([\w.]+)", (ROOT / f).read_text()) for f in (".ci/lint.txt", ".pre-commit-config.yaml")
    ]
    in_ci, in_hooks = map(set, pins)
    assert {"ruff", "clang-format"} <= dict(in_hooks).keys()
    assert in_hooks == {(tool, version) for tool, version in in_ci if tool != "mypy"}, "mypy is the environment's own"
