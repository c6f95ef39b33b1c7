"""Find objects in photographs: ``python -m ssd_ext.detect IMAGE... --weights FILE``."""

import argparse
import json
import re
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torchvision.io import write_jpeg
from tqdm import tqdm

from ssd_ext import _cli
from ssd_ext.data import read_image
from ssd_ext.inference import as_input, draw, load_detector
from ssd_ext.models import SSD
from ssd_ext.ops.detect import unpad

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def image_files(paths: list[str]) -> list[Path]:
    """The files, and those in the folders, in the order of the numbers in their names: frames of a video.

    Raises:
        ValueError: a path that is neither, a folder without images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES]
            if not inside:
                raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
            files += sorted(inside, key=lambda f: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", f.name)])
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"no image or folder at {path}")
    return files


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser("python -m ssd_ext.detect", description=__doc__)
    made.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    _cli.add_weights(made)
    _cli.add_device(made)
    made.add_argument("--out", default="detections", metavar="FOLDER", help="default: %(default)s")
    made.add_argument("--threshold", type=float, default=0.5, help="least score (default: %(default)s)")
    return made


def main(argv: list[str] | None = None) -> None:
    """The command; ``argv`` is by default that of the process."""
    args = parser().parse_args(argv)

    given = _cli.read_classes(args.classes)
    model, classes = load_detector(args.weights, model=args.model, num_classes=args.num_classes, classes=given)
    model.to(args.device)
    out = Path(args.out)
    files = image_files(args.images)
    names = _distinct_names(files)
    lost = {(out / name).resolve() for name in names.values()} & {file.resolve() for file in files}
    if lost:
        raise ValueError(f"--out {out} would overwrite {min(lost)}: name another folder")
    out.mkdir(parents=True, exist_ok=True)

    results: list[dict[str, Any]] = []
    broken = []
    seconds = {"whole": 0.0, "network": 0.0}
    for file in tqdm(files, unit="image", disable=len(files) < 10):
        try:
            image = read_image(file)
        except (OSError, ValueError) as e:
            broken.append(str(e))
            continue
        batch = [as_input(image, args.device)]
        if not results:
            _timed(model, batch)  # the first call sets threads and memory up
        (found,), took = _timed(model, batch)
        seconds = {name: seconds[name] + took[name] for name in seconds}
        found = {name: value.cpu() for name, value in found.items()}
        shown = found["scores"] > args.threshold
        objects = [
            {"label": classes[label - 1], "score": round(score, 4), "box": [round(x, 1) for x in box]}
            for label, score, box in zip(
                *(found[k][shown].tolist() for k in ("labels", "scores", "boxes")), strict=True
            )
        ]
        results.append({"image": str(file), "detections": objects})
        write_jpeg(draw(image, found, classes, args.threshold), str(out / names[file]), quality=90)
    (out / "detections.json").write_text(json.dumps(results, indent=1))
    if results:
        count, total = len(results), sum(len(result["detections"]) for result in results)
        print(f"{total} objects in {count} images; pictures and detections.json in {out}")
        print(
            f"{count / seconds['whole']:.1f} images/s; {count / seconds['network']:.1f} without post-processing "
            "(one image at a time, without reading and drawing)"
        )
    if broken:
        raise ValueError("; ".join(broken))


def _distinct_names(files: list[Path]) -> dict[Path, str]:
    """A file name for each picture; equal names from different folders are numbered."""
    names: dict[Path, str] = {}
    for file in dict.fromkeys(files):
        candidates = (f"{file.stem}{suffix}.jpg" for suffix in ("", *(f"-{i}" for i in range(2, len(files) + 2))))
        taken = set(names.values())
        names[file] = next(name for name in candidates if name not in taken)
    return names


@torch.inference_mode()
def _timed(model: SSD, batch: list[Tensor]) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
    """What the model finds, and the seconds that it took with post-processing and without."""

    def now() -> float:
        if batch[0].is_cuda:
            torch.cuda.synchronize()
        return perf_counter()

    sizes = torch.tensor([image.shape[-2:] for image in batch])
    start = now()
    heads = model.heads(model.transform(batch))
    middle = now()
    found = unpad(*model.detections(*heads, sizes))
    return found, {"network": middle - start, "whole": now() - start}


if __name__ == "__main__":
    _cli.run(main)
