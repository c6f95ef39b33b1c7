"""Average precision: cases by hand, a plain reading of VOC's kit, pycocotools; hostile input; the picture."""

import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import tensor

from ssd_ext import evaluation
from ssd_ext.evaluation import COCO_METRICS, average_precision, coco_results, plot_pr_curves

SAMPLE = Path(__file__).resolve().parent.parent / "samples" / "playing_cards"


def coco_metrics(*arguments):
    pytest.importorskip("pycocotools")
    return evaluation.coco_metrics(*arguments)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def found(corners, scores, labels=None):
    labels = [1] * len(scores) if labels is None else labels
    return {"boxes": boxes(*corners), "scores": tensor(scores).float(), "labels": tensor(labels, dtype=torch.int64)}


def truth(corners, labels=None, **flags):
    labels = [1] * len(corners) if labels is None else labels
    flags = {key: tensor(values, dtype=torch.bool) for key, values in flags.items()}
    return {"boxes": boxes(*corners), "labels": tensor(labels, dtype=torch.int64), **flags}


A, B, C, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10), (70, 70, 80, 80)
NEAR_A = (0, 0, 10, 8)  # IoU 0.8 with A
HALF_A = (0, 0, 10, 5)  # IoU 0.5 with A


def test_by_hand():
    """Three objects; by score: right, wrong, right, wrong (A again): precision 1, 1/2, 2/3, 2/4."""
    result = average_precision([found([A, FAR, B, NEAR_A], [0.9, 0.8, 0.7, 0.6])], [truth([A, B, C])], 2)
    assert result.precision[0].tolist() == pytest.approx([1, 1 / 2, 2 / 3, 2 / 4])
    assert result.recall[0].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert result.scores[0].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert result.objects.tolist() == [3]
    assert result.ap.tolist() == pytest.approx([(1 + 2 / 3) / 3]) and result.mAP == pytest.approx((1 + 2 / 3) / 3)
    eleven = average_precision(
        [found([A, FAR, B, NEAR_A], [0.9, 0.8, 0.7, 0.6])], [truth([A, B, C])], 2, rule="11point"
    )
    assert eleven.mAP == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)  # recalls 0 to 0.3, then 0.4 to 0.6


def test_a_recall_of_three_tenths_reaches_the_point_three_tenths():
    objects = [(20 * i, 0, 20 * i + 10, 10) for i in range(10)]
    result = average_precision([found(objects[:3], [0.9, 0.8, 0.7])], [truth(objects)], 2, rule="11point")
    assert result.mAP == pytest.approx(4 / 11)


def test_the_order_of_detections_and_images():
    detections = [found([B], [0.5]), found([NEAR_A, A, FAR], [0.6, 0.9, 0.95])]
    targets = [truth([B]), truth([A])]
    result = average_precision(detections, targets, 2)
    assert result.precision[0].tolist() == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    swapped = average_precision(detections[::-1], targets[::-1], 2)
    assert torch.equal(result.precision[0], swapped.precision[0])


def test_of_equal_scores_the_first_counts_first():
    right_first = average_precision([found([A, FAR], [0.5, 0.5])], [truth([A])], 2)
    wrong_first = average_precision([found([FAR, A], [0.5, 0.5])], [truth([A])], 2)
    assert (right_first.mAP, wrong_first.mAP) == (1, 0.5)


def test_the_threshold_is_met_from_itself_on():
    assert average_precision([found([HALF_A], [0.5])], [truth([A])], 2, 0.5).mAP == 1
    assert average_precision([found([HALF_A], [0.5])], [truth([A])], 2, 0.51).mAP == 0


def test_a_detection_does_not_turn_to_the_second_best_object():
    """As in VOC's kit: both detections overlap the first object best."""
    objects = [truth([(0, 0, 10, 10), (0, 0, 10, 7)])]
    detections = [found([(0, 0, 10, 10), (0, 0, 10, 9)], [0.9, 0.8])]
    assert average_precision(detections, objects, 2).mAP == 0.5
    assert coco_metrics(detections, objects)["AP50"] == pytest.approx(1)


def test_difficult_objects_count_neither_way():
    targets = [truth([A, B], difficult=[True, False])]
    result = average_precision([found([A, NEAR_A, B], [0.9, 0.8, 0.7])], targets, 2)
    assert result.precision[0].tolist() == [1] and result.mAP == 1 and result.objects.tolist() == [1]
    assert math.isnan(average_precision([found([A], [0.9])], [truth([A], difficult=[True])], 2).mAP)


def test_detections_in_a_crowd_count_neither_way():
    crowd = (0, 50, 100, 100)
    targets = [truth([A, crowd], crowd=[False, True])]
    detections = [found([FAR, (0, 45, 10, 55), (0, 44, 10, 54), A], [0.9, 0.8, 0.7, 0.6])]
    result = average_precision(detections, targets, 2)  # the third has 0.4 of its area in the crowd
    assert result.precision[0].tolist() == [0, 0.5] and result.objects.tolist() == [1]
    other_class = truth([A, crowd], [1, 2], crowd=[False, True])
    assert average_precision(detections, [other_class], 3).precision[0].tolist() == [0, 0, 0, 0.25]


def test_classes_are_apart_and_those_without_objects_are_left_out():
    detections = [found([A, A, B], [0.9, 0.8, 0.7], [1, 2, 3])]
    result = average_precision(detections, [truth([A, C], [2, 4])], 5)
    assert result.ap.isnan().tolist() == [True, False, True, False]
    assert result.ap[1] == 1 and result.ap[3] == 0 and result.mAP == 0.5
    assert len(result.precision[3]) == 0


def test_without_images_or_anything_in_them():
    for detections, targets in (([], []), ([found([], [])], [truth([])]), ([found([A], [0.5])], [truth([])])):
        assert math.isnan(average_precision(detections, targets, 3).mAP)
        metrics = coco_metrics(detections, targets)
        assert list(metrics) == list(COCO_METRICS) and all(map(math.isnan, metrics.values()))
    assert average_precision([found([], [])], [truth([A])], 2, rule="11point").mAP == 0
    assert coco_metrics([found([], [])], [truth([A])])["AP"] == 0


def test_values_that_are_not_finite():
    nan, inf = math.nan, math.inf
    targets = [truth([A])]
    dropped = [found([A, A], [nan, 0.5])]
    assert average_precision(dropped, targets, 2).precision[0].tolist() == [1]
    assert coco_metrics(dropped, targets)["AP"] == pytest.approx(1)
    for broken in ((0, 0, nan, 10), (0, 0, inf, 10), (nan,) * 4):
        wrong = [found([broken, A], [0.9, 0.5])]
        assert average_precision(wrong, targets, 2).precision[0].tolist() == [0, 0.5]
        assert coco_metrics(wrong, targets)["AP50"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "detections, targets, options, message",
    [
        ([], [truth([A])], {}, "detections must be of the 1 images of targets: got 0"),
        ([found([A], [0.5], [2])], [truth([A])], {}, r"detections\[0\]: labels must be in 1..1: got 2"),
        ([found([A], [0.5])], [truth([A], [0])], {}, r"targets\[0\]: labels must be in 1..1: got 0"),
        (
            [found([A], [0.5, 0.4])],
            [truth([A])],
            {},
            r"detections\[0\]: .* must be .*: got \[\(1, 4\), \(2,\), \(2,\)\]",
        ),
        ([], [], {"rule": "12point"}, 'rule must be "area" or "11point": got \'12point\''),
        ([], [], {"iou_threshold": 0.0}, r"iou_threshold must be in \(0, 1\]: got 0.0"),
    ],
)
def test_wrong_input(detections, targets, options, message):
    with pytest.raises(ValueError, match=message):
        average_precision(detections, targets, 2, **options)


def random_case(generator, images=60, num_classes=5, apart=False, flags=True):
    """Noisy detections of random objects; ``apart``: objects that do not overlap each other."""
    detections, targets = [], []
    for _ in range(images):
        count = int(torch.randint(0, 8, (), generator=generator))
        corners = torch.rand(count, 2, generator=generator) * 60
        if apart:
            corners += torch.arange(count)[:, None] * 200
        gt = torch.cat([corners, corners + 20 + torch.rand(count, 2, generator=generator) * 60], dim=1)
        labels = torch.randint(1, num_classes, (count,), generator=generator)
        source = torch.arange(count).repeat(4)
        noisy = gt[source] + torch.randn(len(source), 4, generator=generator) * 8
        scores = (torch.rand(len(source), generator=generator) * 30).round() / 30 if flags else None
        scores = torch.rand(len(source), generator=generator) if scores is None else scores
        detections.append({"boxes": noisy, "scores": scores, "labels": labels[source]})
        difficult = torch.rand(count, generator=generator) < (0.2 if flags else 0)
        targets.append({"boxes": gt, "labels": labels, "difficult": difficult})
    return detections, targets


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def voc_kit(detections, targets, label, rule):
    """The loops of VOC's development kit."""
    rows = [
        (score, image, box)
        for image, found in enumerate(detections)
        for box, score, mine in zip(*(found[key].tolist() for key in ("boxes", "scores", "labels")), strict=True)
        if mine == label
    ]
    rows.sort(key=lambda row: -row[0])
    taken, right, wrong, points = set(), 0, 0, []
    total = sum(int(((t["labels"] == label) & ~t["difficult"]).sum()) for t in targets)
    for _, image, box in rows:
        gt = targets[image]
        ious = [
            overlap(box, other) if mine == label else -1
            for other, mine in zip(gt["boxes"].tolist(), gt["labels"].tolist(), strict=True)
        ]
        best = ious.index(max(ious)) if ious else None
        if best is not None and ious[best] >= 0.5:
            if gt["difficult"][best]:
                continue
            right, wrong = (right, wrong + 1) if (image, best) in taken else (right + 1, wrong)
            taken.add((image, best))
        else:
            wrong += 1
        points.append((right / total, right / (right + wrong)))
    if rule == "11point":
        levels = (min([tenth / 10] + [r for r, _ in points if math.isclose(r, tenth / 10)]) for tenth in range(11))
        return sum(max((p for r, p in points if r >= level), default=0) for level in levels) / 11
    area, before = 0.0, 0.0
    for index, (recall, _) in enumerate(points):
        area += (recall - before) * max(p for _, p in points[index:])
        before = recall
    return area


@pytest.mark.parametrize("rule", ["area", "11point"])
def test_against_the_loops_of_vocs_kit(generator, rule):
    detections, targets = random_case(generator)
    result = average_precision(detections, targets, 5, rule=rule)
    expected = [voc_kit(detections, targets, label, rule) for label in range(1, 5)]
    assert result.ap.tolist() == pytest.approx(expected, abs=1e-12)
    assert 0.1 < result.mAP < 0.9


def test_against_pycocotools(generator):
    """With objects apart, no crowds and no ties, COCO's AP50 differs by its 101 samples of the curve alone."""
    detections, targets = random_case(generator, 200, apart=True, flags=False)
    result = average_precision(detections, targets, 5)
    assert coco_metrics(detections, targets)["AP50"] == pytest.approx(result.mAP, abs=0.006)


def test_cocos_metrics(capfd):
    small, large = (0, 0, 20, 20), (100, 100, 300, 300)
    targets = [truth([small, large, (400, 0, 500, 100)], crowd=[False, False, True])]
    detections = [found([small, (100, 100, 300, 260), (410, 10, 420, 20)], [0.9, 0.8, 0.95])]  # IoU 1 and 0.8
    metrics = coco_metrics(detections, targets)
    assert capfd.readouterr().out == ""
    half = 51 / 101  # of the 101 recalls, those up to 0.5
    assert metrics["AP50"] == pytest.approx(1) and metrics["AP75"] == pytest.approx(1)
    assert metrics["AP"] == pytest.approx((7 + 3 * half) / 10)
    assert metrics["AP_small"] == pytest.approx(1) and metrics["AP_large"] == pytest.approx(0.7)
    assert math.isnan(metrics["AP_medium"])
    assert metrics["AR_100"] == pytest.approx((7 + 3 / 2) / 10)
    by_mask = [targets[0] | {"area": tensor([400.0, 2000.0, 10000.0])}]
    assert coco_metrics(detections, by_mask)["AP_medium"] == pytest.approx(0.7)
    difficult = [truth([small, large, (400, 0, 500, 100)], difficult=[False, False, True])]
    assert coco_metrics(detections, difficult) == pytest.approx(metrics, nan_ok=True)


def test_the_truth_of_a_data_set_scores_one():
    pytest.importorskip("torchvision")
    from ssd_ext.data import load_dataset

    data = load_dataset(SAMPLE, "test")
    targets = [data.target(index) for index in range(len(data))]
    detections = [t | {"scores": torch.ones(len(t["labels"]))} for t in targets]
    assert average_precision(detections, targets, 7).mAP == 1
    assert coco_metrics(detections, data)["AP"] == pytest.approx(1)
    data.category_ids = [10, 20, 30, 40, 50, 60]
    rows = coco_results(data, detections)
    assert len(rows) == 12
    assert rows[0] == {"image_id": 0, "category_id": 10, "bbox": [79, 111, 148, 193], "score": 1}


@pytest.mark.parametrize("classes", [3, 40])
def test_the_picture_of_the_curves(generator, tmp_path, classes):
    pytest.importorskip("matplotlib")
    result = average_precision(*random_case(generator, 20, classes + 1), classes + 1)
    plot_pr_curves(result, [f"class {index}" for index in range(classes)], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert min(image.size) > 500 and len(image.convert("RGB").getcolors(1 << 20)) > classes
    with pytest.raises(ValueError, match=f"classes must be {classes} names: got 1"):
        plot_pr_curves(result, ["class"], tmp_path / "curves.png")


def test_packages_that_are_not_there_are_named(monkeypatch, tmp_path):
    answers, targets = [found([A], [0.9])], [truth([A])]
    for package in ("pycocotools.coco", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'coco_metrics needs pycocotools: pip install "ssd_ext\[train\]"'):
        evaluation.coco_metrics(answers, targets)
    with pytest.raises(ImportError, match=r'plot_pr_curves needs matplotlib: pip install "ssd_ext\[train\]"'):
        plot_pr_curves(average_precision(answers, targets, 2), ["card"], tmp_path / "curves.png")
