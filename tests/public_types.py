"""What a type checker tells users of the public functions. mypy reads this, nothing runs it."""

from torch import Tensor
from torch.export import ExportedProgram
from typing_extensions import assert_type

from ssd_ext import MultiBoxLoss, export, ops, priors, reference, release_memory, unpad
from ssd_ext.data import load_dataset
from ssd_ext.evaluation import coco_metrics
from ssd_ext.inference import detections
from ssd_ext.models import SSD, create, ssd300_vgg16
from ssd_ext.training import Recipe, fit

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def ops_give_tensors(t: Tensor) -> None:
    assert_type(ops.encode(t, t), Tensor)
    assert_type(ops.decode(t, t), Tensor)
    assert_type(ops.box_iou(t, t), Tensor)
    assert_type(ops.detect(t, t, t, window=(0, 0, 1, 1)), Four)
    assert_type(ops.match([t], t), Tensor)
    assert_type(ops.assign_targets((t, t), t, t), Two)
    assert_type(ops.hard_negatives(t, t), Tensor)
    assert_type(ops.multibox_loss(t, t, t, t), Two)
    assert_type(ops.nms(t, t, 0.5), Tensor)
    assert_type(ops.batched_nms(t, t, t, 0.5), Tensor)
    assert_type(ops.nms_padded(t, t, 0.5), Two)
    assert_type(ops.soft_nms(t, t), Two)
    assert_type(ops.soft_nms_padded(t, t), Three)
    assert_type(unpad(t, t, t, t), list[dict[str, Tensor]])
    assert_type(reference.nms(t, t, 0.5), Tensor)
    assert_type(priors.SSD300_VOC.boxes(), Tensor)
    assert_type(release_memory(), int)


def modules_give_what_forward_gives(t: Tensor, model: SSD) -> None:
    assert_type(MultiBoxLoss(t)(t, t, [t], [t]), Two)
    assert_type(model([t]), list[dict[str, Tensor]])
    assert_type(model([t], [{"boxes": t, "labels": t}]), dict[str, Tensor])
    assert_type(export.EndToEnd(model)(t), Four)
    assert_type(export.program(model), ExportedProgram)


def a_data_set_goes_through_training_and_evaluation() -> None:
    assert_type(create("ssd300_vgg16"), SSD)
    data = load_dataset("data")
    run = fit(ssd300_vgg16(), data, Recipe(), "out", val_set=data)
    found = detections(run.trained, data)
    assert_type(found, list[dict[str, Tensor]])
    assert_type(coco_metrics(found, data), dict[str, float])
    assert_type(coco_metrics(found, [data.target(0)]), dict[str, float])
