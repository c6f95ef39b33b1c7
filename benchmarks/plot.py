"""The picture of a benchmark: a panel for each op, bars on a log scale, ours against everybody else."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.measure import COMPILED, OURS, REFERENCE
from benchmarks.report import conditions_text, faster, milliseconds

COLORS = {OURS: "#d1495b", REFERENCE: "#8d99ae", COMPILED: "#b8c0cc"}
PEER_COLORS = ["#2e5e8c", "#3c8d7d", "#c49a3a", "#7a5c99", "#5b8c3a", "#a8673f"]
INK = "#22272e"
COLUMNS, WIDTH, DPI = 2, 11.0, 160  # inches
BAR, GAP = 0.155, 0.1  # inches: a bar's pitch, and what stands between two cases
HEAD, FOOT = 0.38, 0.24  # inches of a panel: title above, axis below


def draw(made: dict[str, Any], file: Path) -> None:
    """``made`` is what ``run.py --json`` writes; the suffix of ``file`` chooses PNG or SVG."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for result in made["results"]:
        bars = [row for row in result["contenders"] if "median_ms" in row]
        if bars:
            # ours first, then from the fastest to the slowest
            bars.sort(key=lambda row: (row["name"] != OURS, row["median_ms"]))
            panels.setdefault(result["op"], []).append(result | {"bars": bars})
    colors = COLORS | dict(zip(_peers(panels), PEER_COLORS * 9, strict=False))

    heights = {op: HEAD + FOOT + sum(len(r["bars"]) * BAR + GAP for r in results) for op, results in panels.items()}
    columns = _balance(heights)
    banner, notes = 0.8, 0.65
    height = banner + notes + max((sum(heights[op] for op in column) for column in columns), default=0)
    with plt.rc_context({"font.size": 8, "font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": INK}):
        figure = plt.figure(figsize=(WIDTH, height), dpi=DPI)
        for i, column in enumerate(columns):
            top = height - banner
            for op in column:
                bottom = top - heights[op]
                area = (
                    (i + 0.02) / len(columns),
                    (bottom + FOOT) / height,
                    0.96 / len(columns),
                    (heights[op] - HEAD - FOOT) / height,
                )
                _panel(figure, area, op, panels[op], colors)
                top = bottom
        _texts(figure, height, made["conditions"], colors, panels)
        figure.savefig(file, facecolor="white")
        plt.close(figure)


def _peers(panels: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Names of the peers in order of appearance, so that each keeps its colour in all panels."""
    names = [row["name"] for results in panels.values() for result in results for row in result["contenders"]]
    return [name for name in dict.fromkeys(names) if name not in COLORS]


def _balance(heights: dict[str, float]) -> list[list[str]]:
    """Two columns of about one height; the ops keep their order, down the first and on in the second."""
    ops = list(heights)
    if len(ops) < COLUMNS:
        return [ops]
    total = sum(heights.values())
    cut = min(range(1, len(ops)), key=lambda k: abs(total / 2 - sum(heights[op] for op in ops[:k])))
    return [ops[:cut], ops[cut:]]


def _panel(figure, area, op: str, results: list[dict[str, Any]], colors: dict[str, str]) -> None:
    left, bottom, width, height = area
    names = 0.115 * WIDTH / figure.get_figwidth()  # room for the names of the cases
    axes = figure.add_axes((left + names, bottom, width - names, height))
    times = [row["median_ms"] for result in results for row in result["bars"]]
    low, high = min(times) / 2.5, max(times)
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.42)  # the labels stand right of the bars
    y = 0.0
    for result in results:
        start = y
        ours = next((row for row in result["bars"] if row["name"] == OURS), None)
        for row in result["bars"]:
            mine = row["name"] == OURS
            axes.barh(y, row["median_ms"] - low, BAR * 0.84, left=low, color=colors[row["name"]], zorder=2)
            at_end = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
            color = colors[OURS] if mine else INK
            label = f"{milliseconds(row)} ms"
            text = axes.annotate(
                label, (row["median_ms"], y), color=color, weight="bold" if mine else "normal", **at_end
            )
            if not mine and ours:
                axes.annotate(
                    faster(ours, row),
                    (1, 0.5),
                    xycoords=text,
                    weight="bold",
                    **at_end | {"xytext": (5, 0)},
                )
            y += BAR
        axes.annotate(
            textwrap.fill(result["case"], 20),
            (0, (start + y - BAR) / 2),
            (-6, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
        )
        y += GAP
    axes.set_ylim(y - GAP - BAR / 2 + 0.04, -BAR / 2 - 0.04)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(LogLocator(10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} ms" if x < 1000 else f"{x / 1000:g} s"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="both", labelsize=7, colors="#6b7280", length=2)
    axes.grid(axis="x", color="#e5e7eb", zorder=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(op, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=5)


def _texts(figure, height: float, conditions: dict[str, Any], colors: dict[str, str], panels) -> None:
    where = conditions["gpu"] or f"{conditions['threads']} CPU thread{'s' * (conditions['threads'] != 1)}"
    figure.text(
        0.02, 1 - 0.12 / height, f"{OURS} against PyTorch and its peers, {where}", fontsize=14, weight="bold", va="top"
    )
    figure.text(
        0.02,
        1 - 0.42 / height,
        f"Median time of a call, log scale: shorter is better.  N x: how many times longer than {OURS}.",
        fontsize=9,
        va="top",
        color="#4b5563",
    )
    shown = {row["name"] for results in panels.values() for result in results for row in result["bars"]}
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for name, color in colors.items() if name in shown]
    labels = [{REFERENCE: "plain PyTorch"}.get(name, name) for name in colors if name in shown]
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.013, 1 - 0.56 / height),
        ncols=max(1, len(labels)),
        frameon=False,
        fontsize=9,
        handlelength=1.1,
        columnspacing=1.4,
    )
    disturbed = any(row["disturbed"] for results in panels.values() for result in results for row in result["bars"])
    notes = conditions_text(conditions) + "\n  ~: other programs took CPU time all along" * disturbed
    figure.text(0.02, 0.1 / height, notes, fontsize=7, va="bottom", color="#6b7280")
