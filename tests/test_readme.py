"""The README's code runs, and its table names every op."""

import re
from pathlib import Path

import torch

from ssd_ext import ops

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_code_runs(capsys):
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["labels"].shape == (2, 5000)
    assert (names["labels"][0] == 3).any()
    assert not names["labels"][1].any()
    assert len(names["image"]["labels"]) == 200


def test_table_names_every_op():
    table = README.split("## The ops")[1].split("\n\nRules")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(ops.__all__)
