"""The code of the README and of the pages in docs runs, and every op is named."""

import inspect
import json
import re
import runpy
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import opinfo
from benchmarks import readme, report
from benchmarks.measure import GRAPH, OURS
from ssd_ext import MultiBoxLoss, ops
from ssd_ext.priors import PriorSpec

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "examples" / "README.md"]


def python_of(page):
    """The blocks of Python in a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run(page):
    """The names after all blocks of Python in a page, one after another."""
    torch.manual_seed(0)
    names = {}
    for code in python_of(ROOT / page):
        exec(compile(code, page, "exec"), names)
    return names


def test_code_of_every_page_is_run_by_a_test():
    tests = "".join((ROOT / "tests" / name).read_text() for name in ("test_readme.py", "test_export.py"))
    with_code = [str(page.relative_to(ROOT)) for page in PAGES if python_of(page)]
    assert len(with_code) > 8
    assert [page for page in with_code if f'"{page}"' not in tests] == []


def test_what_the_readme_trains_is_what_it_detects(capsys):
    names = run("README.md")
    assert names["loc"] > 0 and names["conf"] > 0
    target_labels = names["target_labels"]
    assert target_labels.shape == (2, 5000)
    assert (target_labels[0] == 3).any() and not target_labels[1].any()
    first, second = ops.unpad(*names["found"])
    assert first["labels"].tolist() == [3]
    torch.testing.assert_close(first["boxes"], torch.tensor([[0.1, 0.2, 0.5, 0.6]]), atol=1e-3, rtol=0)
    assert len(second["labels"]) == 0


def test_table_names_every_op():
    table = README.split("## The ops")[1].split("\n\nRules")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(ops.__all__)


def test_code_of_the_page_on_backbones_runs(capsys):
    pytest.importorskip("torchvision")
    names = run("docs/backbones.md")
    assert {name.split(".")[0] for name in names["report"].skipped} == {"classifier"}
    for model in (names["model"], names["pyramid"]):
        assert [tuple(size) for size in model.prior_spec.feature_sizes] == [(20, 20), (10, 10), (5, 5), (3, 3)]
        (found,) = model.eval()([torch.rand(3, 50, 70)])
        assert set(found) == {"boxes", "scores", "labels"}
    assert names["recipe"].freeze <= len(names["model"].backbone.features)
    assert {x.shape[1] for x in names["pyramid"].maps(torch.rand(2, 3, 320, 320))} == {64}


def test_code_of_the_torchvision_page_runs():
    pytest.importorskip("torchvision")
    (found,) = run("docs/torchvision.md")["detections"]
    assert set(found) == {"boxes", "scores", "labels"}


def commands():
    """``(page, arguments)`` of each line in the pages that calls the command ssd_ext."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^(?:torchrun [^`\n]*? -m |python -m )?ssd_ext [^`\n]*$", text, re.MULTILINE):
            yield str(page.relative_to(ROOT)), shlex.split(line.split("ssd_ext ", 1)[1])


@pytest.mark.parametrize(("page", "arguments"), [(page, line) for page, line in commands() if line[0] != "env"])
def test_commands_of_the_pages_have_these_options(page, arguments):
    pytest.importorskip("torchvision")
    from ssd_ext.cli import parser_for

    assert not any(word.startswith("/") for word in arguments)
    parser_for(arguments[0]).parse_args(arguments)


def test_every_command_is_in_the_pages():
    from ssd_ext.cli import COMMANDS

    assert {arguments[0] for _, arguments in commands()} == set(COMMANDS)


def test_detector_of_its_page_finds_what_it_was_shown(capsys):
    names = run("docs/detector.md")
    right = 0
    for found, target in zip(names["model"].detect(names["images"]), names["ground_truth"].to_targets(), strict=True):
        hits = ops.box_iou(found["boxes"][:1], target["boxes"]) > 0.5
        right += bool(hits.any() and found["labels"][0] == target["labels"])
    assert right >= 6, right  # of 8


def test_code_of_the_page_on_mixed_precision_runs():
    names = run("docs/mixed_precision.md")
    assert names["rows"].dtype == torch.bfloat16
    assert names["loss"].dtype == torch.float32
    assert names["head"].weight.grad.isfinite().all()
    assert [image["boxes"].dtype for image in names["found"]] == [torch.float32] * 2


def test_code_of_the_page_on_several_gpus_runs(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    names = run("docs/distributed.md")
    assert names["layer"].weight.grad.any()


def test_code_of_the_page_on_default_boxes_runs():
    names = run("docs/ops/priors.md")
    assert names["priors"].shape == (sum(names["levels"]), 4)


def test_code_of_the_page_on_matching_runs():
    names = run("docs/ops/matching.md")
    assert names["target_labels"].unique().tolist() == [0, 3, 7]


# ---- coming from other libraries -----------------------------------------------------------------


def test_code_of_the_page_on_other_libraries_runs():
    pytest.importorskip("torchvision")
    names = run("docs/coming_from.md")
    assert names["target_labels"].tolist() == [[3, 0]]
    assert all(torch.equal(one, other) for one, other in zip(names["ground_truth"], names["same"], strict=True))
    assert [round(512 * scale) for scale in names["ssd512"].scales] == [20, 51, 133, 215, 296, 378, 460, 542]
    torch.testing.assert_close(names["ordered"], torch.tensor([[0.1, 0.2, 0.5, 0.6]]))


def defaults(*callables):
    """``(name, default)`` of all arguments."""
    return {(p.name, p.default) for f in callables for p in inspect.signature(f).parameters.values()}


@pytest.mark.parametrize("theirs", ["SSD", "DefaultBoxGenerator", "RetinaNet"])
def test_page_on_other_libraries_gives_the_defaults(theirs):
    pytest.importorskip("torchvision")
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.retinanet import RetinaNet
    from torchvision.models.detection.ssd import SSD as TorchvisionSSD

    from ssd_ext.models import SSD

    page = (DOCS / "coming_from.md").read_text()
    table = re.search(rf"^\| `(?:[\w.]+\.)?{theirs}` \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)[1]
    named = r"(\w+)=([\d.]+|None|True)"
    left = "".join(row.split("|")[1] for row in table.splitlines())
    right = "".join(row.split("|")[2] for row in table.splitlines() if not row.startswith("| the rule"))
    of_theirs = defaults({"SSD": TorchvisionSSD, "RetinaNet": RetinaNet}.get(theirs, DefaultBoxGenerator))
    values = {(name, eval(value)) for name, value in re.findall(named, left)}
    assert len(values) >= 4 and values <= of_theirs
    if theirs != "RetinaNet":  # whose defaults are not ours
        ours = {(name, eval(value)) for name, value in re.findall(named, right)}
        assert ours <= defaults(SSD, MultiBoxLoss, PriorSpec)
    first_words = re.findall(r"^\| `(\w+)(?:=[^`]*)?`", table, re.MULTILINE)
    assert set(first_words) - {"BoxCoder"} <= {name for name, _ in of_theirs}


def test_claims_of_the_page_on_other_libraries():
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.detection._utils import BoxCoder, Matcher, SSDMatcher
    from torchvision.ops import box_convert

    from ssd_ext import GroundTruth
    from ssd_ext.priors import SSD300_COCO, paper_scales

    priors = SSD300_COCO.priors()
    corners = box_convert(priors, "cxcywh", "xyxy")
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.12, 0.2, 0.5, 0.62], [0.4, 0.4, 0.43, 0.42]])
    ground_truth, iou = GroundTruth.from_lists([boxes]), torchvision.ops.box_iou(boxes, corners)
    torch.testing.assert_close(
        ops.encode(boxes[:1].expand(8732, 4), priors),
        BoxCoder((10.0, 10.0, 5.0, 5.0)).encode_single(boxes[:1].expand(8732, 4), corners),
        atol=1e-3, rtol=1e-4,
    )  # fmt: skip
    assert torch.equal(SSDMatcher(0.5)(iou), ops.match(ground_truth, priors, force="last")[0])
    low = ops.match(ground_truth, priors, low_threshold=0.4, force="none")[0]
    assert torch.equal(Matcher(0.5, 0.4)(iou), low)
    # two priors of one best IoU, of which allow_low_quality_matches takes both
    two, object_ = torch.tensor([[2.0, 4.0, 4.0, 4.0], [6.0, 4.0, 4.0, 4.0]]), torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    assert ops.match(GroundTruth.from_lists([object_]), two, force="last").tolist() == [[0, -1]]
    equal = torchvision.ops.box_iou(object_, box_convert(two, "cxcywh", "xyxy"))
    assert Matcher(0.5, 0.4, allow_low_quality_matches=True)(equal).tolist() == [0, 0]
    assert paper_scales(6, 0.15, 0.9)[:-1] == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.75, 0.9])

    tiny = ops.decode(torch.tensor([[0.0, 0.0, -99.0, -99.0]]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))[0]
    assert tiny[2] - tiny[0] < 0.2 * 16 / 1000  # mmdetection's lower bound
    flipped = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    assert ops.nms(flipped, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0, 1]
    whole = flipped[:1].int()
    assert ops.box_iou(whole, whole).dtype == torchvision.ops.box_iou(whole, whole).dtype == torch.float32
    empty = torch.empty(0, 4), torch.empty(0)
    assert len(torchvision.ops.batched_nms(*empty, None, 0.5)) == 0
    with pytest.raises(ValueError, match="idxs"):
        ops.batched_nms(*empty, None, 0.5)
    assert len(ops.batched_nms(*empty, torch.empty(0, dtype=torch.int64), 0.5)) == 0
    with pytest.warns(UserWarning, match="look like corners"):
        ops.match(ground_truth, corners, validate=True)
    pair = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0]])
    _, scores = ops.soft_nms(pair, torch.tensor([0.9, 0.8]), sigma=2 * 0.25, method="gaussian")
    assert scores[1].item() == pytest.approx(0.8 * torch.tensor(-(0.8**2) / (2 * 0.25)).exp().item())
    # of two candidates for three objects the third is not looked at, although NMS leaves one of the two
    three, logits = torch.tensor([[0.3, 0.3, 0.2, 0.2]] * 2 + [[0.7, 0.7, 0.2, 0.2]]), torch.tensor([[[0, 5.0]] * 3])
    assert ops.detect(torch.zeros(1, 3, 4), logits, three, topk_per_class=2)[3].tolist() == [1]


# ---- the site ------------------------------------------------------------------------------------


def test_pages_describe_every_op():
    pages = "".join(page.read_text() for page in (DOCS / "ops").glob("*.md"))
    assert set(ops.__all__) <= set(re.findall(r"^::: ssd_ext\.ops\.(\w+)$", pages, re.MULTILINE))
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
