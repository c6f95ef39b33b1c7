"""Arguments that several subcommands have."""

import argparse
import os
from typing import Any

import torch

from ssd_ext import _C
from ssd_ext.data import Dataset, load_dataset
from ssd_ext.inference import load_detector
from ssd_ext.models import SSD


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, by default the GPU where the extension can use one."""
    usable = torch.cuda.is_available() and "cuda" in _C.build_info()
    parser.add_argument("--device", default="cuda" if usable else "cpu", help="default: %(default)s")


def add_data_rules(parser: argparse.ArgumentParser) -> None:
    """How :func:`read_data` takes the boxes of a data set."""
    add = parser.add_argument
    add("--zero-based", action="store_true", help="take the corners of a VOC folder as they stand, not counted from 1")
    add("--skip-invalid", action="store_true", help="leave wrong boxes out, with a warning, instead of stopping")


def read_data(path: str, split: str | None, classes: list[str] | None, args: argparse.Namespace) -> Dataset:
    """The data set, as ``args`` of :func:`add_data_rules` say."""
    rules: dict[str, Any] = {"invalid": "skip"} if args.skip_invalid else {}
    if args.zero_based:
        if not os.path.isdir(os.path.join(path, "Annotations")):
            raise ValueError(f"--zero-based is for VOC folders, which {path} is not: it has no Annotations")
        rules["one_based"] = False
    return load_dataset(path, split, classes, **rules)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """``--weights``, and what is needed with files that hold only weights; for :func:`read_detector`."""
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="checkpoint of ssd_ext train, or other weights"
    )
    parser.add_argument("--model", help="of weights from elsewhere, such as ssd300_vgg16")
    parser.add_argument("--num-classes", type=int, metavar="N", help="of weights from elsewhere, with the background")
    parser.add_argument(
        "--classes", metavar="FILE", help="names of the classes, one a line, instead of the checkpoint's"
    )


def read_classes(path: str | None) -> list[str] | None:
    """The lines of a file."""
    if path is None:
        return None
    with open(path) as file:
        return [line.strip() for line in file if line.strip()]


def read_detector(args: argparse.Namespace) -> tuple[SSD, list[str]]:
    """The detector and the names of its classes, as ``args`` of :func:`add_weights` say."""
    given = read_classes(args.classes)
    return load_detector(args.weights, model=args.model, num_classes=args.num_classes, classes=given)
