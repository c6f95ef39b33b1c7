"""The code of the README and of the pages in docs runs, and every op is named."""

import importlib
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from ssd_ext import ops

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
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
    model = run((DOCS / "training.md").read_text())["model"]
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


def test_detector_of_its_page_finds_what_it_was_shown(capsys):
    names = run((DOCS / "detector.md").read_text())
    right = 0
    for found, box, label in zip(names["model"].detect(names["images"]), names["boxes"], names["labels"], strict=True):
        hits = ops.box_iou(found["boxes"][:1], box) > 0.5
        right += bool(hits.any() and found["labels"][0] == label)
    assert right >= 6, right  # of 8


def test_code_of_the_page_on_mixed_precision_runs():
    names = run((DOCS / "mixed_precision.md").read_text())
    assert names["rows"].dtype == torch.bfloat16
    assert names["loss"].dtype == torch.float32
    assert names["head"].weight.grad.isfinite().all()
    assert [image["boxes"].dtype for image in names["found"]] == [torch.float32] * 2


def test_code_of_the_page_on_several_gpus_runs(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    names = run((DOCS / "distributed.md").read_text())
    assert names["layer"].weight.grad.any()


def test_code_of_the_page_on_default_boxes_runs():
    names = run((DOCS / "ops" / "priors.md").read_text())
    assert names["priors"].shape == (sum(names["levels"]), 4)


def test_pages_describe_every_op():
    pages = "".join(page.read_text() for page in (DOCS / "ops").glob("*.md"))
    assert set(ops.__all__) <= set(re.findall(r"^::: .*?(\w+)$", pages, re.MULTILINE))
    references = {file.stem for file in (ROOT / "ssd_ext" / "reference").glob("[a-z]*.py")}
    assert set(re.findall(r'^ *--8<-- "ssd_ext/reference/(\w+)\.py"$', pages, re.MULTILINE)) == references


@pytest.mark.slow
def test_figures_are_those_of_the_script(tmp_path):
    pytest.importorskip("torchvision")
    pytest.importorskip("matplotlib")
    runpy.run_path(str(DOCS / "figures.py"))["main"](tmp_path)
    drawn = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(drawn) == {file.name for file in (DOCS / "figures").iterdir()}
    assert max(drawn.values()) < 150_000, drawn
    pages = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert all(f"figures/{name})" in pages for name in drawn)


def test_benchmark_page_shows_every_figure():
    pytest.importorskip("mkdocs")
    pytest.importorskip("matplotlib")
    from benchmarks.report import milliseconds

    lines = runpy.run_path(str(DOCS / "hooks.py"))["results"]().splitlines()
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        for result in json.loads(file.read_text()).get("results", []):
            if "contenders" in result:
                start, rows = f"| {result['case']} |", [row for row in result["contenders"] if "median_ms" in row]
            else:
                start = f"| {result['model']} | {result['kind']} | {result['batch']} | {result['what']} |"
                rows = [{**result, "median_ms": result["ms"]}]
            assert any(line.startswith(start) and all(milliseconds(row) in line for row in rows) for line in lines)
