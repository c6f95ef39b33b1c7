"""What mkdocs does not do by itself: parts of the repository's other pages, and the results of the benchmark.

A line ``<!-- README.md: The ops -->`` is replaced by that section of that file; ``<!-- results -->`` by the tables and
pictures of ``benchmarks/results/*.json``. Links and pictures outside of this folder become their text.
"""

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
from benchmarks.record import compares_ops, runs  # noqa: E402


def on_files(files, config):
    """Adds a picture of each run that compared ops."""
    for name, made in filter(lambda run: compares_ops(run[1]), runs()):
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / f"{name}.svg"
            draw(made["results"], [made["conditions"]], picture)
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


def results() -> str:
    """All runs: conditions and tables, of ops with a picture."""
    return "\n\n".join(_ops(name, made) if compares_ops(made) else _models(made) for name, made in runs())


def _models(made: dict) -> str:
    """Figures of whole models."""
    conditions = "\n".join(f"{name}: {value}" for name, value in made["conditions"].items())
    lines = []
    for row in made["results"]:
        time = report.milliseconds({"median_ms": row["ms"], "disturbed": row["disturbed"]})
        rate = f"{row['images_per_second']:.1f}"
        lines.append([row["model"], row["kind"], str(row["batch"]), row["what"], time, rate])
    table = report.markdown_table("llrlrr", ["model", "", "B", "what", "ms", "images/s"], lines)
    title = f"## {made['conditions']['date'][:10]}: whole models"
    return "\n\n".join([title, f"```text\n{conditions}\n```", table])


def _ops(name: str, made: dict) -> str:
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
    lines = []
    for case in cases:
        rows = {row["name"]: row for row in case["contenders"]}
        lines.append([case["case"], *(report.cell(rows.get(name), rows[OURS]) for name in names)])
    return report.markdown_table("l" + "r" * len(names), ["case", *map(report.shown_name, names)], lines)
