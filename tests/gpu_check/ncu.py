"""How check.py runs Nsight Compute, and reads what it says of each kernel."""

from __future__ import annotations

import csv
import re

# What the table shows of a kernel: heading, width, metric, scale. In the units of --print-units=base.
COLUMNS = (
    ("us", 8, "gpu__time_duration.sum", 1e-3),
    ("DRAM %", 7, "dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    ("issue %", 8, "smsp__issue_active.avg.pct_of_peak_sustained_active", 1),
    ("warps", 6, "sm__warps_active.avg.per_cycle_active", 1),
)
# Why warps wait, as counted or, in other versions, as sampled.
STALLS = (
    re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio"),
    re.compile(r"smsp__pcsamp_warps_issue_stalled_(\w+)"),
)
NOT_STALLED = ("selected", "not_selected")  # it issues; it could, but another one does


def command(program: str, call: list[str]) -> list[str]:
    # The clocks are the machine's, which others may share.
    options = ["--clock-control", "none", "--target-processes", "application-only", "--section", "WarpStateStats"]
    options += ["--kernel-name-base", "demangled", "--kernel-name", "regex:.*ssd_ext.*"]
    options += ["--metrics", ",".join(name for _, _, name, _ in COLUMNS)]
    return [program, *options, "--csv", "--page", "raw", "--print-units", "base", *call]


def complaint(line: str) -> str | None:
    """The line where it says what went wrong."""
    return line if line.startswith(("==ERROR==", "==WARNING==")) else None


def short(kernel: str) -> str:
    """A kernel's name without its parameters and the namespaces that go without saying."""
    kernel = re.sub(r"\(anonymous namespace\)::|<unnamed>::|ssd_ext::|at::native::|^void ", "", kernel)
    kernel = re.sub(r"\([\w:]+\)(?=-?\d)", "", kernel)  # the casts of enumerators
    return re.sub(r"\(.*", "", kernel).strip()


def read(text: str) -> list[dict[str, str | float | None]]:
    """A row for each launch: ``kernel``, the ``COLUMNS``, ``stall``, its ``share``; None: not measured."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    header, _units, *launches = [*csv.reader(lines), [], []][: max(2, len(lines))]
    found = []
    for values in launches:
        told = dict(zip(header, values, strict=False))
        row = {"kernel": short(told.get("Kernel Name", "?"))}
        for heading, _, metric, scale in COLUMNS:
            value = _number(told.get(metric))
            row[heading] = value and value * scale
        stalls: dict[str, float] = {}
        for pattern in STALLS:
            stalls = stalls or {m[1]: _number(told[name]) or 0 for name in told if (m := pattern.fullmatch(name))}
        stall = max(stalls.keys() - NOT_STALLED, key=stalls.get, default=None)
        total = sum(stalls.values())
        found.append(row | {"stall": stall, "share": stalls[stall] / total if stall and total else None})
    return found


def _number(text: str | None) -> float | None:
    try:
        return float(text.replace(",", ""))
    except (AttributeError, ValueError):  # missing, or "n/a"
        return None


def table(rows: list[dict[str, str | float | None]]) -> list[str]:
    lines = [" ".join(f"{heading:>{width}}" for heading, width, _, _ in COLUMNS) + f"  {'top stall':<22} kernel"]
    for row in rows:
        figures = ["?" if row[heading] is None else f"{row[heading]:.1f}" for heading, *_ in COLUMNS]
        cells = " ".join(f"{figure:>{width}}" for figure, (_, width, _, _) in zip(figures, COLUMNS, strict=True))
        stall = "?" if row["share"] is None else f"{row['stall']} {row['share']:.0%}"
        lines.append(f"{cells}  {stall:<22} {row['kernel'][:60]}")
    return lines
