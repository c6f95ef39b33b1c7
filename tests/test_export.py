"""Images to detections in one graph: compiled, exported, packaged, captured, and as ONNX."""

import json
import re
from pathlib import Path

import pytest
import torch

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from conftest import at_and_beside  # noqa: E402
from model_cases import assert_same_detections, photographs, pictures, small, spread  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from examples import serve  # noqa: E402
from opinfo.boxes import BOX_IOU, DECODE, ENCODE  # noqa: E402
from opinfo.detect import DETECT  # noqa: E402
from opinfo.nms import BATCHED_NMS, NMS  # noqa: E402
from opinfo.spec import HALVES, convert, map_tensors, tensors_in  # noqa: E402
from ssd_ext import _C, cli, export, ops  # noqa: E402
from ssd_ext.models import ssdlite320_mobilenet_v2  # noqa: E402

NAMES = ("IMG_2614", "cam_image36", "IMG_2383", "IMG_2540", "cam_image54")
BUILDERS = {"small": small, "ssdlite": lambda: ssdlite320_mobilenet_v2(num_classes=4, image_size=(96, 128))}
SIZES = {"small": (60, 50), "ssdlite": None}  # the small one resizes inside


def batch_of(size, names=NAMES):
    """Photographs of one size."""
    return torch.cat(
        [F.interpolate(image[None], size, mode="bilinear", antialias=True) for image in photographs(*names)]
    )


def untrained(name, images):
    """A model with random weights that tells ``images`` apart, and in which rounding errors do not grow."""
    torch.manual_seed(0)
    model = BUILDERS[name]()
    normalisations = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in normalisations:
        module.momentum = 1.0
    model.train().heads(model.transform(images))
    for module in normalisations:  # a channel that hardly varies would be all rounding error
        module.running_var.clamp_(min=module.running_var.mean())
    logits = model.eval().heads(model.transform(images))[1]
    for head in model.class_heads:
        [m for m in head.modules() if isinstance(m, torch.nn.Conv2d)][-1].weight /= logits.std()
    return model


@pytest.fixture(scope="module", params=["small", pytest.param("ssdlite", marks=pytest.mark.slow)])
def case(request):
    """A model, the size of its images as given to program(), and a batch of five photographs."""
    size = SIZES[request.param]
    images = batch_of(size or BUILDERS[request.param]().image_size)
    with torch.no_grad():
        return untrained(request.param, images), size, images


def assert_equal_detections(found, expected):
    found, expected = tuple(found), tuple(expected)
    assert torch.equal(found[3], expected[3]), "counts"
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)  # in order: equal ones may be swapped
    assert_same_detections(ops.unpad(*found), ops.unpad(*expected))


@pytest.mark.parametrize("case", ["small"], indirect=True)
@torch.no_grad()
def test_compiled_without_a_break_and_once_for_all_batch_sizes(case):
    model, _, images = case
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.predict, fullgraph=True, backend=backend)
    for length in (2, 3, 5, 4):
        assert_equal_detections(compiled(images[:length]), model.predict(images[:length]))
    assert backend.frame_count == 2, "the first size, then any"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["small"], indirect=True)
@torch.no_grad()
def test_compiled_by_inductor(case):
    model, _, images = case
    torch.compiler.reset()
    compiled = torch.compile(model.predict, fullgraph=True, dynamic=True)
    for length in (2, 5):
        assert_equal_detections(compiled(images[:length]), model.predict(images[:length]))


ENTRIES = {"classes", "preprocessing"}
CLASSES = ["nine", "ten", "jack"]


def assert_metadata(found, model, size):
    """The entries of a file, of which some hold JSON."""
    found = {
        name: json.loads(value) if isinstance(value, str) else value for name, value in found.items() if name in ENTRIES
    }
    assert found.keys() == ENTRIES
    assert found["classes"] == CLASSES
    assert found["preprocessing"] == {
        "size": list(size or model.image_size),
        "channels": "RGB",
        "range": [0, 1],
        "antialias": model.antialias,
    }


@torch.no_grad()
def test_program_in_another_process(case, tmp_path, python):
    model, size, images = case
    export.save(model, tmp_path / "detector.pt2", classes=CLASSES, size=size)
    torch.save(images, tmp_path / "images.pt")
    code = """if True:
        import torch, ssd_ext.export
        extra = {ssd_ext.export.METADATA_FILE: ""}
        detect, images = torch.export.load("detector.pt2", extra_files=extra).module(), torch.load("images.pt")
        torch.save([detect(images[:length]) for length in (5, 2, 1, 0)], "found.pt")
        print(extra[ssd_ext.export.METADATA_FILE])
    """
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    for found in torch.load(tmp_path / "found.pt"):
        assert_equal_detections(found, model.predict(images[: len(found[3])]))
    assert_metadata(json.loads(done.stdout), model, size)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["small"], indirect=True)
@torch.no_grad()
def test_package_of_aotinductor(case, tmp_path):
    model, size, images = case
    export.aot_inductor(model, tmp_path / "detector.pt2", classes=CLASSES, size=size)
    detect = torch._inductor.aoti_load_package(tmp_path / "detector.pt2")
    for length in (5, 2, 1, 0):
        assert_equal_detections(detect(images[:length]), model.predict(images[:length]))
    assert_metadata(detect.get_metadata(), model, size)


@pytest.mark.parametrize("antialias", [True, False])
def test_metadata(antialias):
    model = small(antialias=antialias).eval()
    assert_metadata(export.metadata(model, CLASSES), model, (32, 32))
    assert_metadata(export.metadata(model, CLASSES, (60, 50)), model, (60, 50))
    assert export.metadata(model)["classes"] == ["1", "2", "3"]
    with pytest.raises(ValueError, match=r"classes must be 3 names, got 2: \['nine', 'ten'\]"):
        export.metadata(model, CLASSES[:2])


@pytest.mark.skipif(
    not (torch.cuda.is_available() and "cuda" in _C.build_info()), reason="needs a GPU and a CUDA build"
)
@torch.no_grad()
def test_cuda_graph(case):
    model, _, images = case
    predict, images = model.cuda().predict, images.cuda()
    given = torch.zeros_like(images)
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            predict(given)  # sets up what a capture may not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = predict(given)
        for order in (images, images.flip(0)):
            given.copy_(order)
            graph.replay()
            expected = predict(order)
            assert_equal_detections([x.cpu() for x in found], [x.cpu() for x in expected])
    finally:
        model.cpu()


def onnx_runtime(path):
    """A function of named tensors, of which the graph may lack some, that gives the outputs in their order."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {given.name for given in session.get_inputs()}

    def run(**inputs):
        found = session.run(None, {name: x.numpy() for name, x in inputs.items() if name in names})
        return [torch.from_numpy(x) for x in found]

    return run


def openvino(path):
    """The same in OpenVINO."""
    core = pytest.importorskip("openvino").Core()
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = {given.any_name for given in compiled.inputs}

    def run(**inputs):
        found = compiled({name: x.numpy() for name, x in inputs.items() if name in names})
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    return run


RUNTIMES = [onnx_runtime, openvino]
in_every_runtime = pytest.mark.parametrize("runtime", RUNTIMES)


def check_file(path, opset=18):
    """The file follows the specification and contains standard operators only."""
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert {node.domain for node in written.graph.node} == {""} and not written.functions
    assert [(x.domain, x.version) for x in written.opset_import] == [("", opset)]
    return written


@torch.no_grad()
def test_onnx(case, tmp_path):
    model, size, images = case
    export.onnx(model, tmp_path / "detector.onnx", classes=CLASSES, size=size)
    written = check_file(tmp_path / "detector.onnx")
    assert_metadata({entry.key: entry.value for entry in written.metadata_props}, model, size)
    assert [x.name for x in written.graph.output] == ["boxes", "scores", "labels", "counts"]
    for runtime in RUNTIMES if size is None else [onnx_runtime]:  # OpenVINO resizes without antialiasing
        run = runtime(tmp_path / "detector.onnx")
        for length in (5, 2, 1, 0):
            found, expected = run(images=images[:length]), model.predict(images[:length])
            assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in expected]
            assert_equal_detections(found, expected)


@in_every_runtime
@torch.no_grad()
def test_onnx_of_a_picture_of_nothing(runtime, tmp_path):
    images = batch_of((32, 32))
    model = untrained("small", images)
    nothing = model.mean.expand_as(images[:1])
    model.score_threshold = model.heads(model.transform(nothing))[1].softmax(-1)[..., 1:].max().item() + 0.001
    export.onnx(model, tmp_path / "detector.onnx")
    mixed = torch.cat([images[:2], nothing, images[2:]])
    found, expected = runtime(tmp_path / "detector.onnx")(images=mixed), model.predict(mixed)
    assert expected[3][2] == 0
    assert all(torch.equal(x[2], y[2]) for x, y in zip(found, expected, strict=True))
    others = [0, 1, 3, 4, 5]
    assert_equal_detections([x[others] for x in found], [x[others] for x in expected])


class Calls(torch.nn.Module):
    """A function that gives a nest of tensors, as a module. Its arguments are then named tensors_0, tensors_1 ..."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return list(tensors_in(self.function(*tensors)))


def named(tensors):
    return {f"tensors_{i}": x.contiguous() for i, x in enumerate(tensors)}


def nested_as(nest, tensors):
    """The tensors in the places of those in the nest."""
    tensors = iter(tensors)
    return map_tensors(nest, lambda _: next(tensors))


def export_calls(function, tensors, path, dynamic=None, opset=18):
    """A user's own export; ``dynamic`` lists those dimensions of each tensor."""
    settings = {"dynamo": True, "opset_version": opset, "verbose": False}
    if dynamic is not None:
        shapes = tuple(dict.fromkeys(dimensions, torch.export.Dim.DYNAMIC) for dimensions in dynamic)
        settings["dynamic_shapes"] = (shapes,)
    table = export.onnx_translations()
    written = torch.onnx.export(Calls(function).eval(), tuple(tensors), custom_translation_table=table, **settings)
    written.save(path)
    check_file(path, opset)


def every_nms(boxes, scores, ids):
    """Each kind with each threshold."""
    found = {}
    for threshold in (0.0, 0.3, 0.45, 0.5, 1.0):
        found["nms", threshold] = ops.nms(boxes, scores, threshold)
        found["nms_padded", threshold] = ops.nms_padded(boxes, scores, threshold)
        found["batched_nms", threshold] = ops.batched_nms(boxes, scores, ids, threshold)
        found["batched_nms_padded", threshold] = ops.batched_nms_padded(boxes, scores, ids, threshold)
    return found


@pytest.fixture(scope="module")
def nms_file(tmp_path_factory):
    """Exported with three boxes and for any number of them."""
    path = tmp_path_factory.mktemp("nms") / "op.onnx"
    export_calls(every_nms, [torch.rand(3, 4), torch.rand(3), torch.arange(3)], path, [(0,)] * 3)
    return path


def assert_same_but_for_ties(found, expected, boxes, scores, ids, threshold):
    """Equal, unless scores are equal or an IoU is as good as equal to the threshold: then what NMS may keep."""
    known = scores[~scores.isnan()]
    iou = ops.box_iou(boxes, boxes) * (ids[:, None] == ids)
    if len(known.unique()) == len(known) and not ((iou > 0) & ((iou - threshold).abs() < 1e-6)).triu(1).any():
        assert torch.equal(found, expected)
        return
    kept, missing = scores[found], ~scores.isnan()
    missing[found] = False
    assert len(found.unique()) == len(found) and not kept.isnan().any()
    assert (kept[1:] <= kept[:-1]).all()
    assert (iou[found][:, found].tril(-1) <= threshold + 1e-6).all()
    over = iou[missing][:, found]
    assert ((over > 0) & (over >= threshold - 1e-6) & (kept >= scores[missing, None])).any(1).all()


@in_every_runtime
def test_nms_in_onnx(runtime, nms_file, generator):
    run = runtime(nms_file)
    for case in BATCHED_NMS.cases:
        inputs = case.make(generator)
        boxes, scores, ids = inputs["boxes"], inputs["scores"], inputs["idxs"].long()
        if case.oracle == torch.float32:  # the edge of its range: runtimes take subnormal numbers for 0
            continue
        if len(boxes) > 1000 or (runtime is openvino and bool((ids != ids.int()).any())):
            continue  # integers of OpenVINO have 32 bits
        expected = every_nms(boxes, scores, ids)
        found = nested_as(expected, run(**named([boxes, scores, ids])))
        for (name, threshold), kept in found.items():
            wanted = expected[name, threshold]
            if runtime is onnx_runtime:
                wrong = [x for x, y in zip(tensors_in(kept), tensors_in(wanted), strict=True) if not torch.equal(x, y)]
                assert not wrong, f"{case.name}, {name}, {threshold}: {wrong}, expected {wanted}"
                continue
            if isinstance(kept, tuple):
                assert len(kept[0]) == len(boxes) and (kept[0][kept[1] :] == -1).all()
                kept, wanted = kept[0][: kept[1]], wanted[0][: wanted[1]]
            groups = ids if "batched" in name else torch.zeros_like(ids)
            assert_same_but_for_ties(kept, wanted, boxes, scores, groups, threshold)


def test_threshold_of_nms_in_onnx_is_exact(generator, tmp_path):
    inputs = NMS.cases[1].make(generator)
    boxes, scores = inputs["boxes"], inputs["scores"]
    iou = ops.box_iou(boxes, boxes).triu(1).flatten()
    thresholds = at_and_beside(iou[(iou > 0.3) & (iou < 0.9)][:4])
    assert len(thresholds) == 12

    def calls(*given):
        return [ops.nms(*given, threshold) for threshold in thresholds]

    export_calls(calls, [boxes, scores], tmp_path / "op.onnx")
    for threshold, keep in zip(thresholds, onnx_runtime(tmp_path / "op.onnx")(**named([boxes, scores])), strict=True):
        assert torch.equal(keep, ops.nms(boxes, scores, threshold))


OTHER_SETTINGS = {"encode": {"variances": (0.5, 2.0)}, "decode": {"variances": (0.5, 2.0), "bbox_xform_clip": 0.75}}


@pytest.fixture(scope="module")
def box_file(tmp_path_factory):
    """The ops of boxes, with their defaults and with other settings, for any number of boxes."""

    def calls(rows, priors, boxes1, boxes2):
        coded = [
            op(rows, priors, **settings)
            for op in (ops.encode, ops.decode)
            for settings in ({}, OTHER_SETTINGS[op.__name__])
        ]
        return [*coded, ops.box_iou(boxes1, boxes2)]

    path = tmp_path_factory.mktemp("boxes") / "op.onnx"
    tensors = [torch.rand(2, 3, 4), torch.rand(3, 4), torch.rand(3, 4), torch.rand(2, 4)]
    export_calls(calls, tensors, path, [(0, 1), (0,), (0,), (0,)])
    return path


@in_every_runtime
@pytest.mark.parametrize("info", [ENCODE, DECODE, BOX_IOU], ids=lambda info: info.name)
def test_boxes_in_onnx(runtime, info, box_file, generator):
    run, compared = runtime(box_file), 0
    for case in info.cases:
        inputs = case.make(generator)
        first, second = inputs.values()
        if case.benchmark or case.oracle == torch.float32 or (info is not BOX_IOU and first.dim() != 3):
            continue
        given = [torch.rand(1, 2, 4), torch.rand(2, 4), torch.rand(2, 4), torch.rand(2, 4)]
        given[slice(2, 4) if info is BOX_IOU else slice(0, 2)] = first, second
        found = run(**named(given))
        settings = [{}] if info is BOX_IOU else [{}, OTHER_SETTINGS[info.name]]
        start = {"encode": 0, "decode": 2, "box_iou": 4}[info.name]
        for result, others in zip(found[start:], settings, strict=False):
            expected = info.reference(**convert(inputs, torch.float64), **others)
            wrong = info.mismatch(inputs, result, expected)
            assert result.dtype == torch.float32 and wrong is None, f"{case.name}, {others}: {wrong}"
            compared += 1
    assert compared >= 6


def each_op(boxes, scores, priors, logits):
    return [
        ops.encode(boxes, priors),
        ops.decode(boxes, priors),
        ops.box_iou(boxes, boxes),
        ops.nms(boxes, scores, 0.4),
        # a logit of 0 does not exceed the threshold
        *ops.detect(boxes[None], logits, priors, activation="sigmoid", score_threshold=0.5),
    ]


@pytest.fixture(scope="module")
def file_of_types(tmp_path_factory):
    """Every op in each type, with the inputs. numpy has no bfloat16: what goes in and comes out is float32."""
    generator = torch.Generator().manual_seed(0)
    boxes, priors = (torch.randint(1, 64, (9, 4), generator=generator) / 64 for _ in range(2))
    boxes[:, 2:] += boxes[:, :2]
    logits = torch.arange(27.0).remainder(23).view(1, 9, 3) / 4 - 1
    tensors = [boxes, torch.randperm(9, generator=generator) / 8, priors, logits]

    def calls(*given):
        bfloat16 = each_op(*(x.bfloat16() for x in given[8:]))
        return [
            *each_op(*given[:4]),
            *each_op(*given[4:8]),
            *(x.float() if x.is_floating_point() else x for x in bfloat16),
        ]

    inputs = [*convert(tensors, torch.float16), *convert(tensors, torch.float64), *tensors]
    path = tmp_path_factory.mktemp("types") / "op.onnx"
    export_calls(calls, inputs, path)
    return tensors, inputs, path


@in_every_runtime
@torch.no_grad()
def test_other_types_in_onnx_compute_in_float32(runtime, file_of_types):
    tensors, inputs, path = file_of_types
    found, expected = runtime(path)(**named(inputs)), each_op(*tensors)
    for dtype, shown in ((torch.float16,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32)):
        tolerance = 2 * torch.finfo(dtype).eps + 2e-6
        for wide in expected:
            result = found.pop(0)
            if wide.is_floating_point():
                torch.testing.assert_close(result, wide.to(dtype).to(shown), rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(result, wide)


SETTINGS = [
    {},
    {"activation": "sigmoid", "score_threshold": 0.5, "class_agnostic": True, "window": (0.1, 0.2, 0.9, 0.8)},
    {"topk_per_class": 20, "iou_threshold": 0.3, "window": (0.0, 0.0, 1.0, 1.0), "bbox_xform_clip": 0.01},
    {"class_agnostic": True, "topk_per_class": 30, "variances": (0.5, 0.4), "max_detections": 90},
    {"max_detections": 2000},
]


def detect_with_every_setting(*tensors):
    return [ops.detect(*tensors, **settings) for settings in SETTINGS]


@pytest.fixture(scope="module")
def heads_of_photographs(tmp_path_factory):
    """Deltas and logits of five photographs and the priors, and ops.detect in ONNX with all settings for any number."""
    images = batch_of((32, 32))
    with torch.no_grad():
        model = untrained("small", images)
        tensors = [*model.heads(model.transform(images)), model.priors]
    path = tmp_path_factory.mktemp("detect") / "op.onnx"
    two = [tensors[0][:2], tensors[1][:2], tensors[2]]
    export_calls(detect_with_every_setting, two, path, [(0, 1), (0, 1), (0,)])
    return tensors, path


@in_every_runtime
@torch.no_grad()
def test_detect_in_onnx_with_every_setting(runtime, heads_of_photographs):
    (deltas, logits, priors), path = heads_of_photographs
    run = runtime(path)
    for images, number in ((5, len(priors)), (1, 300), (0, 9)):
        given = [deltas[:images, :number], logits[:images, :number], priors[:number]]
        wanted = detect_with_every_setting(*given)
        for found, expected in zip(nested_as(wanted, run(**named(given))), wanted, strict=True):
            assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in expected]
            assert_equal_detections(found, expected)
    for x in run(**named([deltas[:, :0], logits[:, :0], priors[:0]]))[3::4]:
        assert x.tolist() == [0] * 5


QUICK = ("few of each class, ties at the cut", "class-agnostic, ties", "more wanted than there are", "sigmoid")
FIXED_AT_0 = ("P=0", "B=0", "C=0", "C=1, background alone")  # a dimension, which OpenVINO cannot read


@pytest.mark.parametrize(
    "names", [QUICK, FIXED_AT_0, pytest.param(None, marks=pytest.mark.slow)], ids=["quick", "fixed at 0", "others"]
)
@torch.no_grad()
def test_onnx_of_the_op(names, generator, tmp_path):
    """One graph for several cases, for an export takes seconds."""
    cases = [case for case in DETECT.cases if not case.benchmark and torch.float32 in case.dtypes]
    cases = [case for case in cases if case.oracle == torch.float64]  # not at the edge of the range of float32
    cases = [case for case in cases if (case.name in names if names else case.name not in QUICK + FIXED_AT_0)]
    assert len(cases) >= 4
    made = [convert(case.make(generator), torch.float32) for case in cases]
    keys = ("deltas", "logits", "priors")
    settings = [{k: x for k, x in inputs.items() if k not in keys} for inputs in made]

    def calls(*tensors):
        return [ops.detect(*tensors[3 * i : 3 * i + 3], **given) for i, given in enumerate(settings)]

    tensors = [inputs[key].contiguous() for inputs in made for key in keys]
    output_names = [f"{name} {i}" for i in range(len(cases)) for name in export.OUTPUTS]
    program = torch.export.export(Calls(calls), tuple(tensors))
    export.onnx(program, tmp_path / "op.onnx", output_names=output_names)
    for runtime in [onnx_runtime] if names == FIXED_AT_0 else RUNTIMES:
        found = nested_as(calls(*tensors), runtime(tmp_path / "op.onnx")(**named(tensors)))
        for case, inputs, result in zip(cases, made, found, strict=True):
            wrong = DETECT.mismatch(inputs, result, DETECT.reference(**convert(inputs, torch.float64)))
            if runtime is openvino and wrong and "tie in the wrong order" in wrong:
                continue
            assert wrong is None, f"{case.name}: {wrong}"


@pytest.mark.parametrize("opset", [20, 23])
def test_translations_beside_those_of_torchvision(opset, generator, tmp_path):
    inputs = NMS.cases[1].make(generator)
    boxes, scores = inputs["boxes"], inputs["scores"]

    def model(boxes, scores):
        return [torchvision.ops.nms(boxes, scores, 0.5), boxes[ops.nms(boxes, scores, 0.5)]]

    export_calls(model, [boxes[:9], scores[:9]], tmp_path / "op.onnx", [(0,), (0,)], opset)
    found = onnx_runtime(tmp_path / "op.onnx")(**named([boxes, scores]))
    assert all(torch.equal(x, y) for x, y in zip(found, model(boxes, scores), strict=True))


@torch.no_grad()
def test_onnx_of_heads_in_half_beside_float32_priors(generator, tmp_path):
    heads = torch.randn(2, 30, 4, generator=generator).half(), torch.randn(2, 30, 5, generator=generator).half()
    tensors = [*heads, torch.rand(30, 4, generator=generator) + 0.2]

    def calls(deltas, logits, priors):
        return [*ops.detect(deltas, logits, priors), ops.decode(deltas, priors)]

    export_calls(calls, tensors, tmp_path / "op.onnx")
    found, expected = onnx_runtime(tmp_path / "op.onnx")(**named(tensors)), calls(*tensors)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert_equal_detections(found[:4], expected[:4])
    torch.testing.assert_close(found[4], expected[4])


@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_program_of_a_model_in_half_takes_float32_images(dtype):
    model = spread(small()).eval().to(dtype)
    program = export.program(model, (60, 50))
    images = torch.stack(pictures(((60, 50),) * 3))
    found, expected = program.module()(images), model.predict(images)
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.int64, torch.int64]
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


@torch.no_grad()
def test_onnx_of_another_opset(tmp_path):
    model = spread(small()).eval()
    export.onnx(model, tmp_path / "detector.onnx", opset=21)
    check_file(tmp_path / "detector.onnx", 21)
    images = torch.stack(pictures(((32, 32),) * 2))
    assert_equal_detections(onnx_runtime(tmp_path / "detector.onnx")(images=images), model.predict(images))


def test_wrong_calls(tmp_path):
    with pytest.raises(ValueError, match=r"must be in eval mode .* call eval\(\)"):
        export.program(small())
    with pytest.raises(ValueError, match=r"size must be positive, got \(0, 9\)"):
        export.program(small().eval(), (0, 9))
    with pytest.raises(ValueError, match=r"path must end in \.pt2, got detector\.so"):
        export.aot_inductor(small().eval(), "detector.so")
    with pytest.raises(TypeError, match=r"must be an ssd_ext\.models\.SSD, got Linear"):
        export.onnx(torch.nn.Linear(2, 2).eval(), tmp_path / "detector.onnx")
    soft = torch.export.export(Calls(ops.soft_nms_padded), (torch.rand(5, 4), torch.rand(5)))
    with pytest.raises(ValueError, match=r"onnx_translations.* translates, but calls ssd_ext::soft_nms_padded"):
        export.onnx(soft, tmp_path / "detector.onnx")
    with pytest.raises(ValueError, match="opset must be 18 or newer, got 17"):
        export.onnx(small().eval(), tmp_path / "detector.onnx", opset=17)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_onnx(package, python):
    code = f"""if True:
        import sys; sys.modules[{package!r}] = None
        from ssd_ext import export
        for call in (export.onnx_translations, lambda: export.onnx(None, "x")):
            try: call()
            except ImportError as error: print(error)
    """
    assert python("-c", code).stdout.count('pip install "ssd_ext[export]"') == 2
    assert python("-c", "from ssd_ext import export; import sys; assert 'onnx' not in sys.modules").returncode == 0


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run_code(tmp_path, monkeypatch):
    """A function that runs the Python of a page in an empty folder; it returns the names that this has set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssd_ext.inference.load_detector", lambda path: (spread(small()).eval(), CLASSES))

    def run(page):
        names = {}
        for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            exec(compile(code, page, "exec"), names)
        return names

    return run


@pytest.mark.slow
def test_code_of_the_page_runs(run_code, capsys):
    names = run_code("docs/export.md")
    found = names["model"].cpu()(names["images"])
    assert len(found[0]["labels"]) > 20
    assert names["counts"].tolist() == [len(image["labels"]) for image in found]
    assert capsys.readouterr().out.count(str(CLASSES)) == 3, "in three formats"


def test_code_of_the_examples_runs(run_code):
    run_code("examples/README.md")
    assert serve.Detector("cards.pt2").classes == CLASSES


@pytest.mark.parametrize("page", ["docs/export.md", "examples/README.md"])
def test_commands_of_the_pages_are_understood(page):
    """What is served was exported before."""
    lines = re.findall(r"^(?:python )?(ssd_ext|examples/serve\.py) (.*)", (ROOT / page).read_text(), re.MULTILINE)
    exported = [cli.parser_for("export").parse_args(line.split()) for name, line in lines if name == "ssd_ext"]
    (served,) = [serve.parser().parse_args(line.split()) for name, line in lines if name != "ssd_ext"]
    assert served.detector in {str(args.out) for args in exported}


def test_metadata_are_not_for_a_program(tmp_path):
    pytest.importorskip("onnxscript")
    program = export.program(small().eval())
    for given in ({"classes": ["a", "b", "c"]}, {"size": (9, 9)}):
        with pytest.raises(ValueError, match="classes and size are for a model"):
            export.onnx(program, tmp_path / "x.onnx", **given)
