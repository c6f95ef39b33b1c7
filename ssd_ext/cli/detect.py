"""``ssd_ext detect IMAGE... --weights FILE``."""

import argparse
import json
import re
from pathlib import Path
from time import perf_counter
from typing import Any

from torchvision.io import write_jpeg
from tqdm import tqdm

from ssd_ext.cli import _shared
from ssd_ext.data import read_image
from ssd_ext.inference import as_json, detect_images, draw, filter_by_score

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, weights, where to write."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    _shared.add_weights(parser)
    _shared.add_device(parser)
    parser.add_argument("--out", default="detections", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--threshold", type=float, default=0.5, help="minimum score (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write pictures and detections.json."""
    model, classes = _shared.read_detector(args)
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
    seconds = 0.0
    for file in tqdm(files, unit="image", disable=len(files) < 10):
        try:
            image = read_image(file)
        except (OSError, ValueError) as e:
            broken.append(str(e))
            continue
        if not results:
            detect_images(model, [image])  # the first call sets threads and memory up
        start = perf_counter()
        found = filter_by_score(detect_images(model, [image])[0], args.threshold)
        seconds += perf_counter() - start
        results.append({"image": str(file), "detections": as_json(found, classes)})
        write_jpeg(draw(image, found, classes), str(out / names[file]), quality=90)
    (out / "detections.json").write_text(json.dumps(results, indent=1))
    if results:
        total = sum(len(result["detections"]) for result in results)
        print(f"{total} objects in {len(results)} images; pictures and detections.json in {out}")
        print(f"{len(results) / seconds:.1f} images/s (one image at a time, without reading and drawing)")
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
