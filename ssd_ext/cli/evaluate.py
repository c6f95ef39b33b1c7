"""``ssd_ext evaluate DATA --weights FILE``."""

import argparse
import json
import math
from pathlib import Path

from ssd_ext.cli import _shared
from ssd_ext.evaluation import average_precision, coco_metrics, plot_pr_curves
from ssd_ext.inference import detect_all

METRICS = {"voc12": "area", "voc07": "11point", "coco": None}  # the rule of average_precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, weights, metrics, what to write."""
    parser.add_argument("data", help="Pascal VOC folder or COCO .json")
    parser.add_argument("--split", default="test", help="of a VOC folder (default: %(default)s)")
    _shared.add_data_rules(parser)
    _shared.add_weights(parser)
    _shared.add_device(parser)
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=["voc12"], help="default: voc12")
    parser.add_argument("--iou-threshold", type=float, default=0.5, help="of the VOC metrics (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="draw precision over recall, as .png or .svg")
    parser.add_argument("--json", metavar="FILE", help="write all figures; null for a class without objects")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")


def run(args: argparse.Namespace) -> None:
    """Print the figures, and write what was asked for."""
    model, classes = _shared.read_detector(args)
    dataset = _shared.read_data(args.data, args.split, classes, args)
    found = detect_all(model.to(args.device), dataset, workers=args.workers)
    targets = [dataset.target(i) for i in range(len(dataset))]
    figures: dict[str, dict[str, float]] = {}
    for metric in args.metrics:
        rule = METRICS[metric]
        if rule is None:
            figures[metric] = coco_metrics(found, targets)
            print("coco: " + ", ".join(f"{name} {value:.4f}" for name, value in figures[metric].items()))
            continue
        result = average_precision(found, targets, model.num_classes, args.iou_threshold, rule)
        figures[metric] = {"mAP": result.mAP, **dict(zip(classes, result.ap.tolist(), strict=True))}
        for name, value in figures[metric].items():
            print(f"{metric}  {name:<24} {value:.4f}")
    if args.json:
        known = {
            metric: {name: None if math.isnan(value) else value for name, value in values.items()}
            for metric, values in figures.items()
        }
        Path(args.json).write_text(json.dumps(known, indent=1))
    if args.plot:
        plot_pr_curves(average_precision(found, targets, model.num_classes, args.iou_threshold), classes, args.plot)
