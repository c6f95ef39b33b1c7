"""The suite without an optional package: it says what is missing, and collects all else."""

import pytest
from conftest import NEEDED, ROOT

# Python in which the packages named by its first argument are not installed; then pytest.
PYTEST_WITHOUT = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in sys.argv[1].split(",") else find(name, *rest)
)
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *sys.argv[2:]]))
"""


OPTIONAL = [
    *NEEDED,
    *["matplotlib", "mkdocs", "onnx", "onnxruntime", "onnxscript", "openvino", "pycocotools", "safetensors"],
    "tensorboard",
]


@pytest.mark.slow
@pytest.mark.parametrize("packages", [["tqdm"], OPTIONAL], ids=["tqdm", "all"])
def test_files_that_need_a_missing_package_are_named(python, packages):
    every_file = [f"--rootdir={ROOT}", ROOT / "tests", f"--ignore={ROOT / 'tests/test_ops.py'}"]
    run = python("-c", PYTEST_WITHOUT, ",".join(packages), *every_file)
    assert run.returncode == 0, run.stdout
    for package in set(packages) & set(NEEDED):
        assert f"left out, as {package} is not installed: test_" in run.stdout
    assert "test_env.py::" in run.stdout
