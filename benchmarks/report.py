"""The benchmark's tables, for a terminal of 110 columns, and what the tables in Markdown are made of."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from benchmarks.measure import OURS, REFERENCE

WIDTH = 110
MOST_DIFFERENCES = 10  # of an op, in base_table
DISTURBED = "other programs took CPU time all along; such a figure is not to be quoted"  # what the mark ~ means
# heading, width; the first two columns are left-aligned
COLUMNS = (
    ("case", 19),
    ("contender", 14),
    ("median ms ", 10),
    ("spread", 7),
    ("x reference ", 12),
    (f"{OURS} is ", 11),
    ("x best peer ", 12),
    ("GB/s", 6),
    ("of memory", 9),
)


def number(x: float) -> str:
    """Three significant digits, never an exponent: 0.0123, 1.23, 12.3, 1234."""
    digits = 2 - math.floor(math.log10(x)) if x > 0 else 0
    return f"{x:.{max(0, digits)}f}"


def ratio(x: float) -> str:
    return f"{x:.{2 if x < 10 else 1 if x < 100 else 0}f}x"


def milliseconds(row: dict[str, Any]) -> str:
    return number(row["median_ms"]) + ("~" if row["disturbed"] else "")


def faster(row: dict[str, Any], than: dict[str, Any]) -> str:
    """How many times, with the mark of either."""
    return ratio(than["median_ms"] / row["median_ms"]) + ("~" if row["disturbed"] or than["disturbed"] else "")


def _pad(figure: str) -> str:
    """A blank where the mark would stand, so that figures align."""
    return figure if not figure or figure.endswith("~") else figure + " "


def _line(cells: list[str]) -> str:
    aligned = [f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, (_, w)) in enumerate(zip(cells, COLUMNS, strict=False))]
    return ("  " + " ".join(aligned)).rstrip()


def _shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def op_table(name: str, results: list[dict[str, Any]]) -> str:
    """One op: a block of lines for each case, a line for each contender."""
    lines = [name, _line([heading for heading, _ in COLUMNS])]
    for result in results:
        label = _shorten(result["case"], COLUMNS[0][1])
        for row in result["contenders"]:
            lines.append(_contender(label, row, result))
            label = ""
    return "\n".join(lines)


def _contender(label: str, row: dict[str, Any], result: dict[str, Any]) -> str:
    start = [label, row["name"]]
    if "median_ms" not in row:
        text = {"wrong": "WRONG", "missing": "left out", "failed": "FAILED"}[row["status"]] + f": {row['note']}"
        line = _line(start)
        indent = 2 + sum(width + 1 for _, width in COLUMNS[:2])
        return f"{line:<{indent}}  {_shorten(text, WIDTH - indent - 2)}"
    spread = "1 call" if row["status"] == "once" else f"{row['spread']:.0%}"
    rows = {r["name"]: r for r in result["contenders"] if "median_ms" in r}
    cells = [*start, _pad(milliseconds(row)), spread]
    cells.append(_pad(faster(row, rows[REFERENCE])) if REFERENCE in rows else "")
    if row["name"] != OURS:
        return _line([*cells, _pad(faster(rows[OURS], row)) if OURS in rows else ""])
    best, share = result["best_peer"], result["memory_share"]
    cells += ["", _pad(faster(row, rows[best])) if best else ""]
    return _line([*cells, number(result["gb_per_s"]), f"{share:.0%}" if share else ""])


def shown_name(contender: str) -> str:
    """For readers who know nothing of the benchmark's own names."""
    return {
        REFERENCE: "plain PyTorch",
        "tuned": "tuned PyTorch",
        "tuned, torch.compile": "tuned PyTorch, compiled",
    }.get(contender, contender)


def cell(row: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    """A contender in a table of Markdown: its time, and in brackets how many times longer than ours that is."""
    if row is None or "median_ms" not in row:
        return "" if row is None else row["status"]
    time = milliseconds(row)
    return f"**{time}**" if row is ours else f"{time} ({faster(ours, row)})" if "median_ms" in ours else time


def markdown_table(aligned: str, headings: list[str], lines: list[list[str]]) -> str:
    """``aligned`` has an ``l`` or an ``r`` for each column."""
    rule = [{"l": "---", "r": "---:"}[side] for side in aligned]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))


LEGEND = f"""\
reference: plain PyTorch, {OURS}.reference. torch.compile: the same, compiled for these very shapes.
CUDA graph: {OURS}, captured once and replayed.
x reference: how many times faster than the reference. {OURS} is: how many times faster than that line.
x best peer: than the fastest of all other lines. spread: interquartile range over median.
GB/s: the least bytes that the op must read and write, over its time. of memory: of the copy rate below;
over 100% where the data stay in caches.
~: {DISTURBED}."""


def summary(results: list[dict[str, Any]]) -> str:
    """One line for each op and case: ours and the best of the others."""
    lines = [
        "Summary",
        f"  {'op':<16} {'case':<20} {OURS + ' ms ':>12} {'best peer':>15} {'its ms ':>10} {'ratio ':>9}",
    ]
    for result in results:
        start = f"  {result['op']:<16} {result['case']:<20}"
        rows = {row["name"]: row for row in result["contenders"]}
        best = result.get("best_peer")
        if "median_ms" not in rows[OURS]:
            lines.append(f"{start} {rows[OURS]['status'].upper()}")
        elif best is None:
            lines.append(f"{start} {_pad(milliseconds(rows[OURS])):>12} {'none':>15}")
        else:
            figures = f"{best:>15} {_pad(milliseconds(rows[best])):>10} {_pad(faster(rows[OURS], rows[best])):>9}"
            lines.append(f"{start} {_pad(milliseconds(rows[OURS])):>12} {figures}")
    return "\n".join(line.rstrip() for line in lines)


def scaling_table(name: str, rows: list[dict[str, Any]]) -> str:
    """Cost over the batch size; the last column is flat where it grows linearly."""
    lines = [f"{name} over the batch", f"  {'B':>5} {'median ms ':>10} {'spread':>8} {'ms / image':>11}"]
    for row in rows:
        if "median_ms" not in row:
            lines.append(f"  {row['batch']:>5} {row['status'].upper()}: {_shorten(row['note'], WIDTH - 20)}")
            continue
        each = number(row["median_ms"] / row["batch"])
        lines.append(f"  {row['batch']:>5} {_pad(milliseconds(row)):>10} {row['spread']:>8.0%} {each:>11}")
    return "\n".join(lines)


def base_table(found: Any) -> str:
    """One op of base.py: times of the old build and of the new, then what differs."""
    lines = [found.op]
    if found.timings:
        columns = ["old ms ", "spread", "new ms ", "spread", "old / new ", "of the pairs"]
        lines.append(_base_line("case", columns))
    for row in found.timings:
        old, new = row["old"], row["new"]
        cells = [cell for side in (old, new) for cell in (_pad(milliseconds(side)), f"{side['spread']:.0%}")]
        times = ratio(row["ratio"]) + ("~" if old["disturbed"] or new["disturbed"] else "")
        lines.append(
            _base_line(row["case"], [*cells, _pad(times), f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"])
        )
    for difference in found.differences[:MOST_DIFFERENCES]:
        lines.append(f"  DIFFERS: {difference['case']}, {difference['dtype']}, {difference['output']}")
        lines.append(f"    {difference['note']}")
    if len(found.differences) > MOST_DIFFERENCES:
        lines.append(f"  and {len(found.differences) - MOST_DIFFERENCES} more, which --json writes")
    for note, count in Counter(missing["note"] for missing in found.missing).items():
        lines.append("  " + _shorten(f"not in the old, {count} comparisons: {note}", WIDTH - 2))
    lines.append("  " + bits_text([found]))
    return "\n".join(line.rstrip() for line in lines)


def _base_line(case: str, cells: list[str]) -> str:
    return f"  {_shorten(case, 28):<28} " + " ".join(
        f"{c:>{w}}" for c, w in zip(cells, (10, 7, 10, 7, 11, 14), strict=True)
    )


def bits_text(findings: list[Any]) -> str:
    """How many comparisons there were and how many differ."""
    missing = sum(len(found.missing) for found in findings)
    text = f"bits: {sum(f.comparisons for f in findings)} comparisons, {sum(f.differing for f in findings)} differ"
    return text + (f"; {missing} not in the old" if missing else "")


def machine_texts(conditions: dict[str, Any]) -> tuple[str, str]:
    """What several runs may share: the machine, and the versions of what was compared."""
    where = conditions["gpu"] or f"{conditions['cpu']}, {conditions['simd']}"
    if conditions["device"] == "emulated":
        where = f"CUDA kernels emulated on {where}"
    versions = ", ".join(f"{name} {version or '(absent)'}" for name, version in conditions["versions"].items())
    return f"{where}, {conditions['threads']} thread{'s' * (conditions['threads'] != 1)}", versions


def run_text(conditions: dict[str, Any]) -> str:
    """What is of one run alone."""
    run = [f"commit {conditions['commit']}"] if conditions["commit"] else []
    run += [conditions["date"], *["quick"] * conditions["quick"]]
    if rate := conditions["memory_gb_per_s"]:
        run.append(f"memory copy {rate:.1f} GB/s")
    if conditions["l2_flushed"] is not None:
        run.append("L2 flushed before each call" if conditions["l2_flushed"] else "L2 not flushed")
    return ", ".join(run)


def conditions_text(*runs: dict[str, Any]) -> str:
    """Lines to quote with any figure: two of each machine, and one of each of its runs."""
    machines: dict[tuple[str, str], list[str]] = {}
    for conditions in runs:
        machines.setdefault(machine_texts(conditions), []).append(run_text(conditions))
    return "\n".join("\n  ".join([f"Conditions: {where}", versions, *of]) for (where, versions), of in machines.items())
