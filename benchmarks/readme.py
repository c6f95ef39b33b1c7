"""Writes the README's tables of the benchmark and their pictures, from the files in benchmarks/results.

python benchmarks/readme.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import report
from benchmarks.measure import COMPILED, GRAPH, OURS, REFERENCE
from benchmarks.record import ROOT, compares_ops, runs

README = ROOT / "README.md"
PICTURES = {"cpu": ROOT / "benchmarks" / "readme.svg", "cuda": ROOT / "benchmarks" / "readme-cuda.svg"}
BEGIN, END = "<!-- written by benchmarks/readme.py -->", "<!-- until here -->"
ROWS = [
    ("assign_targets", "SSD300 COCO B=32, last"),
    ("assign_targets", "SSD300 synthetic B=32, last"),
    ("hard_negatives", "SSD300 B=32"),
    ("multibox_loss", "SSD300 B=8"),
    ("multibox_loss", "SSD300 B=32"),
    ("multibox_loss", "SSD300 B=32, backward too"),
    ("detect", "trained, C=81 B=1"),
    ("detect", "trained, C=81 B=32"),
    ("detect", "untrained, C=81 B=1"),
    ("encode", "SSD300 B=32"),
    ("decode", "SSD300 B=32"),
    ("box_iou", "N=1000 M=1000"),
    ("nms", "random N=100"),
    ("nms", "random N=1000"),
    ("nms", "random N=20000"),
    ("nms", "candidates N=1000"),
    ("nms", "candidates N=20000"),
    ("batched_nms", "random N=1000, 80 classes"),
    ("batched_nms", "random N=20000, 80 classes"),
    ("soft_nms", "clustered N=1000 linear"),
]
SHOWN = ("torchvision", REFERENCE)  # beside the fastest, whichever that is
LEGEND = f"""\
Median milliseconds of a call; in brackets, how many times longer that is than {OURS}'s.
`~`: other programs took CPU time all along; undisturbed, that contender might be faster. `wrong`: its result is not the
reference's, so that it has no time."""

Result = dict[str, Any]  # of a case, and the record of a run, both as run.py describes them
Run = dict[str, Any]


def measured(device: str) -> list[tuple[Result, Run]]:
    """A result for each of ``ROWS``, of several the newest, with the run that it comes from.

    On a GPU, rows without a result are left out, and quick runs count, as nothing else uses it meanwhile.
    """
    newest: dict[tuple[str, str], tuple[Result, Run]] = {}
    for _, run in reversed(runs()):
        conditions = run["conditions"]
        if compares_ops(run) and conditions["device"] == device and (device == "cuda" or not conditions["quick"]):
            newest |= {(result["op"], result["case"]): (result, run) for result in run["results"]}
    if device == "cpu" and (missing := [row for row in ROWS if row not in newest]):
        raise LookupError(f"no file in benchmarks/results has {missing}")
    return [newest[row] for row in ROWS if row in newest]


def written() -> str:
    """What the README holds between the two comments."""
    return "\n\n".join([LEGEND, section("cpu"), "On a GPU:", section("cuda")])


def section(device: str) -> str:
    """Table, conditions and picture of a device."""
    found = measured(device)
    aligned, headings = "llrlrr", ["op", "case", OURS, "fastest peer", *map(report.shown_name, SHOWN)]
    lines = [line(result) for result, _ in found]
    if device == "cuda":  # a column more
        aligned = "llrrlrr"
        headings.insert(3, f"in a {GRAPH}")
        for cells, (result, _) in zip(lines, found, strict=True):
            cells.insert(3, graph_milliseconds(result))
    link = PICTURES[device].relative_to(ROOT).as_posix()
    picture = f"![The same cases with every contender, as bars on a log scale]({link})"
    return "\n\n".join([report.markdown_table(aligned, headings, lines), origin(found), picture])


def line(result: Result) -> list[str]:
    """A row of the table."""
    rows = {row["name"]: row for row in result["contenders"]}
    ours, fastest = rows[OURS], rows[result["best_peer"]]
    peer = f"{report.shown_name(fastest['name'])} {report.cell(fastest, ours)}"
    shown = [report.cell(rows.get(name), ours) for name in SHOWN]
    return [f"`{result['op']}`", result["case"], report.milliseconds(ours), peer, *shown]


def graph_milliseconds(result: Result) -> str:
    """Of ours, replayed; empty where there can be no CUDA graph."""
    timed = [row for row in result["contenders"] if row["name"] == GRAPH and "median_ms" in row]
    return report.milliseconds(timed[0]) if timed else ""


def origin(found: list[tuple[Result, Run]]) -> str:
    """The conditions of each run, and what comes from it."""
    machines: dict[tuple[str, str], list[str]] = {}
    for run in _distinct(found):
        ops = dict.fromkeys(f"`{result['op']}`" for result, of in found if of is run)
        compiled = any(row["name"] == COMPILED for result in run["results"] for row in result["contenders"])
        conditions = report.run_text(run["conditions"]) + f", without {COMPILED}" * (not compiled)
        machines.setdefault(report.machine_texts(run["conditions"]), []).append(f"- {', '.join(ops)}: {conditions}")
    texts = ["\n".join([f"{', '.join(machine)}:\n", *items]) for machine, items in machines.items()]
    return "\n\n".join(texts)


def _distinct(found: list[tuple[Result, Run]]) -> list[Run]:
    return list({id(run): run for _, run in found}.values())


def filled(readme: str) -> str:
    """The README with that text as it should be."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{written()}\n\n{END}{after}"


def draw_picture(device: str, file: Path) -> None:
    """The same cases with all contenders."""
    from benchmarks.plot import draw

    found = measured(device)
    draw([result for result, _ in found], [run["conditions"] for run in _distinct(found)], file)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
    for device, picture in PICTURES.items():
        draw_picture(device, picture)
