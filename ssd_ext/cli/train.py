"""``ssd_ext train DATA --out FOLDER``.

On several GPUs or in several CPU processes: ``torchrun --nproc-per-node N -m ssd_ext train DATA --out FOLDER``.
"""

import argparse
import dataclasses
import os

import torch
from torch import distributed

from ssd_ext.cli import _shared
from ssd_ext.models import MODELS, create, load_weights
from ssd_ext.training import AMP, OPTIMIZERS, SCHEDULES, Recipe, fit, plot_history

# What differs from Recipe's defaults, which are those of the paper's VGG.
RECIPES = {
    "ssdlite320_mobilenet_v2": {
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.02,
        "batch_size": 16,
        "warmup": 100,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the recipe that are left out are the model's."""
    add = parser.add_argument
    add("data", help="Pascal VOC folder or COCO .json")
    add("--out", required=True, metavar="FOLDER", help="for checkpoints, curves and TensorBoard")
    add("--split", default="train", help="of a VOC folder, to train on (default: %(default)s)")
    add("--val-data", metavar="DATA", help="to evaluate on (default: the same folder)")
    add("--val-split", metavar="SPLIT", help="of a VOC folder, to evaluate on (default: none)")
    add("--classes", metavar="FILE", help="names of the classes, one a line (default: those of the data)")
    add("--model", default="ssd300_vgg16", choices=sorted(MODELS), help="default: %(default)s")
    add("--image-size", type=int, nargs=2, metavar=("H", "W"), help="in pixels (default: the model's)")
    add("--weights", metavar="FILE", help="start from this detector; heads for other classes are made anew")
    add("--backbone-weights", metavar="FILE", help="start from this ImageNet classifier")
    add("--resume", action="store_true", help="go on from FOLDER/last.pt if there is one")
    _shared.add_data_rules(parser)
    _shared.add_device(parser)
    recipe = parser.add_argument_group("recipe (default: the model's)")
    for field in dataclasses.fields(Recipe):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            recipe.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
        elif field.name == "milestones":
            recipe.add_argument(name, type=float, nargs="+")
        else:
            kind = {"clip_grad_norm": float, "ema": float}.get(field.name, type(field.default))
            choices = {"amp": tuple(AMP), "optimizer": OPTIMIZERS, "schedule": SCHEDULES}.get(field.name)
            recipe.add_argument(name, type=kind, choices=choices, metavar=None if choices else "N")


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The model's recipe with what was given on the command line."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    return Recipe(**{**RECIPES.get(args.model, {}), **given})


def run(args: argparse.Namespace) -> None:
    """Train, as a rank of torchrun if started by it."""
    device = torch.device(args.device)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first = ranks == 1 or distributed.get_rank() == 0
    recipe = recipe_of(args)
    train_set = _shared.read_data(args.data, args.split, _shared.read_classes(args.classes), args)
    val_set = None
    if args.val_data or args.val_split:
        val_set = _shared.read_data(args.val_data or args.data, args.val_split, train_set.classes, args)
    torch.manual_seed(recipe.seed)  # of the heads' first weights
    size = {"image_size": tuple(args.image_size)} if args.image_size else {}
    model = create(args.model, num_classes=len(train_set.classes) + 1, backbone_weights=args.backbone_weights, **size)
    if args.weights:
        report = load_weights(model, args.weights)
        if not report.detector:
            raise ValueError(f"{args.weights} holds a {report.format}: give it as --backbone-weights")
        if first:
            print(report)
    trained = fit(model, train_set, recipe, args.out, val_set=val_set, device=device, resume=args.resume)
    if first:
        try:
            plot_history(trained.history, os.path.join(args.out, "curves.png"))
        except ImportError:
            print('no curves.png: it needs matplotlib, pip install "ssd_ext[train]"')
    if ranks > 1:
        distributed.destroy_process_group()
