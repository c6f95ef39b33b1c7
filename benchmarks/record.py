"""What the record of every run holds, how it is written and found again; no torch is needed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def ask(*command: str) -> str | None:
    """What a program prints; None where it is missing, fails or hangs."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> str | None:
    """What SSD_EXT_COMMIT tells, else what git does of the tree, which may be a copy without .git."""
    return os.environ.get("SSD_EXT_COMMIT") or ask(
        "git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"
    )


def sources() -> str:
    """A hash of what is built, tested and measured; the same for the same tree, with git or without."""
    found = hashlib.sha256()
    for name in ("CMakeLists.txt", "csrc", "ssd_ext", "opinfo", "benchmarks", "tests"):
        for path in sorted([ROOT / name, *(ROOT / name).rglob("*")]):
            kept = path.suffix in (".txt", ".cpp", ".cu", ".h", ".inl", ".py", ".json") and "results" not in path.parts
            if kept and path.is_file():
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def write_json(file: Path, value: Any) -> None:
    """At once or not at all: whoever ends a run keeps what it wrote before."""
    unfinished = file.with_name(file.name + ".part")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(file)


def runs() -> list[tuple[str, dict[str, Any]]]:
    """``(name, record)`` of each run in ``RESULTS``, the newest first."""
    records = [(file.stem, json.loads(file.read_text())) for file in sorted(RESULTS.glob("*.json"))]
    measured = [(name, made) for name, made in records if made.get("results")]
    return sorted(measured, key=lambda run: datetime.fromisoformat(run[1]["conditions"]["date"]), reverse=True)


def compares_ops(made: dict[str, Any]) -> bool:
    """Whether it comes from run.py, and not from a program that times whole models."""
    return "contenders" in made["results"][0]
