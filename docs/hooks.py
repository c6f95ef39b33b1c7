"""What mkdocs does not do by itself: parts of the repository's other pages, and the results of the benchmark.

A line ``<!-- README.md: The ops -->`` is replaced by that section of that file; ``<!-- results -->`` by the tables and
pictures of ``benchmarks/results/*.json``. Links and pictures outside of this folder become their text.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
INCLUDE = re.compile(r"^<!-- ([\w.]+): (.+) -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)")

sys.path.append(str(ROOT))
from benchmarks import report  # noqa: E402
from benchmarks.measure import OURS  # noqa: E402
from benchmarks.plot import draw  # noqa: E402


def on_files(files, config):
    """Adds a picture of each run."""
    for name, made in runs():
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / f"{name}.svg"
            draw(made, picture)
            files.append(File.generated(config, f"benchmarks/{name}.svg", content=picture.read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fills in what a page takes from elsewhere."""
    here = (DOCS / page.file.src_uri).parent
    markdown = local_links(markdown, here, here)
    markdown = INCLUDE.sub(lambda found: local_links(section(*found.groups()), ROOT, here), markdown)
    return markdown.replace("<!-- results -->", results())


def section(file: str, heading: str) -> str:
    """A second-level section of a page, with its heading."""
    parts = re.split(r"^(?=## )", (ROOT / file).read_text(), flags=re.MULTILINE)
    for part in parts:
        if part.startswith(f"## {heading}\n"):
            return part.rstrip()
    raise PluginError(f"{file} has no section {heading!r}")


def local_links(markdown: str, base: Path, here: Path) -> str:
    """Links and pictures relative to ``base``, made relative to ``here``, the folder of the page."""

    def rewrite(link: re.Match) -> str:
        mark, text, target = link.groups()
        if re.match(r"\w+:|#", target):
            return link[0]
        path = (base / target).resolve()
        return f"{mark}[{text}]({os.path.relpath(path, here)})" if path.is_relative_to(DOCS) else text

    return LINK.sub(rewrite, markdown)


def runs() -> list:
    """``(name, record)`` of each run of benchmarks/run.py that compared ops, the newest first."""
    records = [(file.stem, json.loads(file.read_text())) for file in (ROOT / "benchmarks" / "results").glob("*.json")]
    compared = [(name, made) for name, made in records if any("contenders" in r for r in made.get("results", []))]
    return sorted(compared, key=lambda run: (run[1]["conditions"]["date"], run[0]), reverse=True)


def results() -> str:
    """All runs: conditions, a table for each op, the picture."""
    return "\n\n".join(_run(name, made) for name, made in runs())


def _run(name: str, made: dict) -> str:
    ops: dict[str, list] = {}
    for result in made["results"]:
        ops.setdefault(result["op"], []).append(result)
    title = f"## {made['conditions']['date'][:10]}: {', '.join(ops)}"
    conditions = f"```text\n{report.conditions_text(made['conditions'])}\n```"
    tables = [f"### {op}\n\n{_table(cases)}" for op, cases in ops.items()]
    return "\n\n".join([title, conditions, *tables, f"![The same as bars on a log scale](benchmarks/{name}.svg)"])


def _table(cases: list) -> str:
    """A line for each case, a column for each contender."""
    names = list(dict.fromkeys(row["name"] for case in cases for row in case["contenders"]))
    lines = [["case", *names], ["---", *["---:"] * len(names)]]
    for case in cases:
        rows = {row["name"]: row for row in case["contenders"]}
        lines.append([case["case"], *(_cell(rows.get(name), rows[OURS]) for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict | None, ours: dict) -> str:
    if row is None or "median_ms" not in row:
        return "" if row is None else row["status"]
    time = report.milliseconds(row)
    return f"**{time}**" if row is ours else f"{time} ({report.faster(ours, row)})" if "median_ms" in ours else time
