"""The command ``ssd_ext``. Each subcommand is a module here, with ``add_arguments(parser)`` and ``run(args)``.

A module is imported when its subcommand is called: ``ssd_ext env`` works without what training needs.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a detector on your own images",
    "evaluate": "measure a detector on annotated images",
    "detect": "find objects in photographs",
    "export": "write a detector for ONNX Runtime, torch.export or AOTInductor",
    "env": "print how this installation was built and where it runs, for a bug report",
}
EXPECTED = (ValueError, OSError, ImportError, RuntimeError)  # of which the message says what is wrong


def parser_for(command: str | None) -> argparse.ArgumentParser:
    """The parser of the command line, with the arguments of one subcommand."""
    parser = argparse.ArgumentParser("ssd_ext", description="Train, evaluate, run and export SSD detectors.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == command:
            module = importlib.import_module(f"ssd_ext.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; an error that the user can correct is one sentence and exit status 1.

    Args:
        argv: the arguments, by default those of the process. With SSD_EXT_TRACEBACK=1 in the environment such an error
            is raised instead.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser_for(argv[0] if argv else None).parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the output: what is flushed at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("ssd_ext: interrupted")
    except EXPECTED as e:
        if os.environ.get("SSD_EXT_TRACEBACK"):
            raise
        sys.exit(f"ssd_ext: {e}")
