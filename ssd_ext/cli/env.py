"""``ssd_ext env``: a report of the installation, to paste into a bug report."""

import argparse

from ssd_ext.environment import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    """Print it."""
    print(report())
