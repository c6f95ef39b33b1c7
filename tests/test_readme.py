"""The README's code runs, and its table names every op."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from ssd_ext import ops

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def run(text):
    """The names after the one block of Python in a page."""
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(code, "a page", "exec"), names)
    return names


def test_code_runs(capsys):
    names = run(README)
    assert names["labels"].shape == (2, 5000)
    assert (names["labels"][0] == 3).any()
    assert not names["labels"][1].any()
    assert len(names["image"]["labels"]) == 200


def test_table_names_every_op():
    table = README.split("## The ops")[1].split("\n\nRules")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(ops.__all__)


def test_code_of_the_training_page_runs():
    pytest.importorskip("torchvision")
    model = run((ROOT / "docs" / "training.md").read_text())["model"]
    (found,) = model.eval()([torch.rand(3, 50, 70)])
    assert set(found) == {"boxes", "scores", "labels"}


def test_code_of_the_torchvision_page_runs():
    pytest.importorskip("torchvision")
    (found,) = run((ROOT / "docs" / "torchvision.md").read_text())["detections"]
    assert set(found) == {"boxes", "scores", "labels"}


def test_commands_of_the_readme_have_these_options():
    pytest.importorskip("torchvision")
    for line in re.findall(r"^python -m ssd_ext\.(?:train|evaluate|detect) .*", README, re.MULTILINE):
        _, _, module, *arguments = line.split()
        assert not any(word.startswith("/") for word in arguments)
        parser = importlib.import_module(module).parser()
        parser.parse_args(arguments)
