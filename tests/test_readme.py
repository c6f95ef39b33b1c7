"""The code of the README and of the pages in docs runs, and every op is named."""

import importlib
import inspect
import json
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import opinfo
from benchmarks import readme, report
from benchmarks.measure import GRAPH, OURS
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
    lines = runpy.run_path(str(DOCS / "hooks.py"))["results"]().splitlines()
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        for result in json.loads(file.read_text()).get("results", []):
            if "contenders" in result:
                start, rows = f"| {result['case']} |", [row for row in result["contenders"] if "median_ms" in row]
            else:
                start = f"| {result['model']} | {result['kind']} | {result['batch']} | {result['what']} |"
                rows = [{**result, "median_ms": result["ms"]}]
            assert any(
                line.startswith(start) and all(report.milliseconds(row) in line for row in rows) for line in lines
            )


# ---- the README's table and picture of the benchmark ---------------------------------------------


def test_table_is_written_from_the_results():
    assert readme.filled(README) == README, "run python benchmarks/readme.py"


def test_every_row_has_the_fastest_peer():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (\S+) \| (?:\S* \| )?(.+?) \(", readme.written(), re.MULTILINE)
    cpu, cuda = readme.measured("cpu"), readme.measured("cuda")
    assert len(cpu) == len(readme.ROWS) == len(set(readme.ROWS))
    for (op, case, ours, peer), (result, _) in zip(rows, [*cpu, *cuda], strict=True):
        assert (op, case) == (result["op"], result["case"])
        times = {row["name"]: row for row in result["contenders"] if "median_ms" in row}
        assert ours == report.milliseconds(times.pop(OURS))
        times.pop(GRAPH, None)
        name, row = min(times.items(), key=lambda item: item[1]["median_ms"])
        assert peer == f"{report.shown_name(name)} {report.milliseconds(row)}"


def record(date, case="SSD300 B=32", op="decode", device="cpu", quick=False, gpu=None, peers=(("peer", 2.0, False),)):
    """As run.py writes it; ours takes a millisecond."""
    contenders = [
        {"name": name, "status": "timed", "median_ms": ms, "disturbed": disturbed}
        for name, ms, disturbed in ((OURS, 1.0, False), *peers)
    ]
    best = min(peers, key=lambda peer: peer[1])[0]
    conditions = {"device": device, "cpu": "A CPU", "gpu": gpu, "threads": 2, "simd": "avx2", "memory_gb_per_s": 10.0}
    conditions |= {"versions": {"torch": "2"}, "commit": "abc", "date": date, "quick": quick, "l2_flushed": None}
    result = {"op": op, "case": case, "contenders": contenders, "best_peer": best}
    return {"conditions": conditions, "results": [result]}


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Let the README's table have one row, and be written from these records."""

    def record_all(*records):
        for i, made in enumerate(records):
            (tmp_path / f"{i}.json").write_text(json.dumps(made))
        monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path)
        monkeypatch.setattr(readme, "ROWS", [("decode", "SSD300 B=32")])

    return record_all


def test_table_takes_the_newest_full_run_on_a_cpu(recorded):
    recorded(
        record("2026-11-22 23:00+00:00", peers=[("yesterday", 2.0, False)]),
        record("2026-11-23 06:00+01:00", peers=[("older by its zone", 3.0, False)]),
        record("2026-11-23 05:30+00:00", peers=[("newest", 4.0, False)]),
        record("2026-11-24 05:30+00:00", quick=True),
        record("2026-11-24 05:30+00:00", device="cuda", gpu="A GPU"),
        record("2026-11-24 05:30+00:00", case="SSD300 B=8"),
    )
    written = readme.written()
    assert "| `decode` | SSD300 B=32 | 1.00 | newest 4.00 (4.00x) |  |  |" in written
    assert "A CPU, avx2, 2 threads, torch 2:\n\n- `decode`: commit abc, 2026-11-23 05:30+00:00, memory" in written
    assert "memory copy 10.0 GB/s, without torch.compile\n" in written
    assert "\n\nOn a GPU:\n\n| op" in written and "| `decode` | SSD300 B=32 | 1.00 |  | peer 2.00 (2.00x) |" in written
    assert "\n\nA GPU, 2 threads, torch 2" in written


def test_a_disturbed_peer_stays_the_fastest_and_is_marked(recorded):
    recorded(record("2026-11-23 05:30+00:00", peers=[("torchvision", 9.0, False), ("noisy", 3.0, True)]))
    assert "| 1.00 | noisy 3.00~ (3.00x~) | 9.00 (9.00x) |" in readme.written()


def test_a_row_that_no_run_has_is_an_error(recorded):
    recorded(record("2026-11-23 05:30+00:00", case="SSD300 B=8"))
    with pytest.raises(LookupError, match=r"no file in benchmarks/results has .*SSD300 B=32"):
        readme.written()


def test_text_around_the_table_stays():
    filled = readme.filled(f"before\n{readme.BEGIN}old{readme.END}\nafter")
    assert filled.startswith(f"before\n{readme.BEGIN}\n\nMedian") and filled.endswith(f"{readme.END}\nafter")
    with pytest.raises(ValueError, match="unpack"):
        readme.filled("a README without the comments")


def test_grep_finds_every_case_of_the_benchmark():
    rooms = [(inspect.getsource(room), room.OPS) for room in vars(opinfo).values() if hasattr(room, "OPS")]
    found = {
        (op.name, case.name): f'("{case.name}"' in re.sub(r"\(\s+", "(", source)
        for source, ops_here in rooms
        for op in ops_here
        for case in op.cases
        if case.benchmark
    }
    assert set(readme.ROWS) <= set(found)
    assert [row for row, literal in found.items() if not literal] == []


def texts(picture):
    """All that is written in an SVG, in no order: matplotlib's versions draw in their own."""
    return sorted("".join(e.itertext()) for e in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text"))


def test_picture_is_drawn_from_the_results(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture")
    for device, picture in readme.PICTURES.items():
        readme.draw_picture(device, tmp_path / "drawn.svg")
        assert texts(picture) == texts(tmp_path / "drawn.svg"), "run python benchmarks/readme.py"
        assert {result["op"] for result, _ in readme.measured(device)} < set(texts(picture))
        assert picture.stat().st_size < 60_000
