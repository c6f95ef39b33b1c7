"""What a type checker tells users of the public functions. mypy reads this, nothing runs it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from typing_extensions import assert_type

from ssd_ext import GroundTruth, MultiBoxLoss, export, ops, priors, reference
from ssd_ext.data import load_dataset
from ssd_ext.evaluation import coco_metrics
from ssd_ext.inference import as_json, detect_all, filter_by_score
from ssd_ext.models import SSD, Backbone, create, ssd300_vgg16
from ssd_ext.training import Recipe, fit

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def ops_give_tensors(t: Tensor, gt: GroundTruth) -> None:
    assert_type(ops.encode(t, t), Tensor)
    assert_type(ops.decode(t, t), Tensor)
    assert_type(ops.box_iou(t, t), Tensor)
    assert_type(ops.detect(t, t, t, window=(0, 0, 1, 1)), Four)
    assert_type(ops.match(gt, t), Tensor)
    assert_type(ops.match([{"boxes": t, "labels": t}], t), Tensor)
    assert_type(ops.assign_targets(gt, t), Two)
    assert_type(ops.hard_negatives(t, t), Tensor)
    assert_type(ops.multibox_loss(t, t, t, t), Two)
    assert_type(ops.nms(t, t, 0.5), Tensor)
    assert_type(ops.batched_nms(t, t, t, 0.5), Tensor)
    assert_type(ops.nms_padded(t, t, 0.5), Two)
    assert_type(ops.batched_nms_padded(t, t, t, 0.5), Two)
    assert_type(ops.soft_nms(t, t), Two)
    assert_type(ops.soft_nms_padded(t, t), Three)
    assert_type(ops.unpad(t, t, t, t), list[dict[str, Tensor]])
    assert_type(reference.nms(t, t, 0.5), Tensor)
    assert_type(reference.assign_targets(gt, t), Two)
    assert_type(priors.SSD300_VOC.priors(), Tensor)


def a_ground_truth_stays_one(t: Tensor) -> None:
    gt = GroundTruth.from_lists([t], [t])
    assert_type(gt, GroundTruth)
    assert_type(gt.to("cuda", non_blocking=True), GroundTruth)
    assert_type(gt.normalized(t), GroundTruth)
    assert_type(gt.num_images, int)
    assert_type(GroundTruth.from_targets(gt.to_targets()), GroundTruth)


def modules_give_what_forward_gives(t: Tensor, gt: GroundTruth, model: SSD) -> None:
    assert_type(MultiBoxLoss(t)(t, t, gt), Two)
    assert_type(MultiBoxLoss()(t, t, [{"boxes": t, "labels": t}], t), Two)
    assert_type(model([t]), list[dict[str, Tensor]])
    assert_type(model([t], [{"boxes": t, "labels": t}]), dict[str, Tensor])
    assert_type(model(t, gt), dict[str, Tensor])
    assert_type(model.predict(t), Four)
    assert_type(model.postprocess(*model.heads(t), sizes=t), Four)
    assert_type(model.losses(t, t, gt), dict[str, Tensor])
    assert_type(export.program(model), ExportedProgram)
    assert_type(export.onnx_translations(), dict[Callable[..., Any], Callable[..., Any]])


class Own(Backbone):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


def a_detector_of_ones_own() -> None:
    assert_type(SSD(Own(), priors.SSD300_VOC, 21, neck=Own()), SSD)


def a_data_set_goes_through_training_and_evaluation() -> None:
    assert_type(create("ssd300_vgg16"), SSD)
    data = load_dataset("data")
    run = fit(ssd300_vgg16(), data, Recipe(), "out", val_set=data)
    found = detect_all(run.trained, data)
    assert_type(found, list[dict[str, Tensor]])
    assert_type(filter_by_score(found[0], 0.5), dict[str, Tensor])
    assert_type(as_json(found[0], data.classes), list[dict[str, Any]])
    assert_type(coco_metrics(found, data), dict[str, float])
    assert_type(coco_metrics(found, [data.target(0)]), dict[str, float])
