"""Time of torchvision's detectors before and after ``accelerate``, and of the parts that it replaces.

    python benchmarks/integrations.py [--device cuda] [--batch 1 8] [--json FILE]

Weights are random. For inference the heads' outputs are set to noise in which ``--candidates`` scores an image pass the
threshold; ``whole`` is all from a list of images of 480 x 640 pixels to a list of detections, ``replaced`` the methods
that accelerate replaces, on the same arguments. For training, ``whole`` is forward and backward of a step, ``replaced``
forward alone. Before and after take turns in one process; medians.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a script
    del sys.path[0]
    if any((ROOT / "ssd_ext").glob("_C*.so")):
        sys.path.insert(0, str(ROOT))
    else:  # not built in this tree: the installed ssd_ext is meant
        sys.path.append(str(ROOT))

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torchvision.models import detection  # noqa: E402

from benchmarks.model import CLASSES, Calls, clock_of, conditions, measure, show, targets_for  # noqa: E402
from benchmarks.record import write_json  # noqa: E402
from ssd_ext.integrations.torchvision import accelerate  # noqa: E402

MODELS = (
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)


def make(name: str, device: str, size: int | None) -> nn.Module:
    """A detector as torchvision makes it."""
    torch.manual_seed(0)
    sizes = {} if size is None or name.startswith("ssd") else {"min_size": size, "max_size": 2 * size}
    return detection.__dict__[name](weights=None, weights_backbone=None, num_classes=CLASSES, **sizes).to(device)


def set_outputs(model: nn.Module, candidates: int) -> nn.Module:
    """Let the heads, once they have computed, give noise of which ``candidates`` scores a batch pass the threshold."""
    if isinstance(model, detection.FasterRCNN):
        model.rpn.head.register_forward_hook(lambda head, inputs, out: tuple([*map(_noise, part)] for part in out))
        model.roi_heads.box_predictor.register_forward_hook(
            lambda head, inputs, out: (_scores(out[0], candidates, True), _noise(out[1]))
        )
        return model
    softmax = isinstance(model, detection.ssd.SSD)
    model.head.register_forward_hook(
        lambda head, inputs, out: {
            name: _scores(t, candidates, softmax) if name == "cls_logits" else _noise(t) for name, t in out.items()
        }
    )
    return model


def _noise(like: Tensor) -> Tensor:
    return _made(like.shape, like.dtype, like.device)


def _scores(like: Tensor, candidates: int, softmax: bool) -> Tensor:
    return _made(like.shape, like.dtype, like.device, candidates, softmax)


@cache
def _made(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, candidates: int | None = None, softmax: bool = False
) -> Tensor:
    """Noise in 0..1; with ``candidates`` logits of which as many stand out, all of them objects."""
    g = torch.Generator().manual_seed(0)
    if candidates is None:
        return torch.rand(shape, generator=g).to(device, dtype)
    logits = torch.full(shape, -10.0)
    objects = logits[..., 1:]
    chosen = torch.randperm(objects.numel(), generator=g)[:candidates]
    objects[torch.unravel_index(chosen, objects.shape)] = 1 + torch.rand(len(chosen), generator=g)
    if softmax:
        logits[..., 0] = 0
    return logits.to(device, dtype)


def recorded(before: nn.Module, after: nn.Module, run: Callable[[], object]) -> list[tuple[str, str, tuple]]:
    """Module, method and arguments of the calls in ``run`` of what ``after`` replaces of ``before``."""
    calls, wrapped = [], []

    def recording(where: str, method: str, original: Callable) -> Callable:
        def record(*arguments):
            calls.append((where, method, arguments))
            return original(*arguments)

        return record

    for (where, module), other in zip(before.named_modules(), after.modules(), strict=True):
        for method in dir(type(module)) if type(module) is not type(other) else ():
            if not method.startswith("__") and getattr(type(module), method) is not getattr(type(other), method):
                wrapped.append((module, method))
                vars(module)[method] = recording(where, method, getattr(module, method))
    run()
    for module, method in wrapped:
        del vars(module)[method]
    return calls


def replaced(model: nn.Module, calls: list[tuple[str, str, tuple]]) -> Callable[[], object]:
    """The recorded calls as ``model`` computes them."""
    modules = dict(model.named_modules())
    bound = [partial(getattr(modules[where], method), *arguments) for where, method, arguments in calls]
    return lambda: [call() for call in bound]


def table(kind: str, name: str, batch: int, args: argparse.Namespace) -> Calls:
    """What is timed of one model."""
    before = make(name, args.device, args.size).train(kind == "training")
    images = [torch.rand(3, 480, 640, device=args.device) for _ in range(batch)]
    targets = targets_for(images, args.device)
    if kind == "inference":
        set_outputs(before, args.candidates * batch)
    after = accelerate(copy.deepcopy(before))

    def whole(model: nn.Module) -> Callable[[], object]:
        if kind == "inference":
            return torch.inference_mode()(lambda: model(images))
        return lambda: sum(model(images, targets).values()).backward()

    found = {"whole, torchvision": whole(before), "whole, ssd_ext": whole(after)}
    calls = recorded(before, after, whole(before))
    if calls:  # FCOS trains as before
        quiet = torch.inference_mode(kind == "inference")
        found["replaced, torchvision"] = quiet(replaced(before, calls))
        found["replaced, ssd_ext"] = quiet(replaced(after, calls))
    if args.compile and kind == "inference":
        found["whole, torchvision, compiled"] = whole(torch.compile(before))
        found["whole, ssd_ext, compiled"] = whole(torch.compile(after))
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python benchmarks/integrations.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help="default: all")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], help="default: 1 4; training from 2 on")
    parser.add_argument("--size", type=int, help="shorter side of images but for SSD (default: that of each model)")
    parser.add_argument("--candidates", type=int, default=300, help="an image (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="inference under torch.compile, too")
    parser.add_argument("--seconds", type=float, default=20, help="for each table (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the conditions")
    args = parser.parse_args()

    told = conditions(
        args.device, torchvision=torchvision.__version__, candidates=args.candidates, size=args.size or "of each model"
    )
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    rows = []
    for name in args.models:
        for batch in args.batch:
            for kind in ("inference", "training")[:batch]:  # batch normalisation wants two images
                calls = table(kind, name, batch, args)
                made = measure(kind, name, batch, calls, clock_of(args.device), args.seconds)
                rows += made
                show(made)
                times = {row["what"]: row["ms"] for row in made}
                for what in calls:
                    if "ssd_ext" in what:
                        ratio = times[what.replace("ssd_ext", "torchvision")] / times[what]
                        print(f"  {what}: {ratio:.2f} times as fast")
                if args.json:
                    write_json(args.json, {"conditions": told, "results": rows})


if __name__ == "__main__":
    main()
