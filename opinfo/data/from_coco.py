"""Makes coco_boxes.json: ``python opinfo/data/from_coco.py instances.json > opinfo/data/coco_boxes.json``."""

import json
import sys


def convert(coco: dict) -> tuple[dict, dict[str, int]]:
    """COCO's instances to relative corners and labels 1..80, and how many annotations were left out and why."""
    categories = sorted(coco["categories"], key=lambda c: c["id"])
    label = {c["id"]: i for i, c in enumerate(categories, 1)}
    dropped = {"iscrowd": 0, "without area": 0, "images without boxes": 0}
    images = {}
    for image in sorted(coco["images"], key=lambda i: i["id"]):
        source = {key: image[key] for key in ("id", "license", "flickr_url")}
        images[image["id"]] = source | {"boxes": [], "labels": [], "_size": (image["width"], image["height"])}
    for annotation in sorted(coco["annotations"], key=lambda a: a["id"]):
        image = images[annotation["image_id"]]
        width, height = image["_size"]
        x, y, w, h = annotation["bbox"]
        box = [round(x / width, 5), round(y / height, 5), round((x + w) / width, 5), round((y + h) / height, 5)]
        if annotation["iscrowd"]:
            dropped["iscrowd"] += 1
        elif box[2] <= box[0] or box[3] <= box[1]:
            dropped["without area"] += 1
        else:
            image["boxes"].append(box)
            image["labels"].append(label[annotation["category_id"]])
    kept = [image for image in images.values() if image["boxes"]]
    dropped["images without boxes"] = len(images) - len(kept)
    for image in kept:
        del image["_size"]
    used = {image["license"] for image in kept}
    licences = [licence for licence in coco["licenses"] if licence["id"] in used]
    return {"images": kept, "categories": [c["name"] for c in categories], "licences": licences}, dropped


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        made, dropped = convert(json.load(file))
    lines = ",\n".join(json.dumps(image, separators=(",", ":")) for image in made.pop("images"))
    rest = ",\n".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in made.items())
    print(f'{{"images":[\n{lines}\n],\n{rest}}}')
    print(f"dropped: {dropped}", file=sys.stderr)
