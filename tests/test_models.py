"""The models: as torchvision's with the same weights, any backbone and size, compiled, cast, on hostile input."""

import copy
import dataclasses
import pickle
from functools import partial

import pytest
import torch
from torch import nn

torchvision = pytest.importorskip("torchvision")

from model_cases import (  # noqa: E402
    NO_OBJECT,
    SIZES,
    SPEC,
    Pyramid,
    TwoLevels,
    assert_same_detections,
    photographs,
    pictures,
    small,
    small_with_neck,
    spread,
    targets,
)
from torchvision.models import detection  # noqa: E402
from torchvision.models.detection.transform import GeneralizedRCNNTransform  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from opinfo.spec import HALVES  # noqa: E402
from ssd_ext import GroundTruth, MultiBoxLoss, export, ops  # noqa: E402
from ssd_ext.inference import detect_images  # noqa: E402
from ssd_ext.models import MODELS, create, ssd300_vgg16, ssd512_vgg16, ssdlite320_mobilenet_v2  # noqa: E402
from ssd_ext.models.weights import _LAYOUTS  # noqa: E402
from ssd_ext.priors import SSD300_COCO  # noqa: E402


@pytest.fixture(scope="module")
def pair():
    """torchvision's ssd300_vgg16 with weights of its own, and ours with those."""
    torch.manual_seed(0)
    theirs = detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=5)
    ours = ssd300_vgg16(num_classes=5, weights=theirs.state_dict(), loss=MultiBoxLoss(force="last"))
    return ours, theirs


@torch.no_grad()
def test_detections_of_torchvision(pair):
    ours, theirs = (model.eval() for model in pair)
    assert not ours.antialias, "they are trained without"
    images = photographs("IMG_2614", "cam_image36") + pictures(SIZES[2:])
    assert_same_detections(ours(images), theirs(images))


def test_loss_and_gradient_of_torchvision(pair):
    losses, gradients, images = [], [], photographs("IMG_2614")
    layout = next(layout for layout in _LAYOUTS if layout.name == "torchvision detector")
    for model in pair:
        model.train().zero_grad()
        loss = model(images, targets([image.shape[1:] for image in images]))
        sum(loss.values()).backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    ours, theirs = losses
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=0)
    assert len(gradients[0]) == len(gradients[1])
    for name, expected in gradients[1].items():
        assert expected.norm() > 0, name
        assert (gradients[0][layout.rename(name)] - expected).norm() < 1e-4 * expected.norm(), name


@pytest.mark.parametrize("size", [(300, 300), (200, 340)])
def test_transform_of_torchvision(size):
    model = ssdlite320_mobilenet_v2(num_classes=2, image_size=size, antialias=False)
    # torchvision's fixed_size is (width, height)
    theirs = GeneralizedRCNNTransform(
        0, 0, model.mean.flatten().tolist(), model.std.flatten().tolist(), size_divisible=1, fixed_size=size[::-1]
    )
    assert torch.equal(model.transform(pictures()), theirs.eval()(pictures())[0].tensors)
    batch = torch.stack(pictures(((90, 80),) * 2))
    assert torch.equal(model.transform(batch), model.transform(list(batch)))


def test_images_to_detect_are_resized_as_those_to_train():
    model = ssdlite320_mobilenet_v2(num_classes=2, image_size=(60, 70))
    (image,) = pictures(((480, 640),))
    expected = (v2.functional.resize(image, (60, 70), antialias=True) - model.mean) / model.std
    torch.testing.assert_close(model.transform([image])[0], expected)


@pytest.mark.parametrize(
    ("name", "priors", "sizes"),
    [
        ("ssd300_vgg16", 8732, [38, 19, 10, 5, 3, 1]),
        ("ssd512_vgg16", 24564, [64, 32, 16, 8, 4, 2, 1]),
        ("ssdlite320_mobilenet_v2", 3234, [20, 10, 5, 3, 2, 1]),
    ],
)
@torch.no_grad()
def test_shapes(name, priors, sizes):
    model = create(name, num_classes=3).eval()
    assert model.prior_spec.feature_sizes == tuple((n, n) for n in sizes)
    deltas, logits = model.heads(torch.zeros(1, 3, *model.image_size))
    assert (deltas.shape, logits.shape) == ((1, priors, 4), (1, priors, 3))
    assert model.priors.shape == (priors, 4)
    assert set(MODELS) == {"ssd300_vgg16", "ssd512_vgg16", "ssdlite320_mobilenet_v2"}


def test_priors_of_torchvisions_ssdlite():
    anchors = detection.anchor_utils.DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
    model = ssdlite320_mobilenet_v2(num_classes=2)
    sizes = [list(size) for size in model.prior_spec.feature_sizes]
    torch.testing.assert_close(model.priors, anchors._grid_default_boxes(sizes, [320, 320]))


def test_a_neck_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"neck does not take the backbone's maps, \[8, 8, 8\], \[12, 4, 4\]: "):
        small(neck=Pyramid(channels=(8, 13)))


@pytest.mark.parametrize("make", [small, small_with_neck])
def test_heads_are_ordered_as_the_priors(make):
    """They look at the backbone's maps, or at the neck's."""
    model = make().eval()
    x = torch.rand(2, 3, 32, 32)
    maps = model.backbone(x) if model.neck is None else model.neck(model.backbone(x))
    assert [m.shape[1] for m in maps] == ([8, 12] if model.neck is None else [6, 6])
    deltas, logits = model.heads(x)
    row = 0
    for features, box, label, cell in zip(maps, model.box_heads, model.class_heads, SPEC.per_cell(), strict=True):
        boxes, labels = box(features), label(features)
        for y in range(features.shape[2]):
            for x_ in range(features.shape[3]):
                for a in range(cell):
                    torch.testing.assert_close(deltas[:, row], boxes[:, 4 * a : 4 * a + 4, y, x_])
                    torch.testing.assert_close(logits[:, row], labels[:, 4 * a : 4 * a + 4, y, x_])
                    row += 1
    assert row == len(model.priors)


def test_heads_copy_once():
    maps = [head(x) for head, x in zip(small().class_heads, TwoLevels()(torch.rand(2, 3, 32, 32)), strict=True)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


@torch.no_grad()
def test_detections_are_in_pixels_of_each_image():
    """A prediction of no offset is its prior, wherever the image's pixels put it."""
    model = small(score_threshold=0.5).eval()
    for head in (*model.box_heads, *model.class_heads):
        head.weight.zero_()
    model.class_heads[1].bias.view(-1, 4)[3, 2] = 20  # the fourth shape of each cell is of class 2
    images = pictures(((60, 90), (31, 32)))
    cx, cy, w, h = model.priors[8 * 8 * 4 :].view(-1, 6, 4)[:, 3].T
    expected = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1).clamp(0, 1)
    for image, found in zip(images, model(images), strict=True):
        height, width = image.shape[1:]
        assert len(found["boxes"]) and (found["labels"] == 2).all()
        distance = torch.cdist(found["boxes"], expected * torch.tensor([width, height, width, height]), p=torch.inf)
        assert distance.amin(1).max() < 1e-3
        assert (found["scores"] > 0.99).all()


@torch.no_grad()
def test_settings_are_those_of_detect():
    model = spread(small()).eval()
    model.score_threshold, model.iou_threshold, model.topk_per_class, model.max_detections = 0.3, 0.2, 7, 11
    settings = {"score_threshold": 0.3, "iou_threshold": 0.2, "topk_per_class": 7, "max_detections": 11}
    batch = torch.stack(pictures(((32, 32),) * 2))
    predictions = model.heads(model.transform(batch))
    expected = ops.detect(*predictions, model.priors, **settings, window=(0, 0, 1, 1))
    boxes, *rest = model.predict(batch)
    torch.testing.assert_close(boxes, expected[0] * 32)
    assert all(torch.equal(a, b) for a, b in zip(rest, expected[1:], strict=True))
    assert rest[-1].min() > 0


@torch.no_grad()
def test_a_batch_is_predicted_as_a_list():
    """In pixels of the images as given, of which a tensor has one size and a list any."""
    model = spread(small()).eval()
    alike, others = pictures(((60, 90),) * 2), pictures(((60, 90), (31, 32)), seed=1)
    for found, expected in zip(model.predict(torch.stack(alike)), model.predict(alike), strict=True):
        assert torch.equal(found, expected)
    right = model.predict(alike + others)[0][..., 2].amax(1)
    assert (right[:3] > 32).all() and 0 < right[3] <= 32


@pytest.mark.parametrize("name", ["small", "ssdlite320_mobilenet_v2"])
def test_not_square(name):
    size = (64, 160) if name == "small" else (160, 256)
    settings = {"num_classes": 4, "image_size": size}
    model = spread(small(**settings) if name == "small" else create(name, **settings))
    assert model.priors.shape[0] == sum(model.prior_spec.counts())
    sizes = ((50, 70), (80, 60))
    losses = model(pictures(sizes), targets(sizes, 4))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for image, found in zip(pictures(sizes), model.eval()(pictures(sizes)), strict=True):
        boxes = found["boxes"]
        assert len(boxes) and (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor(image.shape[:0:-1])).all()


def test_ssd300_and_512_of_other_sizes():
    model = ssd300_vgg16(2, image_size=(300, 500))
    assert model.prior_spec.feature_sizes[-1] == (1, 4)
    assert model.priors[0, :2].tolist() == pytest.approx([4 / 500, 4 / 300])  # cells of 8 pixels
    assert model.priors[-4 * 4 :: 4, 0].tolist() == [1 / 8, 3 / 8, 5 / 8, 7 / 8]  # four that share the image
    assert (model.priors[:, :2] <= 1).all(1).sum() == len(model.priors) - 6 * 16  # of 10 x 16 cells of 32 a row at 304
    again = create(**model.architecture)
    assert again.architecture == model.architecture
    assert torch.equal(again.priors, model.priors)
    square = create(**{**model.architecture, "image_size": (300, 300)})
    assert torch.equal(square.priors, SSD300_COCO.priors())
    strided = dataclasses.replace(SSD300_COCO, spread=(False,) * 6)
    with pytest.raises(ValueError, match=r"level 5 has 1x4 cells of steps\[5\]=300 .* outside of an image of 300x500"):
        ssd300_vgg16(2, image_size=(300, 500), prior_spec=strided)
    with pytest.raises(ValueError, match=r"image_size \(64, 300\) does not suit the backbone"):
        ssd300_vgg16(2, image_size=(64, 300))
    with pytest.raises(ValueError, match="prior_spec has 6 levels, but there are 7 maps"):
        ssd512_vgg16(2, prior_spec=ssd300_vgg16(2).prior_spec)


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_for_the_weights_only(dtype):
    model, half = small().eval(), small().eval().to(dtype)
    for name, buffer in model.named_buffers(recurse=False):
        assert torch.equal(getattr(half, name), buffer), name
    assert half.architecture == model.architecture
    deltas = torch.randn(2, len(model.priors), 4).to(dtype)
    logits = torch.randn(2, len(model.priors), 4).to(dtype)
    sizes = torch.tensor([[777, 1333], [60, 50]])
    found, expected = half.postprocess(deltas, logits, sizes), model.postprocess(deltas.float(), logits.float(), sizes)
    losses = half.losses(deltas, logits, targets(sizes.tolist(), 4), sizes)
    wanted = model.losses(deltas.float(), logits.float(), targets(sizes.tolist(), 4), sizes)
    for f, e in zip((*found, *losses.values()), (*expected, *wanted.values()), strict=True):
        assert f.dtype == e.dtype
        assert torch.equal(f, e)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda model: model.double().half()])
def test_float_buffers_survive_whatever_a_module_does(convert):
    model = copy.deepcopy(convert(small()))
    assert model.priors.dtype == model.mean.dtype == torch.float32
    assert torch.equal(model.priors, small().priors)
    model.load_state_dict(model.state_dict())
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.priors, model.priors)
    assert pickle.loads(pickle.dumps(model)).to("meta", torch.bfloat16).priors.dtype == torch.float32
    assert model.float().priors.dtype == torch.float32
    assert model.double().priors.dtype == torch.float64


@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_half_models_detect_in_images_of_any_size_and_dtype(dtype):
    model = ssdlite320_mobilenet_v2(5).eval().to(dtype)
    others = {name: buffer.dtype for name, buffer in model.backbone.named_buffers() if "running_mean" in name}
    assert set(others.values()) == {dtype}  # buffers of other modules are as these make them
    image = torch.rand(3, 777, 1333)
    for given in (image, image.to(dtype)):
        (found,) = model([given])
        boxes = found["boxes"]
        assert len(boxes)
        assert boxes.dtype == found["scores"].dtype == torch.float32
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([1333, 777] * 2)).all()
        assert (boxes.amax(0)[2:] == torch.tensor([1333.0, 777.0])).any()
        batch = given[None].expand(2, -1, -1, -1)
        deltas, logits = model.heads(model.transform(batch))
        assert deltas.dtype == logits.dtype == dtype
        wide = ops.detect(deltas.float(), logits.float(), model.priors, window=(0, 0, 1, 1))
        assert torch.equal(model.predict(batch)[0], wide[0] * torch.tensor([1333, 777] * 2))
    (again,) = detect_images(model, [(image * 255).byte()])
    assert again["boxes"].dtype == torch.float32
    assert model.transform([]).dtype == dtype
    assert model([]) == []


@pytest.mark.parametrize("empty", [[0], [0, 1]])
def test_images_without_objects(empty):
    model = small(seed=1)
    sizes = ((32, 32), (40, 50))
    objects = [NO_OBJECT if i in empty else target for i, target in enumerate(targets(sizes, 4))]
    losses = model(pictures(sizes), objects)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert (losses["classification"] > 0) == (len(empty) == 1)


@pytest.mark.parametrize(
    "sizes", [((32, 32),) * 3, ((40, 50),) * 3, ((32, 32), (40, 50), (90, 31))], ids=["model's", "equal", "different"]
)
def test_the_form_of_the_ground_truth_does_not_matter(sizes):
    """To the bit. Boxes are in pixels of their image; rows after the last image's belong to none."""
    model, images = small(), pictures(sizes)
    objects = targets(sizes, 4)
    objects[1] = NO_OBJECT
    ground_truth = GroundTruth.from_targets(objects)
    padded = ground_truth._replace(
        boxes=torch.cat([ground_truth.boxes, torch.tensor([[1.0, 2, 30, 31], [torch.nan] * 4])]),
        labels=torch.cat([ground_truth.labels, torch.tensor([3, 99])]),
    )
    expected = model(images, objects)
    extents = [torch.tensor([w, h, w, h]) for h, w in sizes]
    relative = [{**of, "boxes": of["boxes"] / extent} for of, extent in zip(objects, extents, strict=True)]
    losses = model.loss(*model.heads(model.transform(images)), relative, model.priors)
    assert tuple(expected.values()) == losses and min(losses) > 0
    wide = [{**of, "boxes": of["boxes"].double()} for of in objects]
    for form in (ground_truth, padded, wide):
        assert model(images, form) == expected
    if len(set(sizes)) == 1:
        batch = torch.stack(images)
        assert model(batch, padded) == model(batch, objects)


def test_a_loss_that_is_not_finite_is_seen():
    model = small()
    with torch.no_grad():
        model.backbone.first.weight[0, 0, 0, 0] = torch.nan
    losses = model(pictures(((32, 32),)), targets(((32, 32),), 4))
    assert not any(value.isfinite() for value in losses.values())


def test_losses_in_eval_mode():
    model = small().eval()
    assert model(pictures(), targets(num_classes=4)).keys() == {"bbox_regression", "classification"}


@torch.no_grad()
def test_no_images():
    assert small().eval()([]) == []


@pytest.mark.parametrize("name", ["small", "ssdlite320_mobilenet_v2"])
@torch.no_grad()
def test_channels_last(name):
    model = (small() if name == "small" else create(name, num_classes=3)).eval()
    x = torch.rand(1, 3, *model.image_size)
    expected = model.heads(x)
    found = model.to(memory_format=torch.channels_last).heads(x.to(memory_format=torch.channels_last))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["small", "ssdlite320_mobilenet_v2"])
def test_autocast(name):
    torch.manual_seed(0)
    model = small() if name == "small" else create(name, num_classes=4)
    sizes = ((32, 32), (40, 50))
    expected = model(pictures(sizes), targets(sizes, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.heads(model.transform(pictures(sizes)))[1].dtype == torch.bfloat16
        losses = model(pictures(sizes), targets(sizes, 4))
        found = model.eval()(pictures(sizes))
    sum(losses.values()).backward()
    for key, value in losses.items():
        torch.testing.assert_close(value, expected[key], rtol=0.05, atol=0.02)
    assert all(image["boxes"].dtype == torch.float32 for image in found)


@pytest.mark.parametrize("method", ["heads", "predict"])
@torch.no_grad()
def test_compile(method):
    model = spread(small()).eval()
    batch = torch.stack(pictures(((32, 32) if method == "heads" else (40, 50),) * 3))
    compiled = torch.compile(getattr(model, method), fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(batch), getattr(model, method)(batch), strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_export():
    model = spread(small()).eval()
    exported = export.program(model, (40, 50)).module()
    for length in (2, 3):
        batch = torch.stack(pictures(((40, 50),) * length))
        for found, expected in zip(exported(batch), model.predict(batch), strict=True):
            torch.testing.assert_close(found, expected)


def test_state_holds_no_constants():
    parts = {"backbone", "box_heads", "class_heads"}
    assert {name.split(".")[0] for name in small().state_dict()} == parts
    assert {name.split(".")[0] for name in small_with_neck().state_dict()} == parts | {"neck"}


IMAGE, TARGET = pictures(((32, 32),))[0], targets(((32, 32),), 4)[0]


@pytest.mark.parametrize(
    ("images", "objects", "message"),
    [
        ([IMAGE], None, "targets must be given in training mode"),
        ([IMAGE], [], "targets must be of the 1 images given, got those of 0"),
        ([(IMAGE * 255).byte()], [TARGET], r"images\[0\] must be RGB in 0..1 of floating point, got torch.uint8"),
        ([IMAGE, IMAGE[:1]], [TARGET] * 2, r"images\[1\] must be \[3, h, w\], got \[1, 32, 32\]"),
        (IMAGE, [TARGET] * 3, r"images must be \[B, 3, h, w\], got \[3, 32, 32\]"),
        ([IMAGE], [{**TARGET, "boxes": torch.zeros(2, 5)}], r"boxes of image 0 must be \[G, 4\], got \[2, 5\]"),
        (
            [IMAGE],
            [{**TARGET, "labels": torch.ones(1, dtype=torch.int64)}],
            r"labels of image 0 must be a tensor \[8\], as its boxes, got \[1\]",
        ),
        ([IMAGE], [{"boxes": TARGET["boxes"]}], r"targets\[0\] must be a dict with boxes and labels, got \['boxes'\]"),
        ([IMAGE], [TARGET["boxes"]], "ground truth must be a GroundTruth or a list of dicts .*, got a list of tensors"),
    ],
)
def test_wrong_input(images, objects, message):
    with pytest.raises(ValueError, match=message):
        small()(images, objects)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, "num_classes counts the background and must be 2 or more, got 1"),
        ({"image_size": (0, 32)}, r"image_size \(0, 32\) does not suit the backbone"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_predictions_of_another_size():
    model = small()
    predictions = model.heads(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"an image of 32x32 has 8x8x4 \(256\) \+ 4x4x6 \(96\) = 352"):
        model.postprocess(*predictions)
    with pytest.raises(ValueError, match="predictions for 1408 priors"):
        model.losses(*predictions, GroundTruth.from_targets([TARGET]))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"model must be one of ssd300_vgg16, .*, got 'yolo'"):
        create("yolo")


def test_without_torchvision(python):
    code = "import sys; sys.modules['torchvision'] = None; import ssd_ext; import ssd_ext.models"
    assert 'pip install "ssd_ext[train]"' in python("-c", code).stderr
    assert python("-c", code.removesuffix("; import ssd_ext.models")).returncode == 0


def test_a_detector_with_a_neck_or_head_is_one_of_ones_own():
    """Its name alone would build another detector."""
    for part in ({"neck": nn.Identity()}, {"head": partial(nn.Conv2d, kernel_size=1)}):
        assert ssdlite320_mobilenet_v2(2, image_size=(64, 64), **part).name is None
    assert ssdlite320_mobilenet_v2(2, image_size=(64, 64)).name == "ssdlite320_mobilenet_v2"


def test_losses_of_dicts(generator):
    model, images = small(), torch.rand(2, 3, 32, 32, generator=generator)
    objects = targets(((32, 32),) * 2, num_classes=4)
    heads = model.heads(model.transform(images))
    expected = model.losses(*heads, GroundTruth.from_targets(objects))
    assert model.losses(*heads, objects) == expected == model(images, objects)
    with pytest.raises(ValueError, match=r"extents must be \[1, 4\] or \[2, 4\], got \[3, 4\]"):
        model.losses(*heads, objects, torch.ones(3, 2))


def test_buffers_in_half_precision_follow_to_another_device():
    for module in (small(), MultiBoxLoss(torch.rand(3, 4))):
        assert {b.device.type for b in module.to("meta", torch.float16).buffers(recurse=False)} == {"meta"}
    model = small()
    model.to_empty(device="meta", recurse=False)
    assert model.priors.is_meta
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_integer_parameters_do_not_tell_the_dtype_of_images():
    model = small().eval()
    count = torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    model.backbone.register_parameter("count", count)
    assert model.transform(torch.rand(1, 3, 9, 9)).dtype == torch.float32
