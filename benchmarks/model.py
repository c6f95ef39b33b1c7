"""Images per second of whole detectors, ours and torchvision's with equal weights, and the share of the ops.

    python benchmarks/model.py [--device cuda] [--batch 1 8] [--json FILE]

Inference: ``heads`` is the network alone, ``ops`` what makes detections of its output, ``detect`` all from a tensor of
images of the model's size to padded detections; ``images`` is all from a list of images of 480 x 640 pixels to a list
of detections, as torchvision's model does it. Training: ``ops`` is matching and loss of the heads' output, forward and
backward; ``step`` one whole step of SGD on what a loader of ours gives, a tensor of images and a ``GroundTruth``. All
take turns in one process; medians. The share of the ops is that of ``ops`` in ``detect`` and in ``step``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a script
    del sys.path[0]
    if any((ROOT / "ssd_ext").glob("_C*.so")):
        sys.path.insert(0, str(ROOT))
    else:  # not built in this tree: the installed ssd_ext is meant
        sys.path.append(str(ROOT))

import torch  # noqa: E402
from torchvision.models.detection import ssd300_vgg16 as torchvision_ssd300  # noqa: E402

from benchmarks.record import commit, cpu_model, write_json  # noqa: E402
from benchmarks.timing import Clock, CpuClock, CudaClock, alternate  # noqa: E402
from opinfo.inputs import synthetic_gts  # noqa: E402
from ssd_ext import _C, GroundTruth  # noqa: E402
from ssd_ext.models import MODELS, SSD, create, load_weights  # noqa: E402

CLASSES = 81
Calls = dict[str, Callable[[], object]]


def make(name: str, device: str) -> tuple[SSD, torch.nn.Module | None]:
    """Our model, with torchvision's where it has the same one, and equal weights."""
    torch.manual_seed(0)
    ours = create(name, num_classes=CLASSES)
    peer = None
    if name == "ssd300_vgg16":
        peer = torchvision_ssd300(weights=None, weights_backbone=None, num_classes=CLASSES)
        load_weights(ours, peer.state_dict())
        peer.to(device)
    return ours.to(device), peer


def targets_for(images: list[torch.Tensor], device: str) -> list[dict[str, torch.Tensor]]:
    """About seven objects an image, as in COCO."""
    boxes, labels = synthetic_gts(len(images), torch.Generator().manual_seed(0))
    height, width = images[0].shape[1:]
    extent = torch.tensor([width, height, width, height])
    return [{"boxes": (b * extent).to(device), "labels": k.to(device)} for b, k in zip(boxes, labels, strict=True)]


def inference(name: str, batch: int, device: str, compiled: bool, amp: bool) -> Calls:
    """What is timed of inference."""
    ours, peer = make(name, device)
    ours.eval()
    images = [torch.rand(3, 480, 640, device=device) for _ in range(batch)]
    fitting = torch.rand(batch, 3, *ours.image_size, device=device)
    x = ours.transform(fitting)

    def call(f: Callable, *arguments) -> Callable[[], object]:
        def run():
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=amp):
                return f(*arguments)

        return run

    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=amp):
        predictions = ours.heads(x)
    calls = {
        "heads": call(ours.heads, x),
        "ops": call(ours.postprocess, *predictions),
        "detect": call(ours.predict, fitting),
        "images": call(ours, images),
    }
    if compiled:
        heads, predict = torch.compile(ours.heads), torch.compile(ours.predict)
        calls |= {"heads, compiled": call(heads, x), "detect, compiled": call(predict, fitting)}
    if device == "cuda":
        calls["detect, CUDA graph"] = captured(call(ours.predict, fitting))
    if peer is not None:
        peer.eval()
        calls["torchvision, images"] = call(peer, images)
    return calls


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def training(name: str, batch: int, device: str, amp: bool) -> Calls:
    """What is timed of training: steps of a rate so small that the weights stay about what they are."""
    ours, peer = make(name, device)
    images = [torch.rand(3, *ours.image_size, device=device) for _ in range(batch)]
    targets = targets_for(images, device)
    stacked, ground_truth = torch.stack(images), GroundTruth.from_targets(targets)

    def step(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], object]:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-9)

        def run():
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return run

    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=amp):
        predictions = [t.requires_grad_() for t in ours.heads(ours.transform(stacked))]

    def ops():
        return torch.autograd.grad(sum(ours.losses(*predictions, ground_truth).values()), predictions)

    calls = {"ops": ops, "step": step(ours, lambda: sum(ours(stacked, ground_truth).values()))}
    if peer is not None:
        calls["torchvision, step"] = step(peer, lambda: sum(peer(images, targets).values()))
    return calls


def measure(kind: str, name: str, batch: int, calls: Calls, clock: Clock, seconds: float) -> list[dict]:
    """Rows of the table."""
    timings = alternate(calls, clock, seconds, 3)
    return [
        {
            "kind": kind,
            "model": name,
            "batch": batch,
            "what": what,
            "ms": statistics.median(timing.seconds) * 1e3,
            "spread": timing.spread,
            "disturbed": timing.disturbed,
            "images_per_second": batch / statistics.median(timing.seconds),
        }
        for what, timing in timings.items()
    ]


def conditions(device: str, **more: object) -> dict:
    """On what the figures were taken."""
    return {
        "device": torch.cuda.get_device_name(0) if device == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
        "simd": _C.simd_level(),
        "torch": torch.__version__,
        **more,
        "commit": commit(),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
    }


def clock_of(device: str) -> Clock:
    """Networks overwrite the cache themselves."""
    return CudaClock(flush_l2=False) if device == "cuda" else CpuClock()


def show(rows: list[dict]) -> None:
    """One table."""
    print("\n{kind}, {model}, B={batch}".format(**rows[0]))
    for row in rows:
        doubt = "~ disturbed" if row["disturbed"] else ""
        print(f"  {row['what']:<38} {row['ms']:9.2f} ms {row['images_per_second']:9.1f} images/s {doubt}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python benchmarks/model.py", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--models", nargs="+", choices=sorted(MODELS), default=["ssd300_vgg16", "ssdlite320_mobilenet_v2"]
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="default: 1 8")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--bfloat16", action="store_true", help="the networks under autocast")
    parser.add_argument("--seconds", type=float, default=15, help="for each table (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the conditions")
    args = parser.parse_args()

    clock = clock_of(args.device)
    told = conditions(args.device, bfloat16=args.bfloat16)
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    rows = []
    for name in args.models:
        for batch in args.batch:
            tables = {"inference": lambda n=name, b=batch: inference(n, b, args.device, args.compile, args.bfloat16)}
            if batch > 1:  # batch normalisation wants two images
                tables["training"] = lambda n=name, b=batch: training(n, b, args.device, args.bfloat16)
            for kind, calls in tables.items():
                made = measure(kind, name, batch, calls(), clock, args.seconds)
                rows += made
                show(made)
                by_name = {row["what"]: row["ms"] for row in made}
                whole = "step" if kind == "training" else "detect"
                print(f"  share of the ops in {whole!r}: {by_name['ops'] / by_name[whole]:.1%}")
                if args.json:
                    write_json(args.json, {"conditions": told, "results": rows})


if __name__ == "__main__":
    main()
