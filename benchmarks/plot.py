"""The picture of a benchmark: a panel for each op, bars on a log scale, ours against everybody else."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

from benchmarks.measure import COMPILED, OURS, REFERENCE
from benchmarks.report import DISTURBED, conditions_text, faster, milliseconds, shown_name

COLORS = {OURS: "#d1495b", shown_name(REFERENCE): "#8d99ae", COMPILED: "#b8c0cc"}
PEER_COLORS = ["#2e5e8c", "#3c8d7d", "#c49a3a", "#7a5c99", "#5b8c3a", "#a8673f"]
INK = "#22272e"
COLUMNS, WIDTH, DPI = 2, 9.6, 160  # inches
BAR, GAP = 0.155, 0.1  # inches: a bar's pitch, and what stands between two cases
HEAD, FOOT = 0.38, 0.24  # inches of a panel: title above, axis below
NAMES, LEADING = 1.3, 9.5  # inches left of a panel for the names of the cases; points between their lines
BANNER, NOTE = 0.8, 0.112  # inches of the figure: what stands above the panels, a line below them
# In an SVG text is text, so another machine may show it in another font: one as wide comes first.
FAMILY, FALLBACKS = "DejaVu Sans", "Verdana, sans-serif"


def draw(results: list[dict[str, Any]], conditions: list[dict[str, Any]], file: Path) -> None:
    """``results`` and ``conditions`` as ``run.py --json`` writes them; the suffix of ``file`` chooses PNG or SVG."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        bars = [row for row in result["contenders"] if "median_ms" in row]
        if bars:
            # ours first, then from the fastest to the slowest
            bars.sort(key=lambda row: (row["name"] != OURS, row["median_ms"]))
            panels.setdefault(result["op"], []).append(result | {"bars": bars})
    colors = COLORS | dict(zip(_peers(panels), PEER_COLORS * 9, strict=False))

    heights = {op: HEAD + FOOT + sum(len(r["bars"]) * BAR + GAP for r in results) for op, results in panels.items()}
    columns = _balance(heights)
    notes = _notes(conditions, panels)
    height = BANNER + max((sum(heights[op] for op in column) for column in columns), default=0)
    height += NOTE * len(notes) + 0.2
    style = {"font.family": FAMILY, "font.size": 8, "text.color": INK, "axes.edgecolor": INK}
    with plt.rc_context(style | {"svg.fonttype": "none", "svg.hashsalt": OURS}):
        figure = plt.figure(figsize=(WIDTH, height), dpi=DPI)
        for i, column in enumerate(columns):
            top = height - BANNER
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
        _banner(figure, height, conditions, colors, panels)
        figure.text(0.02, 0.1 / height, "\n".join(notes), fontsize=7, va="bottom", color="#6b7280")
        svg = file.suffix == ".svg"
        figure.savefig(file, facecolor="white", metadata={"Date": None, "Creator": None} if svg else None)
        plt.close(figure)
    if svg:
        file.write_text(_compact(file.read_text()))


def _compact(svg: str) -> str:
    """Two thirds of what matplotlib writes: no defaults, names and indents, and the font once for all texts."""
    svg = re.sub(r' transform="rotate\(-0 [^"]*"|\btext-anchor: start; |(?<=<g) id="\w+"|(?<=\n) +', "", svg)
    svg = svg.replace(f"font-family: '{FAMILY}'; ", "")
    return svg.replace('text/css">', f"text/css\">text{{font-family: '{FAMILY}', {FALLBACKS}}}", 1)


def _peers(panels: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Names of the peers in order of appearance, so that each keeps its colour in all panels."""
    names = [shown_name(row["name"]) for row in _bars(panels)]
    return [name for name in dict.fromkeys(names) if name not in COLORS]


def _bars(panels: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for results in panels.values() for result in results for row in result["bars"]]


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
    names = NAMES / WIDTH
    axes = figure.add_axes((left + names, bottom, width - names, height))
    times = [row["median_ms"] for result in results for row in result["bars"]]
    low, high = min(times) / 2.5, max(times)
    axes.patch.set_visible(False)
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** 0.42)  # the labels stand right of the bars
    y = 0.0
    for result in results:
        start = y
        ours = next((row for row in result["bars"] if row["name"] == OURS), None)
        for row in result["bars"]:
            mine = row["name"] == OURS
            bar = {"left": low, "color": colors[shown_name(row["name"])], "zorder": 2, "clip_on": False}
            axes.barh(y, row["median_ms"] - low, BAR * 0.84, **bar)
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
        lines = textwrap.wrap(result["case"], 20)
        for i, line in enumerate(lines):  # each a text of its own: in an SVG those of several lines are aligned left
            axes.annotate(
                line,
                (0, (start + y - BAR) / 2),
                (-6, (len(lines) - 1) * LEADING / 2 - i * LEADING),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                va="center",
            )
        y += GAP
    axes.set_ylim(y - GAP - BAR / 2 + 0.04, -BAR / 2 - 0.04)
    axes.set_yticks([])
    ticks = [10.0**k for k in range(-6, 7) if low <= 10.0**k <= axes.get_xlim()[1]]
    ticks = ticks[:: 1 + len(ticks) // 6]  # no more than there is room for
    axes.set_xticks(ticks, [f"{x:g} ms" if x < 1000 else f"{x / 1000:g} s" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", which="both", labelsize=7, colors="#6b7280", length=0)
    axes.grid(axis="x", color="#e5e7eb", zorder=0, clip_on=False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(op, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=5)


def _banner(figure, height: float, conditions: list[dict[str, Any]], colors: dict[str, str], panels) -> None:
    machines = [c["gpu"] or f"{c['threads']} CPU thread{'s' * (c['threads'] != 1)}" for c in conditions]
    title = f"{OURS} against PyTorch and its peers, {', '.join(dict.fromkeys(machines))}"
    figure.text(0.02, 1 - 0.12 / height, title, fontsize=14, weight="bold", va="top")
    figure.text(
        0.02,
        1 - 0.42 / height,
        f"Median time of a call, log scale: shorter is better. N x: how many times longer than {OURS}.",
        fontsize=9,
        va="top",
        color="#4b5563",
    )
    shown = {shown_name(row["name"]) for row in _bars(panels)}
    labels = [name for name in colors if name in shown]
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in labels],
        labels,
        loc="upper left",
        bbox_to_anchor=(0.013, 1 - 0.56 / height),
        ncols=max(1, len(labels)),
        frameon=False,
        fontsize=8,
        handlelength=1.1,
        handletextpad=0.5,
        columnspacing=1.0,
    )


def _notes(conditions: list[dict[str, Any]], panels) -> list[str]:
    disturbed = any(row["disturbed"] for row in _bars(panels))
    return conditions_text(*conditions).splitlines() + [f"~: {DISTURBED}"] * disturbed
