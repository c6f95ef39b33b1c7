"""``ssd_ext export --weights FILE --out FILE``."""

import argparse
from pathlib import Path

from ssd_ext import export
from ssd_ext.cli import _shared

WRITERS = {"onnx": export.onnx, "torch": export.save, "aotinductor": export.aot_inductor}
BY_SUFFIX = {".onnx": "onnx", ".pt2": "torch"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Weights, file, format."""
    _shared.add_weights(parser)
    _shared.add_device(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="to write")
    parser.add_argument(
        "--format",
        choices=WRITERS,
        help="onnx: standard operators; torch: a program of torch.export; aotinductor: compiled for this machine "
        "(default: by the suffix of FILE: .onnx, or .pt2 for torch)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="in pixels, of the images to be given, which are resized inside (default: the model's, not resized)",
    )


def run(args: argparse.Namespace) -> None:
    """Write the file."""
    name = args.format or BY_SUFFIX.get(args.out.suffix.lower())
    if name is None:
        raise ValueError(f"--out must end in {' or '.join(BY_SUFFIX)}, or --format be given, got {args.out}")
    if not args.out.parent.is_dir():
        raise ValueError(f"no folder {args.out.parent} for --out {args.out}")
    model, classes = _shared.read_detector(args)
    model.to(args.device)
    size = tuple(args.size) if args.size else None
    WRITERS[name](model, args.out, classes=classes, size=size)
    height, width = size or model.image_size
    print(f"{args.out}: images [B, 3, {height}, {width}], RGB in 0..1, to {', '.join(export.OUTPUTS)}")
