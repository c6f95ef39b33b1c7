"""Builds another revision of this repository, for ``run.py --base``; no torch is needed.

The sources are checked out by ``git worktree`` and built by the revision's own setup.py, with the options of this
build that matter on the device. The worktree is removed in any case; the built package stays in ``build/base``,
under its commit and options, and is taken from there the next time. ``rm -r build/base`` frees the space.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import ROOT, ask

KEPT = ROOT / "build" / "base"


@dataclass(frozen=True)
class Base:
    """A folder from which the package ``ssd_ext`` can be imported, and the commit of a revision."""

    folder: Path
    commit: str | None = None


class RevisionError(Exception):
    """Why there is nothing to compare with, and the remedy, in a sentence."""


def built(base: str, info: Mapping[str, str], device: str) -> Base:
    """What to compare with: a revision, which is built, or the folder of another tree, in which that has been done.

    The build is for ``device`` and otherwise like this one, which ``info`` describes (``_C.build_info()``).
    """
    tree = Path(base)
    if (tree / "ssd_ext").is_dir():
        if not is_built(tree):
            raise RevisionError(f"the extension is not built in {tree}: build it there, or name a revision")
        return Base(tree.resolve())
    commit = commit_of(base)
    environment = options(info, device)
    tools = sys.version, info.get("torch_headers"), info.get("compiler"), info.get("cuda")
    key = hashlib.sha256(repr([*sorted(environment.items()), *tools]).encode())
    kept = KEPT / f"{commit[:12]}-{key.hexdigest()[:8]}"
    if not is_built(kept):
        print(f"building {base} ({commit[:12]}), which is kept in {kept.relative_to(ROOT)}", file=sys.stderr)
        build(commit, environment, kept)
    return Base(kept, commit)


def is_built(tree: Path) -> bool:
    return any((tree / "ssd_ext").glob("_C*.so"))


def commit_of(revision: str) -> str:
    """Its full hash."""
    top = ask("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        raise RevisionError(
            f"{ROOT} is not a git checkout, or git is missing: run in a clone, or name the folder of a built tree"
        )
    verify = ("rev-parse", "--verify", "--quiet", "--end-of-options")
    commit = ask("git", "-C", str(ROOT), *verify, f"{revision}^{{commit}}")
    if commit is None:
        raise RevisionError(
            f"no revision {revision!r} here: `git log --oneline` lists them, and `git fetch` brings more "
            "(`git fetch --unshallow` in a shallow clone)"
        )
    return commit


def options(info: Mapping[str, str], device: str) -> dict[str, str]:
    """The environment in which setup.py makes, for ``device``, a build like the one that ``info`` describes."""
    environment = {"SSD_EXT_CUDA": "OFF" if device == "cpu" else "ON", "SSD_EXT_EMULATE": ""}
    if device == "cuda":
        environment["TORCH_CUDA_ARCH_LIST"] = ";".join(map(_architecture, info["cuda_architectures"].split(",")))
    if device == "emulated":
        environment["SSD_EXT_EMULATE"] = info["emulator"]
    environment["SSD_EXT_SANITIZE"] = "ON" if "sanitizers" in info else ""
    return environment


def _architecture(entry: str) -> str:
    """CMake's "80-real" or "90", as TORCH_CUDA_ARCH_LIST has it: "8.0", "9.0+PTX"."""
    major, minor, real = re.fullmatch(r"(\d+)(\d[af]?)(-real)?", entry).groups()
    return f"{major}.{minor}" + ("" if real else "+PTX")


def build(commit: str, environment: dict[str, str], kept: Path) -> None:
    """Build the package of ``commit`` and move it to ``kept``, all at once."""
    KEPT.mkdir(parents=True, exist_ok=True)
    log = KEPT / f"{kept.name}.log"
    with worktree(commit) as tree:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        with log.open("w") as out:
            where = {"cwd": tree, "env": os.environ | environment, "stdout": out, "stderr": out}
            job = subprocess.Popen(command, start_new_session=True, **where)
            try:
                job.wait()
            except BaseException:  # the compilers too are to end before their files go
                os.killpg(job.pid, signal.SIGKILL)
                raise
        if job.returncode != 0 or not is_built(tree):
            print(*log.read_text(errors="replace").splitlines()[-30:], sep="\n", file=sys.stderr)
            raise RevisionError(
                f"{commit[:12]} could not be built: the end of {log.relative_to(ROOT)} stands above; build it by hand "
                "and name the folder of its tree in place of the revision"
            )
        package = tree.parent / "package"
        package.mkdir()
        (tree / "ssd_ext").rename(package / "ssd_ext")
        with contextlib.suppress(OSError):  # another run has just built the same
            package.rename(kept)


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of ``commit`` until the block ends, be it by an error, Ctrl-C or SIGTERM."""
    git = ("git", "-C", str(ROOT), "worktree")
    place = Path(tempfile.mkdtemp(prefix="unfinished-", dir=KEPT))
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        added = subprocess.run([*git, "add", "--detach", place / "tree", commit], capture_output=True, text=True)
        if added.returncode != 0:
            raise RevisionError(f"git could not check out {commit[:12]}: {added.stderr.strip().splitlines()[-1]}")
        yield place / "tree"
    finally:
        subprocess.run([*git, "remove", "--force", place / "tree"], capture_output=True)
        shutil.rmtree(place, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
