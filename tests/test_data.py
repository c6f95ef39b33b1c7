"""Data sets: both layouts, bad input, images of every kind, augmentation."""

import json
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("torchvision")
from torchvision import tv_tensors
from torchvision.transforms import v2

from ssd_ext import GroundTruth
from ssd_ext.data import augmentation, collate, load_dataset, read_image, to_float, training_target
from ssd_ext.data.augmentation import _IoUCrop, _shrink

SAMPLE = Path(__file__).resolve().parent.parent / "samples" / "playing_cards"
CARDS = ["ace", "jack", "king", "nine", "queen", "ten"]


def voc_xml(objects, size=(40, 30)):
    """An annotation with ``objects`` of (name, four coordinates, difficult)."""
    things = "".join(
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for name, box, difficult in objects
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation>{sides}{things}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """A function that adds an image to a VOC folder and returns the folder."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)

    def add(name, objects, size=(40, 30), image=None):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(voc_xml(objects, size))
        (image or Image.new("RGB", (40, 30))).save(tmp_path / "JPEGImages" / f"{name}.png")
        with open(tmp_path / "ImageSets" / "Main" / "train.txt", "a") as names:
            names.write(f"{name}\n")
        return tmp_path

    return add


def coco_dict():
    return {
        "images": [{"id": 7, "file_name": "b.png", "width": 40, "height": 30}, {"id": 3, "file_name": "a.png"}],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"id": 5, "image_id": 7, "category_id": 90, "bbox": [2, 3, 10, 20], "iscrowd": 0, "area": 77.5},
            {"id": 6, "image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        ],
    }


@pytest.fixture
def coco(tmp_path):
    """A function that writes a COCO file with its images into folders."""
    pytest.importorskip("pycocotools")

    def write(content, file="instances.json", images="images"):
        for path in (tmp_path / file, tmp_path / images / "x"):
            path.parent.mkdir(parents=True, exist_ok=True)
        for name in ("a.png", "b.png"):
            Image.new("RGB", (40, 30)).save(tmp_path / images / name)
        (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / file

    return write


# The sample and VOC folders


def test_the_sample_is_whole_and_small():
    splits = {split: load_dataset(SAMPLE, split) for split in ("train", "test")}
    assert {split: (len(data), len(data.boxes)) for split, data in splits.items()} == {
        "train": (12, 32),
        "test": (6, 12),
    }
    assert all(data.classes == CARDS and set(data.labels.tolist()) == {1, 2, 3, 4, 5, 6} for data in splits.values())
    assert not set(splits["train"].names) & set(splits["test"].names)
    assert sum(file.stat().st_size for file in SAMPLE.rglob("*") if file.is_file()) < 1.5e6
    assert "Apache License" in (SAMPLE / "LICENSE").read_text()


def test_a_photograph_and_its_target():
    data = load_dataset(SAMPLE, "test")
    image, target = data[data.names.index("IMG_2383")]
    assert isinstance(image, tv_tensors.Image) and image.shape == (3, 416, 312) and image.dtype == torch.uint8
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and target["boxes"].canvas_size == (416, 312)
    assert target["boxes"].tolist() == [[79, 111, 227, 304]] and target["boxes"].dtype == torch.float32
    assert [data.classes[label - 1] for label in target["labels"]] == ["ace"]
    assert target["area"].tolist() == [148 * 193]
    assert not target["difficult"].any() and not target["crowd"].any()
    assert (target["name"], target["image_id"]) == ("IMG_2383", 0)
    assert load_dataset(SAMPLE, "test", one_based=False)[0][1]["boxes"].tolist() == [[80, 112, 227, 304]]
    assert 100 < image[:, 150:270, 90:215].float().mean() < 255  # the card is white, its surroundings are darker
    assert image[:, 150:270, 90:215].float().mean() > image[:, :90].float().mean() + 40


def test_indices():
    data = load_dataset(SAMPLE, "test")
    assert data.target(-1)["name"] == data.names[-1] and len(data.target(-1)["labels"]) == 4
    with pytest.raises(IndexError):
        data.target(6)
    data.target(0)["boxes"].zero_()
    assert data.target(0)["boxes"].any()


def test_without_a_split_every_annotation_counts():
    assert len(load_dataset(SAMPLE)) == 18


def test_classes_come_from_all_splits_or_the_list(voc):
    voc("a", [("dog", (1, 1, 5, 5), 0)])
    folder = voc("b", [("cat", (1, 1, 5, 5), 1)])
    (folder / "ImageSets/Main/train.txt").write_text("a  1\n")
    assert load_dataset(folder, "train").classes == ["cat", "dog"]
    assert load_dataset(folder, "train").labels.tolist() == [2]
    assert load_dataset(folder, classes=["dog", "cat", "cow"]).labels.tolist() == [1, 2]
    assert load_dataset(folder).difficult.tolist() == [False, True]
    (folder / "classes.txt").write_text("cow\ndog\ncat\n")
    assert load_dataset(folder).labels.tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"b.xml: object 1 has the unknown class 'cat'; known are dog, cow"):
        load_dataset(folder, classes=["dog", "cow"])


BAD_BOXES = {
    "is inverted": (20, 3, 10, 9),
    "is not finite": (1, 2, "nan", 4),
    "has no area": (11, 5, 10, 9),
    "lies outside of the image": (50, 5, 60, 9),
}


@pytest.mark.parametrize("fault", BAD_BOXES)
def test_a_bad_box_is_named_or_left_out(voc, fault):
    box = BAD_BOXES[fault]
    voc("good", [("dog", (1, 1, 5, 5), 0)])
    folder = voc("rex", [("dog", (1, 1, 5, 5), 0), ("dog", box, 0), ("dog", (3, 3, 7, 7), 0)])
    with pytest.raises(ValueError) as caught:
        load_dataset(folder)
    assert f"{folder / 'Annotations' / 'rex.xml'}: object 2 of image rex {fault}" in str(caught.value)
    assert f"(xmin, ymin, xmax, ymax) is ({', '.join(map(str, box))}), the image 40 x 30" in str(caught.value)
    with pytest.warns(UserWarning, match="left out 1 of 4 boxes") as caught:
        data = load_dataset(folder, invalid="skip")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert data.target(1)["boxes"].tolist() == [[0, 0, 5, 5], [2, 2, 7, 7]]


def test_boxes_beyond_the_image_are_clipped_and_counted_once(voc):
    voc("a", [("dog", (-3, 1, 50, 31.5), 0), ("dog", (0, 1, 5, 5), 0)])
    folder = voc("b", [("dog", (1, 1, 40, 30), 0)])
    with pytest.warns(UserWarning) as caught:
        data = load_dataset(folder)
    assert [str(entry.message) for entry in caught] == [
        "clipped 2 of 3 boxes to their images, beyond which they reached by at most 10 pixels"
    ]
    assert caught[0].filename == __file__
    assert data.boxes.tolist() == [[0, 0, 40, 30], [0, 0, 5, 5], [0, 0, 40, 30]]


def test_a_pixel_wide_box_of_voc_has_an_area(voc):
    assert load_dataset(voc("a", [("dog", (3, 3, 3, 9), 0)])).boxes.tolist() == [[2, 2, 3, 9]]


def test_images_without_objects(voc):
    voc("a", [])
    data = load_dataset(voc("b", [("dog", (1, 1, 5, 5), 0)]), transform=augmentation((20, 20)))
    assert data.target(0)["boxes"].shape == (0, 4)
    assert data[0][1]["boxes"].shape == (0, 4) and data[0][0].shape == (3, 20, 20)


def break_split(folder):
    (folder / "ImageSets/Main/train.txt").write_text("\n")


BROKEN_VOC = {
    "no split 'val' in .*Main; there is: train": lambda folder: "val",
    "no images in split train": break_split,
    "no annotation .*b.xml": lambda folder: (folder / "ImageSets/Main/train.txt").write_text("a\nb"),
    "a.xml is not an XML file": lambda folder: (folder / "Annotations/a.xml").write_text("<annotation>"),
    r"object 1 \(dog\) has no box of four numbers: \['1', None": lambda folder: (
        folder / "Annotations/a.xml"
    ).write_text("<annotation><object><name>dog</name><bndbox><xmin>1</xmin></bndbox></object></annotation>"),
    r"a.xml: the size .'40', 'wide'. is not two whole numbers": lambda folder: (
        folder / "Annotations/a.xml"
    ).write_text(voc_xml([("dog", (1, 1, 5, 5), 0)], (40, "wide"))),
    r"class names must be unique: got \['dog', 'dog'\]": lambda folder: (folder / "classes.txt").write_text("dog\ndog"),
    "no folder .*JPEGImages": lambda folder: shutil.rmtree(folder / "JPEGImages"),
    "1 of 1 images cannot be used: no image .*a.jpg": lambda folder: (folder / "JPEGImages/a.png").unlink(),
    "no object in any annotation": lambda folder: (folder / "Annotations/a.xml").write_text("<annotation/>"),
    "a.png is 40 x 30 pixels, but .*a.xml was made for 80 x 60": lambda folder: (
        folder / "Annotations/a.xml"
    ).write_text(voc_xml([("dog", (1, 1, 5, 5), 0)], (80, 60))),
    "is no data set: it should be": lambda folder: shutil.rmtree(folder / "Annotations"),
}


@pytest.mark.parametrize("message", BROKEN_VOC)
def test_a_broken_folder_is_explained(voc, message):
    folder = voc("a", [("dog", (1, 1, 5, 5), 0)])
    split = BROKEN_VOC[message](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_dataset(folder, split if isinstance(split, str) else "train")


def test_a_missing_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set .*nowhere"):
        load_dataset(tmp_path / "nowhere")


def test_an_unknown_way_to_treat_bad_boxes():
    with pytest.raises(ValueError, match=r"invalid must be .* got 'drop'"):
        load_dataset(SAMPLE, invalid="drop")


# Images


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def palette(transparency=None):
    image = Image.fromarray(GREY).convert("P")
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


IMAGES = {
    "grey.png": Image.fromarray(GREY),
    "grey_alpha.png": Image.fromarray(GREY).convert("LA"),
    "alpha.png": Image.fromarray(GREY).convert("RGBA"),
    "palette.png": palette(),
    "palette_transparent.png": palette(bytes(range(200))),
    "16_bit.png": Image.fromarray(GREY.astype(np.uint16) * 256 + 99),
    "16_bit.tif": Image.fromarray(GREY.astype(np.uint16) * 256 + 99),
    "cmyk.tif": Image.fromarray(GREY).convert("RGB").convert("CMYK"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_kind_become_rgb(tmp_path, name):
    IMAGES[name].save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / name)
    assert image.dtype == torch.uint8
    assert torch.equal(image.as_subclass(Tensor), torch.from_numpy(GREY).expand(3, 3, 4))


def test_a_cmyk_photograph(tmp_path):
    Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    image = read_image(tmp_path / "a.jpg").float().mean((1, 2))
    assert (image - torch.tensor([200.0, 40, 90])).abs().max() < 3


def test_32_bit_pixels_are_refused(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a.tif cannot be read as an image: 32-bit pixels .*mode F"):
        read_image(tmp_path / "a.tif")


def test_broken_images_are_all_named_when_loading(voc):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    folder = voc("a", [("dog", (1, 1, 5, 5), 0)])
    for name in "bc":
        voc(name, [("dog", (1, 1, 5, 5), 0)])
        (folder / f"JPEGImages/{name}.png").unlink()
    noise.save(folder / "JPEGImages/b.jpg")
    whole = (folder / "JPEGImages/b.jpg").read_bytes()
    (folder / "JPEGImages/b.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "JPEGImages/c.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"2 of 3 images cannot be used: .*b.jpg .*truncated.*; .*c.jpg .*identify"):
        load_dataset(folder)
    (folder / "JPEGImages/c.jpg").write_bytes(whole)
    data = load_dataset(folder, check_images=False)
    assert data[2][0].shape == (3, 30, 40)
    with pytest.raises(ValueError, match=r"b.jpg cannot be read as an image: .*truncated"):
        data[1]


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image .*a.png"):
        read_image(tmp_path / "a.png")


def test_a_turned_image_follows_its_annotation(voc):
    """EXIF says: turn by a quarter. The annotated size tells whether the boxes are of the turned image."""
    stored = Image.new("RGB", (40, 30))
    stored.putpixel((0, 29), (255, 255, 255))  # the lower left corner, upright the upper left
    exif = stored.getexif()
    exif[0x0112] = 6
    objects = [("dog", (1, 1, 2, 2), 0)]
    voc("shown", objects, (30, 40))
    voc("stored", objects, (40, 30))
    folder = voc("untold", objects, None)
    for name in ("shown", "stored", "untold"):
        stored.save(folder / f"JPEGImages/{name}.png", exif=exif)
    data = load_dataset(folder)
    pictures = {name: data[index] for index, name in enumerate(data.names)}
    for name in ("shown", "untold"):
        image, target = pictures[name]
        assert image.shape == (3, 40, 30) and image[0, 0, 0] == 255
        assert target["boxes"].canvas_size == (40, 30)
    image, target = pictures["stored"]
    assert image.shape == (3, 30, 40) and image[0, 29, 0] == 255
    assert target["boxes"].canvas_size == (30, 40)


# COCO files


def test_a_coco_file(coco, capfd):
    file = coco(coco_dict())
    data = load_dataset(file)
    assert (data.classes, data.category_ids) == (["person", "toothbrush"], [1, 90])
    assert (data.names, data.image_ids) == (["a.png", "b.png"], [3, 7])
    image, target = data[1]
    assert image.shape == (3, 30, 40)
    assert target["boxes"].tolist() == [[2, 3, 12, 23], [0, 0, 40, 30]]
    assert target["labels"].tolist() == [2, 1]
    assert target["crowd"].tolist() == [False, True] and not target["difficult"].any()
    assert target["area"].tolist() == [77.5, 1200]
    assert len(data.target(0)["labels"]) == 0
    assert capfd.readouterr().out == ""
    assert load_dataset(file.parent).names == data.names
    other = load_dataset(file, classes=["toothbrush", "dog", "person"])
    assert other.labels.tolist() == [1, 3] and other.category_ids == [90, None, 1]


def test_a_coco_file_without_pycocotools(coco, monkeypatch):
    file = coco(coco_dict())
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'needs pycocotools: pip install "ssd_ext\[train\]"'):
        load_dataset(file)


def test_a_coco_file_whose_images_are_elsewhere(coco):
    file = coco(coco_dict())
    for image in file.parent.rglob("*.png"):
        image.unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .* of .*; give images="):
        load_dataset(file)


def test_a_coco_file_without_any_annotation(coco):
    """As that of photographs to be looked at only, which COCO calls image info."""
    data = load_dataset(coco({**coco_dict(), "annotations": []}))
    assert data.classes == ["person", "toothbrush"]
    assert [data.target(i)["boxes"].shape for i in range(len(data))] == [(0, 4), (0, 4)]


@pytest.mark.parametrize("images", ["val2017", "images/val2017", "images", "annotations"])
def test_a_coco_folder(coco, images):
    file = coco(coco_dict(), "annotations/instances_val2017.json", images)
    given = {"images": file.parent.parent / "images"} if images == "images" else {}
    data = load_dataset(file.parent.parent, "val2017", **given)
    assert data.paths[0] == file.parent.parent / images / "a.png"


def changed(key, entry, **values):
    content = coco_dict()
    content[key][entry] |= values
    return content


BROKEN_COCO = {
    "annotation 5 of image b.png has the unknown class None .category 4.; known are person, toothbrush": changed(
        "annotations", 0, category_id=4
    ),
    "annotation 5 belongs to the unknown image 8": changed("annotations", 0, image_id=8),
    r"annotation 5 of b.png has no box of four numbers: \[1, 2, 3\]": changed("annotations", 0, bbox=[1, 2, 3]),
    "two categories have one name": changed("categories", 0, name="person"),
    "or two images one id": changed("images", 0, id=3),
    r"object 1 of image b.png has no area: \[x, y, width, height\] is \(2, 3, 0, 20\)": changed(
        "annotations", 0, bbox=[2, 3, 0, 20]
    ),
    r"object 1 of image b.png is inverted: .* is \(2, 3, 10, -20\)": changed("annotations", 0, bbox=[2, 3, 10, -20]),
    "images cannot be used: no image .*c.png": changed("images", 1, file_name="c.png"),
    "is not a COCO annotation file: JSONDecodeError": "{",
    "is not a COCO annotation file: KeyError..categories": {"images": [], "annotations": []},
    "instances.json: no images": {"images": [], "annotations": [], "categories": []},
}


@pytest.mark.parametrize("message", BROKEN_COCO)
def test_a_broken_coco_file_is_explained(coco, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_dataset(coco(BROKEN_COCO[message]))


# Training


def test_training_leaves_out_crowds_and_difficult_objects():
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.rand(3, 4), format="XYXY", canvas_size=(9, 9)),
        "labels": torch.tensor([1, 2, 3]),
        "difficult": torch.tensor([False, True, False]),
        "crowd": torch.tensor([False, False, True]),
        "area": torch.ones(3),
        "name": "a",
    }
    kept = training_target(target)
    assert kept["labels"].tolist() == [1] and torch.equal(kept["boxes"], target["boxes"][:1]) and kept["name"] == "a"
    assert kept["boxes"].canvas_size == (9, 9)
    assert training_target(target, difficult=True)["labels"].tolist() == [1, 2]
    assert len(target["labels"]) == 3


@pytest.mark.parametrize("difficult", [False, True])
def test_augmentation_trains_on_difficult_objects_if_asked_to(voc, difficult):
    augment = augmentation((20, 20), zoom_out=0, crop=False, difficult=difficult)
    data = load_dataset(voc("a", [("dog", (1, 1, 20, 20), 0), ("cat", (5, 5, 30, 30), 1)]), transform=augment)
    assert len(data[0][1]["labels"]) == 1 + difficult


def test_batches():
    data = load_dataset(SAMPLE, "test", transform=to_float())
    images, ground_truth, names = collate([data[0], data[5]])
    assert [image.shape for image in images] == [(3, 416, 312), (3, 234, 416)]
    assert all(type(image) is Tensor and image.max() <= 1 for image in images)
    assert type(ground_truth) is GroundTruth and {type(part) for part in ground_truth} == {Tensor}
    assert ground_truth.offsets.tolist() == [0, 1, 5]
    for found, index in zip(ground_truth.to_targets(), (0, 5), strict=True):
        assert torch.equal(found["boxes"], data.target(index)["boxes"])
        assert torch.equal(found["labels"], data.target(index)["labels"])
    assert names == [data.names[0], data.names[5]]
    stacked, _, _ = collate([data[0], data[1]])
    assert stacked.shape == (2, 3, 416, 312) and stacked.dtype == torch.float32


def test_a_batch_of_images_without_objects(voc):
    data = load_dataset(voc("b", [("dog", (1, 1, 5, 5), 1)]), transform=augmentation((20, 20)))  # a difficult one
    _, ground_truth, _ = collate([data[0], data[0]])
    assert [tuple(part.shape) for part in ground_truth] == [(0, 4), (0,), (3,)]
    assert [part.dtype for part in ground_truth] == [torch.float32, torch.int64, torch.int64]


COLORS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)
BOXES = torch.tensor([[5, 8, 60, 50], [80, 0, 120, 40], [0, 60, 40, 90], [70, 50, 120, 90]], dtype=torch.float32)


def colored():
    """An image of 120 x 90 with rectangles, each in the colour of its label."""
    image = torch.zeros(3, 90, 120, dtype=torch.uint8)
    for (x1, y1, x2, y2), color in zip(BOXES.long().tolist(), COLORS, strict=True):
        image[:, y1:y2, x1:x2] = color[:, None, None]
    target = {
        "boxes": tv_tensors.BoundingBoxes(BOXES.clone(), format="XYXY", canvas_size=(90, 120)),
        "labels": torch.tensor([1, 2, 3, 4]),
        "difficult": torch.zeros(4, dtype=torch.bool),
        "crowd": torch.zeros(4, dtype=torch.bool),
        "area": torch.ones(4),
    }
    return tv_tensors.Image(image), target


def test_augmented_boxes_stay_on_their_objects():
    torch.manual_seed(0)
    transform = augmentation((200, 160), photometric=0, fill=(0, 0, 0))
    lost = 0
    for _ in range(60):
        image, target = transform(*colored())
        assert image.shape == (3, 200, 160) and image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
        assert len({len(target[key]) for key in ("boxes", "labels", "difficult", "crowd", "area")}) == 1
        lost += 4 - len(target["labels"])
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            away = (image - COLORS[label - 1, :, None, None] / 255).abs().amax(0)
            rows, columns = (away < 0.5).nonzero().unbind(1)
            seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (seen - box).abs().max() <= 1.01
    assert 0 < lost < 200


def test_no_object_is_lost_at_the_edges():
    transform = augmentation((97, 101), crop=False, zoom_out=0)
    for width in range(30, 160, 7):
        canvas = (width + 11, width)
        target = colored()[1] | {
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor([[0.0, 0, width, width + 11]]).expand(4, 4), format="XYXY", canvas_size=canvas
            )
        }
        assert len(transform(tv_tensors.Image(torch.zeros(3, *canvas, dtype=torch.uint8)), target)[1]["labels"]) == 4


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2, 2), (3000, 4000)])
def test_augmentation_of_extreme_sizes(size):
    torch.manual_seed(1)
    boxes = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    target = {key: value[:1] for key, value in colored()[1].items()}
    target["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    transform = augmentation((30, 40))
    for _ in range(4):
        image, _ = transform(tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8)), target)
        assert image.shape == (3, 30, 40)


def test_large_photographs_are_shrunk_first():
    image, target = colored()
    image, target = _shrink(image, target, 60)
    assert image.shape == (3, 45, 60) and torch.equal(target["boxes"].as_subclass(Tensor), BOXES / 2)
    assert target["boxes"].canvas_size == (45, 60)
    torch.manual_seed(0)
    seen = []
    transform = augmentation((12, 18), crop=False, zoom_out=0, flip=0, photometric=0)
    transform.transforms.insert(2, lambda *sample: seen.append(sample[0].shape) or sample)
    transform(*colored())
    assert seen == [(3, 45, 60)]  # 18 / 0.3 pixels


def test_crops_are_distributed_as_those_of_torchvision():
    torch.manual_seed(2)
    image, target = colored()
    moments = []
    for crop in (_IoUCrop(), v2.RandomIoUCrop()):
        drawn = [crop.make_params([image, target["boxes"]]) for _ in range(700)]
        kept = [params for params in drawn if params]
        assert all(0.5 <= params["width"] / params["height"] <= 2 for params in kept)
        area = torch.tensor([params["height"] * params["width"] / (90 * 120) for params in kept])
        inside = torch.tensor([params["is_within_crop_area"].sum() for params in kept]).float()
        left = torch.tensor([params["left"] for params in kept]).float()
        moments.append((len(kept) / 700, area.mean().item(), inside.mean().item(), left.mean().item() / 120))
    assert moments[0] == pytest.approx(moments[1], abs=0.06)


def batches(workers, seed):
    data = load_dataset(SAMPLE, "train", transform=augmentation((60, 60)), check_images=False)
    generator = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, shuffle=True, collate_fn=collate, num_workers=workers, generator=generator
    )
    torch.manual_seed(seed)
    return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seed_repeats_the_augmentation(workers):
    first, again, other = batches(workers, 5), batches(workers, 5), batches(workers, 6)
    for (images, ground_truth, names), (images_again, *rest) in zip(first, again, strict=True):
        assert torch.equal(images, images_again)
        assert all(map(torch.equal, ground_truth, rest[0])) and names == rest[1]
    assert not torch.equal(first[0][0], other[0][0])


def test_a_data_set_can_be_pickled():
    data = pickle.loads(pickle.dumps(load_dataset(SAMPLE, "test", transform=augmentation((60, 60)))))
    assert data[0][0].shape == (3, 60, 60)
