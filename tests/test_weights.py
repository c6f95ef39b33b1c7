"""Weights of other projects: names, shapes, input conventions, and files that are none."""

import sys
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

torchvision = pytest.importorskip("torchvision")

from model_cases import small, small_with_neck  # noqa: E402
from torchvision.models import mobilenet_v2  # noqa: E402

from ssd_ext import checkpoint  # noqa: E402
from ssd_ext.models import SSD, load_weights, ssd300_vgg16, ssdlite320_mobilenet_v2  # noqa: E402
from ssd_ext.models.vgg import STAGES, VGG16  # noqa: E402
from ssd_ext.models.weights import CONVENTIONS  # noqa: E402
from ssd_ext.priors import SSD300_COCO, SSD300_VOC_RELEASED  # noqa: E402

# The first filter of the original VGG16 at its corner, in the order blue, green, red, and its first biases.
ORIGINAL_CORNER, ORIGINAL_BIAS = (0.4294, 0.5503, 0.48), (0.7344, 0.0934, 0.0677, 0.8862)


@pytest.fixture(scope="module")
def ssd300():
    return ssd300_vgg16(num_classes=3)


def vgg16_features(seed=0):
    """The convolutions of a VGG16 under torchvision's names, small enough not to overflow."""
    g, state, index, channels = torch.Generator().manual_seed(seed), {}, 0, 3
    for stage in STAGES:
        for width in stage:
            state[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3, generator=g) * 0.02
            state[f"features.{index}.bias"] = torch.randn(width, generator=g)
            index, channels = index + 2, width
        index += 1
    return state


def amdegroot(num_classes=21, seed=0):
    """A state dict as ``ssd.pytorch`` writes it."""
    g = torch.Generator().manual_seed(seed)
    shapes = {f"vgg.{key.removeprefix('features.')}": t.shape for key, t in vgg16_features().items()}
    widths = (1024, 256, 512, 128, 256, 128, 256, 128, 256)
    extras = [(out, channels, 3 if i % 2 else 1) for i, (channels, out) in enumerate(pairwise(widths))]
    convolutions = {"vgg.31": (1024, 512, 3), "vgg.33": (1024, 1024, 1)}
    convolutions |= {f"extras.{i}": shape for i, shape in enumerate(extras)}
    for i, (channels, cell) in enumerate(zip((512, 1024, 512, 256, 256, 256), (4, 6, 6, 6, 4, 4), strict=True)):
        convolutions[f"loc.{i}"] = (4 * cell, channels, 3)
        convolutions[f"conf.{i}"] = (num_classes * cell, channels, 3)
    for name, (out, channels, kernel) in convolutions.items():
        shapes |= {f"{name}.weight": (out, channels, kernel, kernel), f"{name}.bias": (out,)}
    fan_in = {name: max(1, torch.Size(shape[1:]).numel()) for name, shape in shapes.items()}
    state = {name: torch.randn(shape, generator=g) * (2 / fan_in[name]) ** 0.5 for name, shape in shapes.items()}
    return state | {"L2Norm.weight": torch.rand(512, generator=g) * 20}


def amdegroot_forward(state, x):
    """Its ``SSD.forward`` up to the two heads."""

    def conv(name, x, **settings):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **settings)

    sources = []
    for i in range(30):
        if i in (4, 9, 16, 23):
            x = F.max_pool2d(x, 2, 2, ceil_mode=i == 16)
        elif f"vgg.{i}.weight" in state:
            x = F.relu(conv(f"vgg.{i}", x, padding=1))
        if i == 22:
            sources.append(
                state["L2Norm.weight"].view(1, -1, 1, 1) * x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
            )
    x = F.relu(conv("vgg.31", F.max_pool2d(x, 3, 1, 1), padding=6, dilation=6))
    x = F.relu(conv("vgg.33", x))
    sources.append(x)
    for k in range(8):
        x = F.relu(conv(f"extras.{k}", x, **({"stride": 2, "padding": 1} if k in (1, 3) else {})))
        if k % 2:
            sources.append(x)
    out = []
    for name, columns in (("loc", 4), ("conf", 21)):
        maps = [conv(f"{name}.{i}", x, padding=1).permute(0, 2, 3, 1) for i, x in enumerate(sources)]
        out.append(torch.cat([x.reshape(len(x), -1) for x in maps], 1).view(1, -1, columns))
    return out


@torch.no_grad()
def test_amdegroot():
    """Its network takes 0..255 less (123, 117, 104), RGB: the data set turns OpenCV's channels round."""
    state = amdegroot()
    model = ssd300_vgg16(num_classes=21, prior_spec=SSD300_VOC_RELEASED).eval()
    report = load_weights(model, state)
    assert (report.format, report.skipped, report.detector) == ("amdegroot detector, rgb255", [], True)
    assert set(report.loaded) == set(model.state_dict())
    assert not model.antialias
    image = torch.rand(1, 3, 300, 300, generator=torch.Generator().manual_seed(1))
    x = image * 255 - torch.tensor([123.0, 117.0, 104.0]).view(3, 1, 1)
    for found, expected in zip(model.heads(model.transform(image)), amdegroot_forward(state, x), strict=True):
        assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_amdegroots_priors_are_not_the_default():
    state = amdegroot()
    with pytest.warns(UserWarning, match="SSD300_VOC_RELEASED"):
        ssd300_vgg16(num_classes=21, weights=state)


@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_conventions(ssd300, convention):
    """A pixel gives the first convolution the same, whatever input the file was trained on."""
    state = {key: value.half() for key, value in vgg16_features().items()}
    report = load_weights(ssd300, state, convention=convention)
    assert report.format == f"VGG16 backbone, {convention}"
    image = torch.rand(1, 3, 300, 300, generator=torch.Generator().manual_seed(1))
    pixels, mean, std = {
        "rgb": (image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "rgb255": (image * 255, (123.0, 117.0, 104.0), (1, 1, 1)),
        "bgr255": (image.flip(1) * 255, (103.939, 116.779, 123.68), (1, 1, 1)),
    }[convention]
    x = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = F.conv2d(x, state["features.0.weight"].float(), state["features.0.bias"].float())
    found = ssd300.backbone.features[0](ssd300.transform(image))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert ssd300.backbone.features[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("corner", "bias", "convention"),
    [
        (ORIGINAL_CORNER, ORIGINAL_BIAS, "bgr255"),
        (ORIGINAL_CORNER[::-1], ORIGINAL_BIAS, "rgb255"),
        (ORIGINAL_CORNER, (0.4, 0.38, 0.46, -0.32), "rgb"),
    ],
)
def test_the_original_vgg16_is_recognised(ssd300, corner, bias, convention):
    state = vgg16_features()
    state["features.0.weight"][0, :, 0, 0] = torch.tensor(corner)
    state["features.0.bias"][:4] = torch.tensor(bias)
    assert load_weights(ssd300, state).format == f"VGG16 backbone, {convention}"


def test_fc6_and_fc7_are_subsampled(ssd300):
    fc6 = torch.zeros(4096, 512, 7, 7, dtype=torch.float16)
    fc6[8, 5, 3, 6], fc6[9, 5, 3, 6], fc6[8, 6, 3, 5] = 1, 2, 3  # only the first is on the grid of 4, 3, 3
    fc7 = torch.zeros(4096, 4096, dtype=torch.float16)
    fc7[12, 16], fc7[12, 17] = 1, 2
    bias = torch.arange(4096).half()
    classifier = {"0.weight": fc6.view(4096, -1), "0.bias": bias, "3.weight": fc7, "3.bias": bias}
    classifier |= {"6.weight": torch.zeros(1000, 4096, dtype=torch.float16), "6.bias": torch.zeros(1000)}
    state = vgg16_features() | {f"classifier.{key}": value for key, value in classifier.items()}
    assert load_weights(ssd300, state).skipped == ["classifier.6.weight", "classifier.6.bias"]
    conv6, conv7 = ssd300.backbone.features[31], ssd300.backbone.features[33]
    assert conv6.weight.nonzero().tolist() == [[2, 5, 1, 2]] and conv6.weight.sum() == 1
    assert conv7.weight.nonzero().tolist() == [[3, 4, 0, 0]] and conv7.weight.sum() == 1
    assert torch.equal(conv6.bias, bias[::4].float()) and torch.equal(conv7.bias, bias[::4].float())

    state["classifier.0.weight"].fill_(torch.nan)  # as in torchvision's IMAGENET1K_FEATURES
    assert "classifier.0.weight" in load_weights(ssd300, state).skipped
    assert conv6.weight.isfinite().all()


def test_reduced_fc(ssd300):
    state = {key.removeprefix("vgg."): value for key, value in amdegroot().items() if key.startswith("vgg.")}
    report = load_weights(ssd300, state)
    assert report.format == "amdegroot VGG16 backbone, rgb255" and not report.detector
    assert torch.equal(ssd300.backbone.features[31].weight, state["31.weight"])


@torch.no_grad()
def test_mobilenet():
    theirs = mobilenet_v2().eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(1e-5, 1)  # where an eps of 0.001 would show
    model = ssdlite320_mobilenet_v2(num_classes=2, backbone_weights=theirs.state_dict()).eval()
    x = torch.rand(1, 3, 320, 320)
    torch.testing.assert_close(model.backbone(x)[1], theirs.features(x))
    with pytest.raises(ValueError, match="convention='bgr255' is for a VGG16"):
        load_weights(model, theirs.state_dict(), convention="bgr255")


def test_other_classes():
    """A detector of other classes gives all but its class heads, which are listed."""
    source, model = small(seed=1, num_classes=7), small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, source.state_dict())
    assert report.skipped == [f"class_heads.{k}.{name}" for k in (0, 1) for name in ("weight", "bias")]
    assert str(report).endswith("class_heads.0.weight, class_heads.0.bias, class_heads.1.weight, class_heads.1.bias")
    for name, value in model.state_dict().items():
        expected = before if name.startswith("class_heads.") else source.state_dict()
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("form", ["state.pt", "checkpoint.pt", "ddp.pt", "state.safetensors"])
def test_files_of_ours(tmp_path, form):
    source, model, path = small(seed=1), small(), tmp_path / form
    state = {name: value.contiguous() for name, value in source.state_dict().items()}
    if form == "state.safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif form == "ddp.pt":
        torch.save({f"module._orig_mod.{name}": value for name, value in state.items()}, path)
    else:
        torch.save({"model": state, "epoch": 3, "optimizer": {"state": {}}} if form == "checkpoint.pt" else state, path)
    report = load_weights(model, path)
    assert report.format == "ssd_ext detector" and len(report.loaded) == len(state) and not report.skipped
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", ["truncated", b"", b"<html>not found</html>"])
def test_files_that_cannot_be_read(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(small().state_dict(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(ValueError, match=f"weights{suffix}: corrupt") as caught:
        load_weights(small(), path)
    assert "\n" not in str(caught.value)


def test_objects_are_not_unpickled(tmp_path):
    torch.save({"model": Fraction(1, 2)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth: corrupt, or holds more than tensors"):
        load_weights(small(), tmp_path / "weights.pth")


def test_a_safetensors_file_without_that_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ImportError, match=r'needs safetensors: pip install "ssd_ext\[train\]"'):
        load_weights(small(), tmp_path / "weights.safetensors")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_weights(small(), tmp_path / "nothing.pth")


CLASSIFIER = {"classifier.weight": torch.ones(10, 8), "classifier.bias": torch.ones(10)}


def of_own_backbone(form):
    """The state dict of the whole backbone, of its features or of a classifier on these, and what it is to set."""
    state = small_with_neck(seed=1).backbone.state_dict()
    if form == "backbone":
        return state, [f"backbone.{name}" for name in state]
    features = {name: value for name, value in state.items() if name.startswith("features.")}
    names = [f"backbone.{name}" for name in features]
    if form == "classifier":
        return features | CLASSIFIER, names
    return {name.removeprefix("features."): value for name, value in features.items()}, names


@pytest.mark.parametrize("form", ["backbone", "features", "classifier"])
def test_a_backbone_of_ones_own(form):
    """Its tensors are set, and nothing else: neither the neck nor the heads."""
    state, names = of_own_backbone(form)
    model, source = small_with_neck(), small_with_neck(seed=1).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, state)
    assert sorted(report.loaded) == sorted(names)
    assert (report.skipped, report.detector) == (list(CLASSIFIER) if form == "classifier" else [], False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, (source if name in names else before)[name]), name
    assert not torch.equal(before["backbone.features.0.weight"], source["backbone.features.0.weight"])


@pytest.mark.parametrize("form", ["backbone", "features", "classifier"])
def test_a_backbone_of_ones_own_that_is_not_whole(form):
    state, _ = of_own_backbone(form)
    del state["1.running_mean" if form == "features" else "features.1.running_mean"]
    with pytest.raises(ValueError, match=r"this backbone does not fit the model: backbone\.features\.1\."):
        load_weights(small_with_neck(), state)


def test_a_whole_backbone_of_ones_own_without_a_tensor_beyond_its_features():
    state, _ = of_own_backbone("backbone")
    last = list(state)[-1]
    assert not last.startswith("features.")
    del state[last]
    with pytest.raises(ValueError, match=rf"does not fit the model: backbone\.{last} is missing"):
        load_weights(small_with_neck(), state)


def test_a_backbone_of_ones_own_with_more_features_than_vgg16s_classifier():
    """Only in VGG16 are 31 and 33 conv6 and conv7, which come from another part of the file."""
    model = small_with_neck()
    model.backbone.features.extend([*(nn.Identity() for _ in range(31 - len(model.backbone.features))), nn.PReLU(8)])
    with pytest.raises(ValueError, match=r"backbone\.features\.31\.weight is missing"):
        load_weights(model, {k: v for k, v in model.backbone.features.state_dict().items() if k != "31.weight"})


def test_a_whole_backbone_of_ours():
    """No convention is converted, and the extra levels are set, too."""
    source, model = ssdlite320_mobilenet_v2(2), ssdlite320_mobilenet_v2(3)
    report = load_weights(model, source.backbone.state_dict())
    assert report.format == "backbone"
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, source.backbone.state_dict()[name]), name


def test_a_convention_is_not_for_a_backbone_of_ones_own():
    state, _ = of_own_backbone("features")
    with pytest.raises(ValueError, match="convention='bgr255' is for a VGG16"):
        load_weights(small_with_neck(), state, convention="bgr255")


def test_a_detector_of_ones_own_on_vgg16():
    """Whoever builds it, the convention of a classifier's input is known by its layout."""
    assert load_weights(SSD(VGG16(), SSD300_COCO, 3), vgg16_features()).format == "VGG16 backbone, rgb"


STATE = small().state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "state dict: not the weights of a known layout, with keys none"),
        ({"a.weight": torch.ones(1)}, "not the weights of a known layout, with keys a.weight"),
        ({"epoch": 3, "lr": 0.1}, "expected tensors by name, or .* got a dict of epoch, lr"),
        (STATE | {"neck.weight": torch.ones(1)}, "does not fit the model: neck.weight is not in the model"),
        (
            STATE | {"box_heads.0.bias": torch.ones(3)},
            r"box_heads.0.bias is \[3\], the model's box_heads.0.bias \[16\]",
        ),
        (
            STATE | {"class_heads.0.weight": torch.ones(16, 9, 3, 3)},
            r"class_heads.0.weight is \[16, 9, 3, 3\], the model's class_heads.0.weight \[16, 8, 3, 3\]",
        ),
        ({"box_heads.0.bias": torch.ones(16)}, r"backbone.first.weight is missing; .* more"),
        ({"backbone.body.weight": torch.ones(1), "head.classification_head.x": torch.ones(1)}, "not in the model"),
        (vgg16_features(), r"this VGG16 backbone does not fit the model: features.0.weight is not in the model"),
    ],
)
def test_weights_that_do_not_fit(state, message):
    """Nothing is loaded then."""
    model = small(seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_backbone_is_no_detector(ssd300):
    with pytest.raises(ValueError, match="weights holds a VGG16 backbone, rgb: give it as backbone_weights"):
        ssd300_vgg16(weights=vgg16_features())
    with pytest.raises(ValueError, match="backbone_weights holds a ssd_ext detector: give it as weights"):
        ssd300_vgg16(num_classes=3, backbone_weights=ssd300.state_dict())
    lacking = vgg16_features()
    del lacking["features.5.bias"]
    with pytest.raises(ValueError, match=r"backbone\.features\.5\.bias is missing"):
        load_weights(ssd300, lacking)


def test_unknown_convention():
    with pytest.raises(ValueError, match="convention must be one of 'rgb', 'rgb255', 'bgr255', got 'hsv'"):
        load_weights(small(), STATE, convention="hsv")


PRIORS_UNKNOWN = {
    "text": "mobilenet",
    "none": None,
    "empty": {},
    "no mapping": {"prior_spec": None},
    "unknown field": {"prior_spec": {"anchors": 1}},
    "refused": {
        "prior_spec": {"image_size": (160, 224), "feature_sizes": ((1, 1),), "scales": (0.1,), "aspect_ratios": ((),)}
    },
}


@pytest.mark.parametrize("architecture", PRIORS_UNKNOWN.values(), ids=PRIORS_UNKNOWN)
def test_an_architecture_that_tells_no_priors_is_passed_over(architecture, tmp_path, recwarn):
    models = [ssdlite320_mobilenet_v2(3, image_size=(160, 224)) for _ in range(2)]
    checkpoint.save({"model": models[0].state_dict(), "architecture": architecture}, tmp_path / "w.pt")
    assert load_weights(models[1], tmp_path / "w.pt").loaded
    assert not recwarn


def test_the_priors_of_a_backbone_do_not_matter(tmp_path, recwarn):
    models = [ssdlite320_mobilenet_v2(3, image_size=(160, 224)) for _ in range(2)]
    architecture = models[0].architecture
    architecture["prior_spec"]["scales"] = tuple(scale * 0.9 for scale in architecture["prior_spec"]["scales"])
    checkpoint.save({"model": models[0].backbone.state_dict(), "architecture": architecture}, tmp_path / "w.pt")
    assert not load_weights(models[1], tmp_path / "w.pt").detector
    assert not recwarn
