"""A pytest plugin for long runs: names each failure when it comes, and counts outcomes by test function.

A process whose CUDA context is lost ends, as every later test on the GPU would fail there too; pytest-xdist goes
on with another.
"""

import os
import sys
from collections import Counter, defaultdict

import pytest


def pytest_addoption(parser):
    parser.addoption("--by-function", action="store_true", help="print the outcomes of each test function at the end")


def pytest_configure(config):
    config.pluginmanager.register(Progress(config))


def context_is_lost():
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Progress:
    def __init__(self, config):
        self.config = config
        self.counts = defaultdict(Counter)
        self.failed = False  # the test that runs

    def print(self, report):
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal:  # there is none in a worker of xdist
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else str(report.longrepr)).strip().splitlines() or [""]
            if self.config.get_terminal_writer().width_of_current_line:
                terminal.line("")
            terminal.line(f"FAILED {report.nodeid}: {reason[0][:200]}")

    def pytest_collectreport(self, report):
        if report.failed:
            self.print(report)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.counts[report.nodeid.split("[")[0]][report.outcome] += 1
        if report.failed:
            self.failed = True
            self.print(report)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.failed = False
        result = yield
        if self.failed and context_is_lost():
            if hasattr(self.config, "workerinput"):
                os._exit(1)  # xdist has sent the test's reports
            pytest.exit(f"the CUDA context is lost after {item.nodeid}", 1)
        return result

    def pytest_terminal_summary(self, terminalreporter):
        if self.config.getoption("--by-function"):
            terminalreporter.section("outcomes of each test function")
            for function, counts in self.counts.items():
                outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
                terminalreporter.line(f"{function}: {outcomes}")
