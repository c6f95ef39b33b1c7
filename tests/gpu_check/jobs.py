"""Runs commands: all that they print is kept in a log, and what is chosen of it shown, both as it comes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from benchmarks.record import ROOT

LOG_BYTES = 300_000  # of each command in the log
GRACE = 15  # seconds after an interrupt; pytest gives its workers 10 of them


def everything(line: str) -> str:
    return line


def nothing(line: str) -> None:
    return None


@dataclass
class Job:
    """A command; what it has printed; its exit status, None where it did not end within its limit."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    show: Callable[[str], str | None] = everything  # what to print of a line
    name: str = ""  # tells apart what runs at the same time
    lines: list[str] = field(default_factory=list)
    status: int | None = None

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def run(log: Path, limit: float, *jobs: Job) -> None:
    """Run ``jobs`` at the same time. Who has not ended after ``limit`` seconds is interrupted, as by Ctrl-C, so that
    it reports what it has; then killed. None of their processes is left behind.
    """
    processes: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []

    def wait(seconds: float) -> None:
        end = monotonic() + seconds
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - monotonic()))

    with log.open("ab", buffering=0) as file:
        try:
            for job in jobs:
                file.write(f"$ {' '.join(map(str, job.command))}\n".encode())
                environment = {**os.environ, "PYTHONUNBUFFERED": "1", **job.environment}
                pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
                processes.append(
                    subprocess.Popen(job.command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
                )
                readers.append(threading.Thread(target=_read, args=(job, processes[-1].stdout, file), daemon=True))
                readers[-1].start()
            wait(limit)
            for job, process in zip(jobs, processes, strict=True):
                job.status = process.poll()
                if job.status is None:
                    process.send_signal(signal.SIGINT)
            wait(GRACE)
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                for process in processes:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, number)
                wait(5)
            for reader in readers:
                reader.join(5)


def _read(job: Job, output, log) -> None:
    """Until the output ends. Of a long one the log gets a third of ``LOG_BYTES`` from its beginning, the rest from
    its end."""
    prefix = f"{job.name}| " if job.name else ""
    size = 0
    later: list[str] = []
    for raw in output:
        line = raw.decode(errors="replace").rstrip("\n")
        job.lines.append(line)
        size += len(raw)
        if size <= LOG_BYTES // 3:
            log.write(f"{prefix}{line}\n".encode())
        else:
            later.append(f"{prefix}{line}\n")
        if (shown := job.show(line)) is not None:
            print(prefix + shown, flush=True)
    if later:
        log.write(f"{prefix}[...]\n{''.join(later)[-LOG_BYTES * 2 // 3 :]}".encode())
