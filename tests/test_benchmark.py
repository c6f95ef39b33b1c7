"""benchmarks/run.py: what it measures is checked, what it prints and writes is complete. No timing is asserted."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import ssd_ext
from benchmarks import base, report, revision, run
from benchmarks import measure as measuring
from benchmarks.base import Found, cases_of, difference, unlike
from benchmarks.measure import COMPILED, GRAPH, OURS, REFERENCE, Plan, contenders_of, measure, measure_scaling
from benchmarks.peers import PEERS, MissingPeerError, Peers, peers_of
from benchmarks.timing import LEAST_TURNS, WAITING, CpuClock, Turn, alternate, settle
from opinfo import OPS, spec
from opinfo.inputs import coco_gts
from opinfo.spec import Case
from ssd_ext import _C

ROOT = Path(__file__).resolve().parent.parent
BRIEF = Plan(seconds=0.01, rounds=1)
OPS_BY_NAME = {op.name: op for op in OPS}
DECODE = OPS_BY_NAME["decode"]
SMALL = DECODE.cases[0]


def contender(f):
    return lambda inputs: partial(f, **inputs)


def measured(contenders, op=DECODE, case=SMALL, plan=BRIEF):
    result = measure(op, case, contenders, CpuClock(), plan, memory_rate=1e9)
    return result, {row["name"]: row for row in result["contenders"]}


def off_by_a_thousandth(**inputs):
    return DECODE.reference(**inputs) + 1e-3


def test_a_wrong_contender_gets_no_speed():
    result, rows = measured({OURS: contender(DECODE.op), "planted": contender(off_by_a_thousandth)})
    assert rows["planted"].keys() == {"status", "note", "name"}
    assert rows["planted"]["status"] == "wrong"
    assert "off by 0.001" in rows["planted"]["note"]
    assert rows[OURS]["status"] == "timed"
    assert result["best_peer"] is None
    assert "WRONG: output 0 is off by 0.001" in report.op_table("decode", [result])


def test_ours_wrong_gets_no_speed_and_no_ratio():
    result, rows = measured({OURS: contender(off_by_a_thousandth), REFERENCE: contender(DECODE.reference)})
    assert rows[OURS]["status"] == "wrong"
    assert "ratios" not in result
    assert "WRONG" in report.summary([result])


def test_gradients_are_checked_and_timed_where_the_case_says_so(monkeypatch):
    def no_gradient_of_a_corner(deltas, priors):
        boxes = DECODE.op(deltas, priors)
        return torch.cat([boxes[..., :3], boxes[..., 3:].detach()], -1)

    case = dataclasses.replace(SMALL, backward=True)
    monkeypatch.setitem(PEERS, "decode", Peers({"planted": contender(no_gradient_of_a_corner)}))
    _, rows = measured(contenders_of(DECODE, case, BRIEF, compiled=False), case=case)
    assert rows[OURS]["status"] == rows[REFERENCE]["status"] == "timed"
    assert rows["planted"]["status"] == "wrong"
    _, rows = measured(contenders_of(DECODE, SMALL, BRIEF, compiled=False))
    assert rows["planted"]["status"] == "timed"  # its boxes are right


def test_results_with_gradients_hold_no_graph():
    # so that the next contender's backward may be captured in a CUDA graph
    inputs = DECODE.with_leaves(SMALL.make(torch.Generator().manual_seed(0)))
    boxes, gradients = DECODE.with_gradients(partial(DECODE.op, **inputs), inputs)()
    assert not boxes.requires_grad and not any(gradient.requires_grad for gradient in gradients)
    assert torch.equal(boxes, DECODE.op(**inputs))


def test_ours_wrong_sets_the_exit_status(monkeypatch, capsys):
    quick = dataclasses.replace(SMALL, benchmark=True, quick=True)
    monkeypatch.setattr(run, "OPS", [dataclasses.replace(DECODE, op=off_by_a_thousandth, cases=[quick])])
    monkeypatch.setattr(run, "QUICK", BRIEF)
    assert run.main(["--quick", "--no-compile", "--ops", "decode"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "exit_status"), [("wrong", 1), ("failed", 1), ("missing", 0)])
def test_a_cuda_graph_of_ours_that_is_wrong_sets_the_exit_status(status, exit_status, monkeypatch):
    def unavailable(inputs):
        raise {"failed": RuntimeError, "missing": MissingPeerError}[status]("no graph")

    graph = contender(off_by_a_thousandth) if status == "wrong" else unavailable
    monkeypatch.setattr(run, "contenders_of", lambda *_, **__: {OURS: contender(DECODE.op), GRAPH: graph})
    monkeypatch.setattr(run, "OPS", [dataclasses.replace(DECODE, cases=[dataclasses.replace(SMALL, benchmark=True)])])
    monkeypatch.setattr(run, "Plan", lambda: BRIEF)
    assert run.main(["--no-compile", "--ops", "decode"]) == exit_status


def test_results_are_saved_case_by_case(monkeypatch, tmp_path):
    saved = []
    cases = [dataclasses.replace(SMALL, name=name, benchmark=True) for name in "ab"]
    monkeypatch.setattr(run, "OPS", [dataclasses.replace(DECODE, cases=cases)])
    monkeypatch.setitem(PEERS, "decode", Peers())
    monkeypatch.setattr(run, "Plan", lambda: BRIEF)
    monkeypatch.setattr(run, "write_json", lambda file, made: saved.append([row["case"] for row in made["results"]]))
    assert run.main(["--no-compile", "--ops", "decode", "--json", str(tmp_path / "x.json")]) == 0
    assert saved == [[], ["a"], ["a", "b"]]


def test_all_are_checked_against_the_reference_in_float64():
    seen = []

    def reference(deltas, priors):
        seen.append((deltas.dtype, priors.dtype))
        return DECODE.reference(deltas, priors)

    op = dataclasses.replace(DECODE, reference=reference)
    _, rows = measured({OURS: contender(DECODE.op)}, op)
    assert seen == [(torch.float64, torch.float64)]
    assert rows[OURS]["status"] == "timed"


def test_whoever_is_missing_or_fails_is_named():
    def missing(inputs):
        raise MissingPeerError("no such library")

    def failing(**inputs):
        raise RuntimeError("out of paper")

    result, rows = measured({OURS: contender(DECODE.op), "absent": missing, "broken": contender(failing)})
    assert rows["absent"] == {"name": "absent", "status": "missing", "note": "no such library"}
    assert rows["broken"] == {"name": "broken", "status": "failed", "note": "RuntimeError: out of paper"}
    table = report.op_table("decode", [result])
    assert "left out: no such library" in table
    assert "FAILED: RuntimeError: out of paper" in table


def test_a_slow_contender_is_called_once():
    calls = []

    def counted(**inputs):
        calls.append(1)
        return DECODE.reference(**inputs)

    plan = dataclasses.replace(BRIEF, slow=0.0)
    _, rows = measured({"slow": contender(counted)}, plan=plan)
    assert rows["slow"]["status"] == "once"
    assert rows["slow"]["samples"] == len(calls) == 1


def test_contenders_are_everybody(monkeypatch):
    assert PEERS.keys() <= {op.name for op in OPS}
    peers = peers_of(DECODE).calls
    assert list(contenders_of(DECODE, SMALL, BRIEF)) == [OURS, REFERENCE, COMPILED, *peers]
    assert COMPILED not in contenders_of(DECODE, SMALL, BRIEF, compiled=False)
    assert list(contenders_of(DECODE, SMALL, BRIEF, captured=True))[:2] == [OURS, GRAPH]
    monkeypatch.setitem(PEERS, "decode", Peers(peers, {"tuned": DECODE.reference}))
    assert list(contenders_of(DECODE, SMALL, BRIEF)) == [OURS, REFERENCE, COMPILED, *peers, "tuned"]
    assert "tuned" not in contenders_of(DECODE, SMALL, BRIEF, compiled=False)
    alone = contenders_of(DECODE, Case("x", SMALL.make, peers=False), BRIEF)
    with pytest.raises(MissingPeerError, match="no such case"):
        alone["torchvision"]({})


def test_compiling_has_a_time_limit(monkeypatch):
    def endless(f, **_):
        def call(**inputs):
            while True:
                pass

        return call

    monkeypatch.setattr(torch, "compile", endless)
    with pytest.raises(MissingPeerError, match="gave up compiling"):
        measuring._compile(DECODE.reference, 0.05, lambda call, inputs: call, {})


def test_contenders_take_turns():
    order = []
    calls = {name: partial(order.append, name) for name in "ab"}

    class OneCall:
        def turn(self, call):
            call()
            return Turn([1.0])

    timings = alternate(calls, OneCall(), seconds=0, rounds=3)
    assert "".join(order) == "abababab"  # the first round warms up
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_disturbed_turns_are_dropped_while_enough_remain():
    calm, disturbed = Turn([1.0], 0.0), Turn([9.0], 2 * WAITING)
    timing = settle([calm, disturbed] * LEAST_TURNS)
    assert (timing.median, timing.dropped, timing.disturbed) == (1.0, LEAST_TURNS, False)
    timing = settle([disturbed] * 9)
    assert (len(timing.seconds), timing.dropped, timing.disturbed) == (LEAST_TURNS, 9 - LEAST_TURNS, True)


def test_scaling_checks_and_times_every_batch():
    rows = measure_scaling(DECODE, CpuClock(), BRIEF, [1, 2])
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(row["status"] == "timed" for row in rows)
    assert report.scaling_table("decode", rows).count("\n") == 3
    rows = measure_scaling(dataclasses.replace(DECODE, op=off_by_a_thousandth), CpuClock(), BRIEF, [1])
    assert rows[0]["status"] == "wrong"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "enocde"], "invalid choice: 'enocde'"),
        (["--ops", "decode", "--cases", "SSD300"], "no such case: 'SSD300'"),
        (["--cases", "SSD300 B=8", "--scaling", "decode"], "not with --base or --scaling"),
        (["--threads", "0"], "must be at least 1, got 0"),
        (["--plot", "picture.gif"], "must end in .png or .svg, got picture.gif"),
        (["--json", "no/such/place.json"], "no such directory"),
        (["--scaling", "decode", "--plot", "a.png"], "not with --scaling"),
        (["--base", "HEAD", "--scaling", "decode"], "not with --plot or --scaling"),
        (["--base", "HEAD", "--plot", "a.png"], "not with --plot or --scaling"),
        (["--device", "emulated"], "emulated needs --base and a build with SSD_EXT_EMULATE"),
    ],
)
def test_a_wrong_argument_is_told_before_measuring(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_real_ground_truth():
    boxes, labels = coco_gts(200)  # more than there are: repeated
    assert len(boxes) == len(labels) == 200
    for b, n in zip(boxes, labels, strict=True):
        assert b.shape == (len(n), 4)
        assert len(n) > 0
        assert ((b >= 0) & (b <= 1)).all()
        assert (b[:, 2:] > b[:, :2]).all()
        assert ((n >= 1) & (n <= 80)).all()


@pytest.mark.slow
def test_script_writes_figures_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    made, picture = tmp_path / "made.json", tmp_path / "picture.png"
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "--quick", "--no-compile", "--threads", "1"]
    command += ["--ops", "encode", "--json", made, "--plot", picture]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert max(map(len, run.stdout.splitlines())) <= report.WIDTH
    for word in ("encode", OURS, "x best peer", "Summary", "Conditions: ", "1 thread\n"):
        assert word in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")

    figures = json.loads(made.read_text())
    assert figures["conditions"].keys() == {
        *("device", "cpu", "gpu", "threads", "simd", "memory_gb_per_s", "versions", "commit", "date", "quick"),
        "l2_flushed",
    }
    assert figures["conditions"]["threads"] == 1
    assert figures["conditions"]["memory_gb_per_s"] > 0
    (encode,) = (op for op in OPS if op.name == "encode")
    assert [r["case"] for r in figures["results"]] == [case.name for case in encode.cases if case.quick]
    for result in figures["results"]:
        rows = {row["name"]: row for row in result["contenders"]}
        assert rows.keys() == {OURS, REFERENCE, *peers_of(encode).calls}
        for row in rows.values():
            assert row["status"] in ("timed", "once", "missing")
            assert row["status"] == "missing" or row["median_ms"] > 0
        assert rows[OURS]["status"] == "timed"
        assert result["best_peer"] in rows
        assert result["gb_per_s"] > 0
        assert result["ratios"][REFERENCE] > 0


# ---- --base --------------------------------------------------------------------------------------

PLANTED = """
import os
import sys
from ssd_ext import _C

def decode(deltas, priors):  # differs in its last number
    print("no part of the protocol")
    boxes = boxes_room.decode(deltas, priors)
    boxes.view(-1)[-1:] += 1
    return boxes

def encode(boxes, priors):  # differs in its gradient
    deltas = boxes_room.encode(boxes, priors)
    if deltas.requires_grad:
        deltas.register_hook(lambda gradient: gradient * 1.5)
    return deltas

def hard_negatives(loss):
    "lacks an argument"

def soft_nms(*arguments, **others):
    os._exit(7)

def soft_nms_padded(*arguments, **others):
    raise RuntimeError("out of paper")

def nms_padded(boxes, scores, iou_threshold, **others):  # differs where it has launched CUDA kernels
    keep, count = nms_room.nms_padded(boxes, scores, iou_threshold, **others)
    return keep, count + len(_C.emulator.launches())

boxes_room, nms_room = (sys.modules[f"ssd_ext.ops._{name}"] for name in ("boxes", "nms"))
del box_iou
"""


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """A tree with the package as it is here, and faults planted in some of its ops."""
    here = Path(ssd_ext.__file__).parent
    tree = tmp_path_factory.mktemp("planted")
    shutil.copytree(here, tree / "ssd_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (module,) = here.glob("_C*.so")
    (tree / "ssd_ext" / module.name).symlink_to(module)
    with (tree / "ssd_ext" / "ops" / "__init__.py").open("a") as ops:
        ops.write(PLANTED)
    return tree


@pytest.fixture
def few_cases(monkeypatch):
    """The first two cases of each op, of which one is timed, briefly."""
    ops = [dataclasses.replace(op, cases=[dataclasses.replace(op.cases[0], benchmark=True), op.cases[1]]) for op in OPS]
    monkeypatch.setattr(run, "OPS", ops)
    monkeypatch.setattr(run, "Plan", lambda: BRIEF)
    monkeypatch.setattr(base, "PAIRS", 1)


@pytest.mark.slow
def test_builds_are_compared_to_the_bit_and_timed(planted, few_cases, tmp_path, capsys):
    made = tmp_path / "made.json"
    ops = ["decode", "encode", "hard_negatives", "box_iou", "soft_nms_padded", "match"]
    assert run.main(["--base", str(planted), "--threads", "1", "--json", str(made), "--ops", *ops]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= report.WIDTH

    told = json.loads(made.read_text())["base"]
    assert told["old"]["package"] == str(planted / "ssd_ext")
    assert told["new"]["package"] == str(Path(ssd_ext.__file__).parent)
    found = {op["op"]: op for op in told["ops"]}
    assert found.keys() == set(ops)
    types = {"float32", "float64", "float16", "bfloat16"}
    for name, output in (("decode", "output 0"), ("encode", "gradient of boxes"), ("soft_nms_padded", "all")):
        assert {difference["output"] for difference in found[name]["differences"]} == {output}
        assert {difference["dtype"] for difference in found[name]["differences"]} == types
        assert found[name]["missing"] == []
        assert f"DIFFERS: {OPS_BY_NAME[name].cases[0].name}, float32, {output}\n" in out
    assert "1 of 28 elements, first at [6, 3]: " in found["decode"]["differences"][0]["note"]
    assert found["soft_nms_padded"]["differences"][0]["note"] == "the old raised RuntimeError: out of paper"
    for name, why in (("box_iou", "there is no op box_iou"), ("hard_negatives", "unexpected keyword argument")):
        assert found[name]["comparisons"] == 0
        assert len(found[name]["missing"]) == 8
        assert found[name]["differences"] == found[name]["timings"] == []
        assert why in found[name]["missing"][0]["note"]
        assert f"not in the old, 8 comparisons: {found[name]['missing'][0]['note']}\n" in out
    assert found["match"] == {"op": "match", "comparisons": 8} | {
        "differences": [],
        "missing": [],
        "timings": found["match"]["timings"],
    }
    for name in ("decode", "encode", "match"):
        (timing,) = found[name]["timings"]
        assert timing["case"] == OPS_BY_NAME[name].cases[0].name
        assert timing["ratios"] == [timing["ratio"]] == [timing["old"]["median_ms"] / timing["new"]["median_ms"]]
    assert out.endswith("\nbits: 32 comparisons, 24 differ; 16 not in the old\n")


def test_equal_builds_exit_with_success(planted, monkeypatch):
    findings = []
    monkeypatch.setattr(run, "against_base", lambda *_: findings)
    for equal, status in ((Found("match", 8), 0), (Found("nms", 8, differences=[{}]), 1), (Found("nms", 8), 1)):
        findings.append(equal)
        assert run.main(["--base", str(planted)]) == status


@pytest.mark.skipif("emulator" not in _C.build_info(), reason="needs a build with SSD_EXT_EMULATE")
def test_emulated_kernels_are_compared(planted, few_cases, monkeypatch, capsys):
    large = OPS_BY_NAME["nms_padded"].cases[1].make
    monkeypatch.setattr(run, "OPS", [dataclasses.replace(op, full_size=large) for op in run.OPS])
    monkeypatch.setattr(spec, "FULL_SIZE", 1)
    assert run.main(["--base", str(planted), "--device", "emulated", "--ops", "nms_padded"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS: full size, float32, output 1\n" in out
    assert "old ms" not in out


def test_a_build_that_dies_is_named(planted, few_cases, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main(["--base", str(planted), "--threads", "1", "--ops", "soft_nms"])
    where = f"soft_nms, {OPS_BY_NAME['soft_nms'].cases[0].name}, float32"
    assert ended.value.code == f"run.py: the process of {planted} ended with status 7 in {where}"


def test_pairs_of_processes_take_turns_and_their_median_counts():
    class Build:
        def __init__(self, seconds):
            self.asked, self.seconds = [], seconds

        def ask(self, what, *arguments):
            self.asked.append(what)
            order.append(self)
            return Turn([self.seconds], 2 * WAITING * (self.seconds > 8)) if what == "turn" else None

    order = []
    pairs = [(Build(4.0), Build(1.0)), (Build(4.0), Build(2.0)), (Build(3.0), Build(9.0))]
    told = base.time(DECODE, SMALL, SMALL.make(torch.Generator()), pairs, Plan(seconds=0, rounds=3))
    builds = [build for pair in pairs for build in pair]
    assert order[:12] == [*builds, *builds]
    assert all(build.asked[:2] == ["prepare", "turn"] for build in builds)
    assert told["ratios"] == [4.0, 2.0, 1 / 3]
    assert told["ratio"] == 2.0
    assert told["old"]["median_ms"] == 4000.0
    assert (told["old"]["disturbed"], told["new"]["disturbed"]) == (False, True)
    row = report.base_table(Found("decode", 1, timings=[{"case": "x"} | told])).splitlines()[2]
    assert row.split() == ["x", "4000", *row.split()[2:3], "2000~", *row.split()[4:5], "2.00x~", "0.33", "to", "4.00"]


def test_every_bit_counts_but_those_of_nan():
    a = torch.tensor([[1.0, 0.0], [math.nan, 2.0]])
    assert difference(a, a.clone()) is None
    assert difference(a, torch.tensor([[1.0, 0.0], [-math.nan, 2.0]])) is None
    signed = "1 of 4 elements, first at [0, 1]: 0.0 in the old, -0.0 in the new"
    assert difference(a, torch.tensor([[1.0, -0.0], [math.nan, 2.0]])) == signed
    assert difference(a, a.nan_to_num(3.0)) == "1 of 4 elements, first at [1, 0]: nan in the old, 3.0 in the new"
    assert "1.0 in the old, 1.0000001192092896 in the new" in difference(a, a.nextafter(a + 1))
    assert difference(a, a.double()) == "[2, 2] of float32 in the old, [2, 2] of float64 in the new"
    assert difference(a, a[:1]) == "[2, 2] of float32 in the old, [1, 2] of float32 in the new"
    assert difference(torch.tensor(3), torch.tensor(4)) == "1 of 1 elements, first at []: 3 in the old, 4 in the new"
    assert list(unlike({"a": a, "b": a}, {"a": a})) == [("b", "only in the old")]


def test_an_emulator_gets_no_large_case_but_one():
    for op in OPS:
        small = [case for case in op.cases if not case.benchmark]
        assert [case for case, _ in cases_of(op, "cpu", quick=False)] == op.cases
        assert [case for case, _ in cases_of(op, "emulated", quick=True)] == small
        *others, (last, timed) = cases_of(op, "emulated", quick=False)
        assert [case for case, _ in others] == small
        assert (last.name, timed) == ("full size", False)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A function that commits a setup.py in a repository of its own, which then is the one to build."""
    if shutil.which("git") is None:
        pytest.skip("git, with which run.py --base finds the other revision, is not installed")

    def git(*arguments):
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    def commit(setup):
        (tmp_path / "setup.py").write_text(setup)
        git("add", "setup.py")
        git("commit", "-m", "x", "--allow-empty")

    git("init", "--quiet")
    monkeypatch.setattr(revision, "ROOT", tmp_path.resolve())
    monkeypatch.setattr(revision, "KEPT", tmp_path.resolve() / "build" / "base")
    yield commit
    assert git("worktree", "list").count("\n") == 1
    assert not list(tmp_path.glob("build/base/unfinished-*"))


def test_a_revision_is_built_once_and_like_this_build(repository):
    repository(
        "import os, pathlib\n"
        "pathlib.Path('ssd_ext').mkdir()\n"
        "told = os.environ['SSD_EXT_CUDA'] + os.environ['TORCH_CUDA_ARCH_LIST'] + os.environ['SSD_EXT_EMULATE']\n"
        "pathlib.Path('ssd_ext/_C.so').write_text(told)\n"
    )
    info = {"cuda": "13.0", "cuda_architectures": "90-real,120"}
    base = revision.built("HEAD", info, "cuda")
    module = base.folder / "ssd_ext" / "_C.so"
    assert module.read_text() == "ON9.0;12.0+PTX"
    written = module.stat().st_mtime_ns
    assert revision.built("HEAD", info, "cuda") == base
    assert module.stat().st_mtime_ns == written
    assert base.folder.name.startswith(base.commit[:12])
    assert revision.built("HEAD", info | {"cuda": "13.1"}, "cuda") != base


def test_the_options_are_those_of_this_build():
    info = {"cuda": "13.0", "cuda_architectures": "90", "emulator": "CHECK"}
    plain = {"SSD_EXT_CUDA": "OFF", "SSD_EXT_EMULATE": "", "SSD_EXT_SANITIZE": ""}
    assert revision.options(info, "cpu") == plain
    assert revision.options(info | {"sanitizers": "address"}, "cpu") == plain | {"SSD_EXT_SANITIZE": "ON"}
    assert revision.options(info, "emulated") == plain | {"SSD_EXT_CUDA": "ON", "SSD_EXT_EMULATE": "CHECK"}
    assert revision.options(info, "cuda") == plain | {"SSD_EXT_CUDA": "ON", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}


def test_a_build_that_fails_leaves_its_log_and_nothing_else(repository, capsys):
    repository("import sys; sys.exit('no compiler')")
    with pytest.raises(revision.RevisionError, match=r"could not be built: the end of build/base/\w+-\w+\.log stands"):
        revision.built("HEAD", {}, "cpu")
    assert "no compiler" in capsys.readouterr().err


def test_a_build_that_is_ended_leaves_nothing(repository):
    repository("import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)")
    with pytest.raises(SystemExit):
        revision.built("HEAD", {}, "cpu")
    with pytest.raises(KeyboardInterrupt), revision.worktree("HEAD"):
        raise KeyboardInterrupt


def test_a_base_that_is_none_is_told_with_the_remedy(repository, tmp_path, monkeypatch, capsys):
    repository("")
    (tmp_path / "ssd_ext").mkdir()
    for revision_or_folder, message in (
        ("no-such", "no revision 'no-such' here: `git log"),
        (str(tmp_path), "the extension is not built"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run.main(["--base", revision_or_folder])
        assert f"argument --base: {message}" in capsys.readouterr().err
    monkeypatch.setattr(revision, "ROOT", tmp_path / "ssd_ext")
    with pytest.raises(revision.RevisionError, match="is not a git checkout"):
        revision.built("HEAD", {}, "cpu")
