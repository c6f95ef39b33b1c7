"""torchvision's detectors accelerated: as they were, but for the differences that the module lists."""

import copy
import functools
import io
import pickle
import random
from collections import OrderedDict

import pytest
import torch
from conftest import at_and_beside
from torch import nn
from torch.nn import functional as F

torchvision = pytest.importorskip("torchvision")

from model_cases import NO_OBJECT, assert_same_detections, photographs, pictures, targets  # noqa: E402
from torchvision.models import detection  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator  # noqa: E402
from torchvision.models.detection.ssd import SSD  # noqa: E402
from torchvision.ops import boxes as box_ops  # noqa: E402

from opinfo.spec import HALVES, convert  # noqa: E402
from ssd_ext import export, ops  # noqa: E402
from ssd_ext.integrations.torchvision import accelerate, restore  # noqa: E402

SIZES = ((90, 120), (128, 128), (150, 100))
CLASSES = 5


class Backbone(nn.Module):
    """Maps of 32 channels at strides 8 and 16."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 7, stride=8, padding=3)
        self.second = nn.Conv2d(32, 32, 3, stride=2, padding=1)

    def forward(self, x):
        first = F.relu(self.first(x))
        return OrderedDict(first=first, second=F.relu(self.second(first)))


def _ssd_arguments():
    generator = DefaultBoxGenerator([[2], [2, 3]])
    head = detection.ssd.SSDHead([32, 32], generator.num_anchors_per_location(), CLASSES)
    return {
        "backbone": Backbone(),
        "anchor_generator": generator,
        "size": (128, 112),
        "num_classes": CLASSES,
        "head": head,
    }


def ssd(*, coder=None, **settings):
    return with_coder(SSD(**_ssd_arguments(), **settings), coder)


def with_coder(model, weights):
    """Its constructor takes no weights."""
    if weights:
        model.box_coder = detection._utils.BoxCoder(weights)
    return model


class MySSD(SSD):
    """A user's class with nothing of what accelerate replaces."""

    def __init__(self):
        super().__init__(**_ssd_arguments())

    def forward(self, images, targets=None):
        return super().forward([image.clamp(0, 1) for image in images], targets)


class OwnPostprocessing(MySSD):
    def postprocess_detections(self, *arguments):
        return super().postprocess_detections(*arguments)[:1]


def retinanet(*, coder=None, **settings):
    generator = AnchorGenerator(((16, 24), (40, 60)), ((0.5, 1.0, 2.0),) * 2)
    model = detection.RetinaNet(Backbone(), CLASSES, 96, 160, anchor_generator=generator, **settings)
    with_coder(model.head.regression_head, coder)
    return with_coder(model, coder)


def fcos(**settings):
    generator = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    return detection.FCOS(Backbone(), CLASSES, 96, 160, anchor_generator=generator, **settings)


def _rcnn(kind, **settings):
    generator = AnchorGenerator(((16, 24), (40, 60)), ((0.5, 1.0, 2.0),) * 2)
    pool = torchvision.ops.MultiScaleRoIAlign(["first", "second"], 5, 2)
    mask = {"mask_roi_pool": pool} if kind is detection.MaskRCNN else {}
    return kind(
        Backbone(),
        CLASSES,
        96,
        160,
        rpn_anchor_generator=generator,
        box_roi_pool=pool,
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=64,
        **mask,
        **settings,
    )


def faster_rcnn(**settings):
    return _rcnn(detection.FasterRCNN, **settings)


def mask_rcnn(**settings):
    return _rcnn(detection.MaskRCNN, **settings)


BUILDERS = [ssd, retinanet, fcos, faster_rcnn]
EXACT = [fcos, faster_rcnn, mask_rcnn]  # what is replaced there rounds as torchvision does


def drawn(build, seed):
    """Settings away from those that both detectors and ops have by default; none for seed None."""
    if seed is None:
        return {}
    g = random.Random(seed)
    x, width = g.uniform(3, 12), g.uniform(2, 8)
    coder, low = (x, x, width, width), g.uniform(0.1, 0.3)
    found = {"score_thresh": g.uniform(0.06, 0.15), "nms_thresh": g.uniform(0.2, 0.7), "detections_per_img": 70 + seed}
    if build is ssd:
        rest = {"iou_thresh": g.uniform(0.4, 0.6), "positive_fraction": g.choice([0.5, 0.2]), "coder": coder}
        return {**found, **rest, "topk_candidates": 30 + seed}
    if build is retinanet:
        rest = {"fg_iou_thresh": low + 0.2, "bg_iou_thresh": low, "coder": coder}
        return {**found, **rest, "topk_candidates": 90 + seed}
    if build is fcos:
        return {**found, "topk_candidates": 90 + seed}
    part = {"fg_iou_thresh": low + 0.2, "bg_iou_thresh": low}
    return {
        "bbox_reg_weights": coder,
        **{f"rpn_{name}": value for name, value in part.items()},
        **{f"box_{name}": value for name, value in {**part, **found}.items()},
        "rpn_nms_thresh": g.uniform(0.4, 0.8),
        "rpn_score_thresh": g.uniform(0.1, 0.3),
        "rpn_pre_nms_top_n_test": 300 + seed,
        "rpn_post_nms_top_n_test": 200 + seed,
    }


def lively(model, seed=0):
    """Weights by which many boxes of all classes have scores of all sizes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cls_" in name or "classification_head.module_list" in name:
                fan_in = parameter[0].numel()
                deviation = 1.0 if parameter.dim() == 1 else 4 / fan_in**0.5
                parameter.copy_(torch.randn(parameter.shape, generator=g) * deviation)
            elif "head" in name and parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * (2 / parameter[0].numel()) ** 0.5)
    return model


def pair(build, **settings):
    """A detector and its accelerated copy."""
    torch.manual_seed(0)
    model = lively(build(**settings))
    return accelerate(copy.deepcopy(model)), model


@functools.cache
def images():
    return [*pictures(SIZES), *(F.interpolate(image[None], (120, 160))[0] for image in photographs("IMG_2614"))]


def objects(empty=()):
    """Ground truth of ``images()``, of whom those in ``empty`` have none."""
    made = targets([image.shape[1:] for image in images()], CLASSES)
    for target, image in zip(made, images(), strict=True):
        target["masks"] = torch.ones(len(target["labels"]), *image.shape[1:], dtype=torch.uint8)
    nothing = {**NO_OBJECT, "masks": torch.empty(0, 8, 8, dtype=torch.uint8)}
    return [nothing if i in empty else target for i, target in enumerate(made)]


def step(model, objects, dtype=torch.float32):
    """Losses and gradients; the same samples are drawn each time."""
    torch.manual_seed(1)
    model.train().zero_grad()
    objects = [{**target, "boxes": target["boxes"].to(dtype)} for target in objects]
    losses = model([image.to(dtype) for image in images()[: len(objects)]], objects)
    sum(losses.values()).backward()
    return losses, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@torch.no_grad()
def detect(model, batch=None):
    return model.eval()(images()[:batch])


def assert_equal(found, expected):
    """To the bit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_gradients(found, expected, tolerance=1e-4):
    """To that part of each; before a batch normalisation a bias has rounding errors for a gradient."""
    largest = max(gradient.norm() for gradient in expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * (b.norm() + 0.01 * largest)


@pytest.fixture
def exact_nms(monkeypatch):
    """torchvision's NMS class by class for few boxes too, so that none are shifted, and ties in order."""

    def batched_nms(boxes, scores, idxs, iou_threshold):
        keep = box_ops._batched_nms_vanilla(boxes, scores, idxs, iou_threshold).sort()[0]
        return keep[scores[keep].sort(stable=True, descending=True)[1]]

    monkeypatch.setattr(box_ops, "batched_nms", batched_nms)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("build", BUILDERS)
def test_detections(build, seed):
    ours, theirs = pair(build, **drawn(build, seed))
    found, expected = detect(ours), detect(theirs)
    assert_same_detections(found, expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours) == list(theirs)
        assert {key: t.dtype for key, t in ours.items()} == {key: t.dtype for key, t in theirs.items()}


@pytest.mark.parametrize("build", EXACT)
def test_detections_to_the_bit(build, exact_nms):
    ours, theirs = pair(build)
    assert_equal(detect(ours), detect(theirs))


@pytest.mark.parametrize(("empty", "seed"), [((), None), ((), 0), ((0, 2), 1), ((0, 1, 2, 3), None)])
@pytest.mark.parametrize("build", [*BUILDERS, mask_rcnn])
def test_losses_and_gradients(build, empty, seed, exact_nms):
    models = pair(build, **drawn(build, seed))
    (ours, gradients), (theirs, expected) = (step(model, objects(empty)) for model in models)
    assert list(ours) == list(theirs)
    assert len(gradients) == len(expected) > 0
    if build is not ssd:
        assert_equal(ours, theirs)
        return assert_equal(gradients, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("build", BUILDERS)
def test_nothing_of_torchvision_runs_in_place_of_the_ops(build, monkeypatch):
    def fail(*arguments, **keywords):
        raise AssertionError("torchvision's own")

    ours, theirs = pair(build)
    monkeypatch.setattr(box_ops, "batched_nms", fail)
    detect(ours)
    with pytest.raises(AssertionError, match="torchvision's own"):
        detect(theirs)
    if build in (retinanet, faster_rcnn):
        monkeypatch.setattr(box_ops, "box_iou", fail)
        step(ours, objects())
    if build is ssd:
        monkeypatch.setattr(F, "cross_entropy", fail)
        step(ours, objects())
    if build is not fcos:
        with pytest.raises(AssertionError, match="torchvision's own"):
            step(theirs, objects())


NOT_FOR_OPS = [
    (build, setting)
    for build in BUILDERS
    for setting in (
        {"score_thresh": -1.0},
        {"nms_thresh": 1.5},
        {"nms_thresh": -0.5},
        {"detections_per_img": 0},
        {"topk_candidates": 0},
    )
    if build is not faster_rcnn or "topk_candidates" not in setting
]


def with_settings(model, settings):
    """RetinaNet's, SSD's and FCOS's lie on the model, those of a FasterRCNN on its heads."""
    holder = model.roi_heads if hasattr(model, "roi_heads") else model
    for name, value in settings.items():
        assert hasattr(holder, name)
        setattr(holder, name, value)
    return model


@pytest.mark.parametrize("nms_thresh", [0.2, 1.0])
@pytest.mark.parametrize("build", BUILDERS)
def test_settings_may_be_changed_later(build, nms_thresh, exact_nms):
    settings = {"score_thresh": 0.3, "nms_thresh": nms_thresh, "detections_per_img": 40}
    if build is not faster_rcnn:
        settings["topk_candidates"] = 30
    ours, theirs = (with_settings(model, settings) for model in pair(build))
    if build is faster_rcnn:
        for model in (ours, theirs):
            model.rpn.nms_thresh, model.rpn.score_thresh = 0.4, 0.3
            model.rpn._pre_nms_top_n["testing"], model.rpn._post_nms_top_n["testing"] = 300, 150
    before = detect(theirs)
    assert_same_detections(detect(ours), before)
    assert all(image["scores"].min() > 0.3 and len(image["scores"]) <= 40 for image in before)


@pytest.mark.parametrize(("build", "settings"), NOT_FOR_OPS)
def test_settings_that_the_ops_do_not_take(build, settings, exact_nms):
    ours, theirs = (with_settings(model, settings) for model in pair(build))
    assert_equal(detect(ours), detect(theirs))


def test_parts_that_the_ops_do_not_take(exact_nms):
    for build in BUILDERS:
        ours, theirs = pair(build)
        for model in (ours, theirs):
            if build is faster_rcnn:
                model.rpn.nms_thresh = 1.5
                model.rpn.box_similarity = torchvision.ops.generalized_box_iou
            elif build is not fcos:
                model.box_coder = detection._utils.BoxCoder((10.0, 9.0, 5.0, 5.0))
        assert_equal(detect(ours), detect(theirs))
        assert_equal(step(ours, objects()), step(theirs, objects()))


def test_anchors_that_differ_between_images(exact_nms):
    class Shifted(AnchorGenerator):
        def forward(self, *arguments):
            return [anchors + i for i, anchors in enumerate(super().forward(*arguments))]

    ours, theirs = pair(retinanet)
    for model in (ours, theirs):
        model.anchor_generator.__class__ = Shifted
    assert_equal(detect(ours), detect(theirs))
    assert_equal(step(ours, objects()), step(theirs, objects()))


def test_a_ratio_that_is_not_whole():
    ours, theirs = pair(ssd, positive_fraction=0.3)
    assert_equal(step(ours, objects()), step(theirs, objects()))


@pytest.mark.parametrize("seed", range(5))
def test_matching_of_low_quality_keeps_ties(seed):
    """Many anchors of one best IoU, and an object that meets none, which torchvision gives to all of them."""
    g = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 12, (2, 300, 2), generator=g).float()
    anchors = list(torch.cat([corners, corners + torch.randint(1, 6, (2, 300, 2), generator=g)], 2))
    far = torch.tensor([[900.0, 900, 910, 910]])
    objects = [{"boxes": anchors[0][:9] + 0.5}, {"boxes": torch.cat([anchors[1][:4] + 1, far][: 1 + seed % 2])}]
    ours, theirs = (model.rpn.assign_targets_to_anchors(anchors, objects) for model in pair(faster_rcnn))
    assert_equal(ours, theirs)
    assert {float(label) for label in torch.cat(theirs[0]).unique()} == {-1.0, 0.0, 1.0}


def test_candidates_of_a_level_do_not_suppress_each_other():
    """All in one place, and a threshold of NMS that no IoU is above."""
    outputs = {"cls_logits": [torch.linspace(-1, 1, 24).view(1, 12, 2)], "bbox_regression": [torch.zeros(1, 12, 4)]}
    anchors = [[torch.tensor([[8.0, 8, 40, 40]]).repeat(12, 1)]]
    ours, theirs = (
        model.postprocess_detections(outputs, anchors, [(50, 30)]) for model in pair(retinanet, nms_thresh=1.0)
    )
    torch.testing.assert_close(ours, theirs)
    assert len(theirs[0]["scores"]) == 24


def test_proposals_are_filtered_as_by_torchvision(exact_nms):
    g = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 300, 2, generator=g) * 120 - 10
    proposals = torch.cat([corners, corners + torch.rand(2, 300, 2, generator=g) * 30], 2)
    objectness = torch.randn(600, 1, generator=g)
    found = []
    for model in pair(faster_rcnn):
        model.rpn.eval().score_thresh, model.rpn.min_size = 0.4, 5
        found.append(model.rpn.filter_proposals(proposals, objectness, [(90, 100), (100, 80)], [200, 100]))
    assert_equal(*found)
    boxes, scores = map(torch.cat, found[0])
    assert 20 < len(scores) < 300
    assert scores.min() >= 0.4
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 5


def test_proposals_are_matched_as_by_torchvision():
    g = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 200, 2, generator=g) * 50
    proposals = list(torch.cat([corners, corners + torch.rand(3, 200, 2, generator=g) * 30 + 2], 2))
    boxes = [proposals[0][:6] + 1, proposals[1][:0], proposals[2][:1] + 2]
    labels = [torch.tensor([3, 1, 2, 4, 1, 2]), torch.empty(0, dtype=torch.int64), torch.tensor([4])]
    found = []
    for model in pair(faster_rcnn):
        model.roi_heads.proposal_matcher = detection._utils.Matcher(0.5, 0.2)
        found.append(model.roi_heads.assign_targets_to_proposals(proposals, boxes, labels))
    assert_equal(*found)
    assert set(torch.cat(found[0][1]).tolist()) == {-1, 0, 1, 2, 3, 4}


@pytest.mark.parametrize("build", [ssd, retinanet, faster_rcnn])
def test_a_nan_in_the_ground_truth_reaches_the_loss(build):
    broken = objects()
    broken[1]["boxes"][2, 1] = torch.nan
    (ours, _), (theirs, _) = (step(model, broken) for model in pair(build))
    assert any(value.isnan() for value in theirs.values())
    assert {name: bool(value.isnan()) for name, value in ours.items()} == {
        name: bool(value.isnan()) for name, value in theirs.items()
    }


def test_positives_are_not_counted_twice():
    """All four anchors match: torchvision finds no negative and mines the positives."""
    ours, theirs = pair(ssd)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, CLASSES, generator=g)
    boxes = torch.rand(4, 4, generator=g) + torch.tensor([0.0, 0, 2, 2])
    arguments = (
        [{"boxes": boxes, "labels": torch.tensor([1, 2, 3, 4])}],
        {"bbox_regression": torch.zeros(1, 4, 4), "cls_logits": logits},
        [boxes],
        [torch.arange(4)],
    )
    once = F.cross_entropy(logits[0], torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(ours.compute_loss(*arguments)["classification"], once)
    torch.testing.assert_close(theirs.compute_loss(*arguments)["classification"], 2 * once)


def test_an_object_of_label_0_is_none():
    ours, theirs = pair(ssd)
    outputs = {"bbox_regression": torch.ones(1, 9, 4), "cls_logits": torch.zeros(1, 9, CLASSES)}
    boxes = torch.tensor([[0.0, 0, 2, 2]]).repeat(9, 1)
    arguments = [{"boxes": boxes, "labels": torch.zeros(9, dtype=torch.int64)}], outputs, [boxes], [torch.arange(9)]
    assert ours.compute_loss(*arguments) == {"bbox_regression": 0, "classification": 0}
    assert theirs.compute_loss(*arguments)["bbox_regression"] > 0


def test_an_object_that_meets_no_anchor_is_trained_as_by_torchvision():
    """It gets the anchor of its highest IoU, 0."""
    made = objects()
    made[0] = {**made[0], "boxes": made[0]["boxes"] * 0 + torch.tensor([900.0, 900, 910, 910])}
    (ours, gradients), (theirs, expected) = (step(model, made) for model in pair(ssd))
    assert theirs["bbox_regression"] > 1  # its target is far
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients, expected)


def test_an_iou_of_exactly_the_threshold():
    """6 / 10, which float32 rounds up."""
    ours, theirs = pair(fcos)
    anchors = [[torch.tensor([[0.0, 0, 8, 8]] * 2)]]
    heads = {
        "bbox_regression": [torch.tensor([[[0.5, 0.5, 0.75, 0.75], [0.5, 0.5, 0.75, 0.25]]])],
        "cls_logits": [torch.tensor([[[3.0] + [-9.0] * (CLASSES - 1), [2.0] + [-9.0] * (CLASSES - 1)]])],
        "bbox_ctrness": [torch.full((1, 2, 1), 9.0)],
    }
    found, expected = (model.postprocess_detections(heads, anchors, [(20, 20)])[0] for model in (ours, theirs))
    assert ours.nms_thresh == 0.6
    assert ops.box_iou(found["boxes"], found["boxes"])[0, 1] == torch.tensor(0.6)
    assert (len(found["boxes"]), len(expected["boxes"])) == (2, 1)


def test_a_negative_label_is_refused_as_by_torchvision():
    made = objects()
    made[1]["labels"][0] = -1
    for model in pair(ssd):
        with pytest.raises(IndexError, match="Target -1 is out of bounds"):
            step(model, made)


@pytest.mark.parametrize("build", [ssd, pytest.param(faster_rcnn, marks=pytest.mark.slow)])
def test_compiled(build):
    torch.compiler.reset()
    ours, _ = pair(build)
    expected = detect(ours, 2)
    assert_same_detections(detect(torch.compile(ours, backend="aot_eager"), 2), expected)


@pytest.mark.slow
@pytest.mark.parametrize("build", [ssd, faster_rcnn])
@torch.no_grad()
def test_exported_to_onnx(build, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, _ = pair(build)
    batch = images()[-1:]
    table = export.onnx_translations()
    torch.onnx.export(ours.eval(), (batch,), dynamo=True, custom_translation_table=table).save(tmp_path / "x.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: batch[0].numpy()})
    expected = ours(batch)
    found = [dict(zip(expected[0], map(torch.from_numpy, found), strict=True))]
    assert_same_detections(found, expected)


@pytest.mark.parametrize("build", BUILDERS)
def test_autocast(build):
    (ours, gradients), (theirs, _) = (_autocast_step(model) for model in pair(build))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients)


def _autocast_step(model):
    with torch.autocast("cpu", torch.bfloat16):
        return step(model, objects())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("build", [ssd, retinanet])
def test_anchors_are_not_rounded_to_half(build, dtype):
    model = accelerate(build()).eval()
    g = torch.Generator().manual_seed(0)
    corners = torch.tensor([[1289.3, 701.3, 1333.0, 777.0], [1001.0, 3.0, 1017.7, 21.3], [0.3, 0.3, 40.7, 60.1]])
    deltas, logits = torch.randn(1, 3, 4, generator=g).to(dtype), torch.randn(1, 3, 3, generator=g).to(dtype) + 4
    outputs = {"bbox_regression": deltas, "cls_logits": logits}
    anchors = [corners]
    if build is retinanet:
        outputs, anchors = {name: [head] for name, head in outputs.items()}, [[corners]]
    found, expected = (
        model.postprocess_detections(convert(outputs, to), anchors, [(777, 1333)])[0] for to in (dtype, torch.float32)
    )
    assert len(found["boxes"])
    assert (found["boxes"] <= torch.tensor([1333.0, 777.0] * 2)).all()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("build", [ssd, retinanet])
def test_detections_beside_anchors_in_half_are_float32(build, dtype):
    model, g = accelerate(build()).eval(), torch.Generator().manual_seed(0)
    corners = [[1289.3, 701.3, 1333.0, 777.0], [1001.0, 3.0, 1017.7, 21.3], [0.3, 0.3, 40.7, 60.1]]
    anchors = torch.tensor(corners).to(dtype)
    outputs = {
        "bbox_regression": torch.randn(1, 3, 4, generator=g).to(dtype),
        "cls_logits": torch.randn(1, 3, 3, generator=g).to(dtype) + 4,
    }
    both = []
    for to in (dtype, torch.float32):
        heads, of_image = convert(outputs, to), [anchors.to(to)]
        if build is retinanet:
            heads, of_image = {name: [head] for name, head in heads.items()}, [of_image]
        both.append(model.postprocess_detections(heads, of_image, [(777, 1333)])[0])
    assert len(both[0]["boxes"])
    assert_equal(*both)


@pytest.mark.parametrize("build", BUILDERS)
def test_double_precision(build, exact_nms):
    models = [model.double() for model in pair(build, **drawn(build, 2))]
    found, expected = (model.eval()([image.double() for image in images()]) for model in models)
    assert_same_detections(found, expected, share=1)
    assert found[0]["boxes"].dtype == torch.float64
    (ours, gradients), (theirs, expected) = (step(model, objects(), torch.float64) for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert_same_gradients(gradients, expected, 1e-11)


def test_matching_in_double_precision_decides_to_the_bit():
    """With thresholds at an IoU, and next below and above."""
    g = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 40, 2, generator=g, dtype=torch.float64) * 50
    proposals = list(torch.cat([corners, corners + torch.rand(2, 40, 2, generator=g) * 30 + 2], 2))
    boxes, labels = [image[:3] + 1 for image in proposals], [torch.tensor([3, 1, 2])] * 2
    ious = box_ops.box_iou(boxes[0], proposals[0]).max(0).values
    models = pair(faster_rcnn)
    for threshold in at_and_beside(ious[(ious > 0.1) & (ious < 1)][:5]):
        found = []
        for model in models:
            model.roi_heads.proposal_matcher = detection._utils.Matcher(threshold, threshold)
            found.append(model.roi_heads.assign_targets_to_proposals(proposals, boxes, labels))
        assert_equal(*found)


@pytest.mark.parametrize("build", [ssd, retinanet])
def test_detections_have_no_gradient(build):
    ours, theirs = pair(build)
    with pytest.raises(RuntimeError, match=r"detect is not differentiable: .* again after restore\(\)"):
        ours.eval()(images())[0]["scores"].sum().backward()
    for model in (restore(ours), theirs.eval()):
        model.zero_grad()
        model(images())[0]["scores"].sum().backward()
    assert_same_gradients(*([p.grad for p in model.parameters() if p.grad is not None] for model in (ours, theirs)))


@pytest.mark.parametrize("build", [*BUILDERS, MySSD])
def test_restore(build):
    _, model = pair(build)
    kinds = [type(module) for module in model.modules()]
    text, keys, before = repr(model), list(model.state_dict()), (detect(model), step(model, objects()))
    model.eval()
    assert accelerate(model) is model
    assert accelerate(model) is model
    assert (repr(model), list(model.state_dict()), model.training) == (text, keys, False)
    assert [type(module) for module in model.modules()] != kinds
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    assert restore(restore(model)) is model
    assert [type(module) for module in model.modules()] == kinds
    assert_equal((detect(model), step(model, objects())), before)


@pytest.mark.parametrize("build", [*BUILDERS, MySSD])
def test_copies(build):
    model, original = pair(build)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    copies.append(accelerate(build()))
    copies[-1].load_state_dict(original.state_dict())
    for each in copies:
        assert [type(module) for module in each.modules()] == [type(module) for module in model.modules()]
        assert_equal(detect(each), detect(model))
        assert [type(module) for module in restore(each).modules()] == [type(module) for module in original.modules()]


def test_a_class_derived_after_accelerate_is_left_alone():
    model = accelerate(ssd())
    made = type(model)

    class Sharded(made):
        """As FSDP does."""

    model.__class__ = Sharded
    assert type(copy.deepcopy(model)) is Sharded
    with pytest.raises(TypeError, match="the class of this Sharded was replaced after accelerate"):
        restore(model)
    assert type(model) is Sharded
    model.__class__ = made
    assert type(restore(model)) is SSD


def test_other_models_stay_as_they_are():
    ours, theirs = pair(ssd)
    assert type(theirs) is SSD
    assert type(ours) is not SSD
    for kind in (SSD, detection.RetinaNet, detection.FCOS, detection.rpn.RegionProposalNetwork):
        assert not any(method.__module__.startswith("ssd_ext") for method in vars(kind).values() if callable(method))


def test_a_class_derived_from_torchvisions():
    ours, theirs = pair(MySSD)
    assert isinstance(ours, MySSD)
    assert_same_detections(detect(ours), detect(theirs))


def _own_method():
    model = ssd()
    model.compute_loss = lambda *arguments: {}
    return model


def _own_rpn(method):
    class OwnRPN(detection.rpn.RegionProposalNetwork):
        pass

    setattr(OwnRPN, method, lambda *arguments: None)
    model = faster_rcnn()
    model.rpn.__class__ = OwnRPN
    return model


def _other_heads():
    model = faster_rcnn()
    model.roi_heads = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(1, 1), "SSD, RetinaNet, FCOS or FasterRCNN of torchvision .*, got Linear"),
        (lambda: nn.DataParallel(ssd()), "of a wrapped or compiled model the inner one.*, got DataParallel"),
        (OwnPostprocessing, "this OwnPostprocessing has a postprocess_detections of its own"),
        (_own_method, "this SSD has a compute_loss of its own"),
        (lambda: _own_rpn("filter_proposals"), "this OwnRPN has a filter_proposals of its own"),
        (_other_heads, "model.roi_heads must be a RoIHeads, got Identity"),
    ],
)
def test_refused(build, message):
    model = build()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=message):
        accelerate(model)
    assert [type(module) for module in model.modules()] == kinds


def test_a_derived_rpn_is_taken():
    model = accelerate(_own_rpn("something_else"))
    assert type(model.rpn).__bases__[-1].__name__ == "OwnRPN"


BIG = [
    detection.ssd300_vgg16,
    detection.ssdlite320_mobilenet_v3_large,
    detection.retinanet_resnet50_fpn,
    detection.retinanet_resnet50_fpn_v2,
    detection.fcos_resnet50_fpn,
    detection.fasterrcnn_resnet50_fpn,
    detection.fasterrcnn_resnet50_fpn_v2,
    detection.fasterrcnn_mobilenet_v3_large_320_fpn,
]


def _noise(outputs, scale=2.0):
    """As many numbers that stand in for a trained network's, through which gradients pass."""
    if isinstance(outputs, dict):
        return {name: _noise(t, 2.0 if name == "cls_logits" else 0.5) for name, t in outputs.items()}
    if isinstance(outputs, tuple):
        return _noise(outputs[0]), _noise(outputs[1], 0.5)
    if isinstance(outputs, list):
        return [_noise(t, scale) for t in outputs]
    made = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(outputs.numel())) * scale
    return outputs - outputs.detach() + (made if scale == 2 else made.abs())  # FCOS expects distances


@pytest.mark.slow
@pytest.mark.parametrize("build", BIG)
def test_torchvisions_builders(build, exact_nms):
    size = {} if "ssd" in build.__name__ else {"min_size": 160, "max_size": 240}
    if "rcnn" in build.__name__:
        size |= {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50, "box_batch_size_per_image": 32}
    torch.manual_seed(0)
    theirs = build(weights=None, weights_backbone=None, num_classes=CLASSES, **size)
    heads = [theirs.head] if hasattr(theirs, "head") else [theirs.rpn.head, theirs.roi_heads.box_predictor]
    for head in heads:
        head.register_forward_hook(lambda module, inputs, outputs: _noise(outputs))
    ours = accelerate(copy.deepcopy(theirs))
    assert_same_detections(detect(ours, 2), detect(theirs, 2))
    (ours, gradients), (theirs, expected) = (step(model, objects((1,))[:2]) for model in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients, expected)


def test_without_torchvision(python):
    code = "import sys; sys.modules['torchvision'] = None; import ssd_ext.integrations.torchvision"
    assert 'pip install "ssd_ext[train]"' in python("-c", code).stderr
