"""Images to detections in one graph: compiled, exported, packaged, captured, and as ONNX."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from model_cases import assert_same_detections, photographs, pictures, small, spread  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from examples import serve  # noqa: E402
from opinfo.detect import DETECT  # noqa: E402
from opinfo.spec import HALVES, convert  # noqa: E402
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


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session, **inputs):
    """What ONNX Runtime computes of those inputs that the graph has."""
    names = {given.name for given in session.get_inputs()}
    found = session.run(None, {name: x.numpy() for name, x in inputs.items() if name in names})
    return [torch.from_numpy(x) for x in found]


@torch.no_grad()
def test_onnx(case, tmp_path):
    model, size, images = case
    export.onnx(model, tmp_path / "detector.onnx", classes=CLASSES, size=size)
    written = onnx.load(tmp_path / "detector.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert {node.domain for node in written.graph.node} == {""} and not written.functions
    assert [(x.domain, x.version) for x in written.opset_import] == [("", 18)]
    assert_metadata({entry.key: entry.value for entry in written.metadata_props}, model, size)
    runtime = session(tmp_path / "detector.onnx")
    assert [x.name for x in runtime.get_outputs()] == ["boxes", "scores", "labels", "counts"]
    for length in (5, 2, 1, 0):
        found, expected = run(runtime, images=images[:length]), model.predict(images[:length])
        assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in expected]
        assert_equal_detections(found, expected)


@torch.no_grad()
def test_onnx_of_a_picture_of_nothing(tmp_path):
    images = batch_of((32, 32))
    model = untrained("small", images)
    nothing = model.mean.expand_as(images[:1])
    model.score_threshold = model.heads(model.transform(nothing))[1].softmax(-1)[..., 1:].max().item() + 0.001
    export.onnx(model, tmp_path / "detector.onnx")
    mixed = torch.cat([images[:2], nothing, images[2:]])
    found, expected = run(session(tmp_path / "detector.onnx"), images=mixed), model.predict(mixed)
    assert expected[3][2] == 0
    assert all(torch.equal(x[2], y[2]) for x, y in zip(found, expected, strict=True))
    others = [0, 1, 3, 4, 5]
    assert_equal_detections([x[others] for x in found], [x[others] for x in expected])


class Detect(torch.nn.Module):
    """ops.detect with fixed settings."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings

    def forward(self, deltas, logits, priors):
        return ops.detect(deltas, logits, priors, **self.settings)


QUICK = ("few of each class, ties at the cut", "class-agnostic, ties", "more wanted than there are", "sigmoid")


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_onnx_of_the_op(quick, generator, tmp_path):
    """One graph for all cases, for an export takes seconds."""
    cases = [case for case in DETECT.cases if not case.benchmark and torch.float32 in case.dtypes]
    cases = [case for case in cases if (case.name in QUICK) == quick and case.name != "P=0"]
    assert len(cases) >= len(QUICK)
    made = [convert(case.make(generator), torch.float32) for case in cases]
    keys = ("deltas", "logits", "priors")
    modules = [Detect({k: x for k, x in inputs.items() if k not in keys}) for inputs in made]

    class All(torch.nn.Module):
        def forward(self, *tensors):
            return tuple(x for i, op in enumerate(modules) for x in op(*tensors[3 * i : 3 * i + 3]))

    tensors = [inputs[key].contiguous() for inputs in made for key in keys]
    program = torch.export.export(All(), tuple(tensors))
    names = [f"{name} {i}" for i in range(len(cases)) for name in export.OUTPUTS]
    export.onnx(program, tmp_path / "op.onnx", output_names=names)
    found = run(session(tmp_path / "op.onnx"), **{f"tensors_{i}": x for i, x in enumerate(tensors)})
    for i, (case, inputs) in enumerate(zip(cases, made, strict=True)):
        expected = DETECT.reference(**convert(inputs, torch.float64))
        wrong = DETECT.mismatch(inputs, tuple(found[4 * i : 4 * i + 4]), expected)
        assert wrong is None, f"{case.name}: {wrong}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@torch.no_grad()
def test_onnx_of_other_types_computes_in_float32(dtype, generator, tmp_path):
    settings = {"activation": "sigmoid", "score_threshold": 0.5}  # which a logit of 0 does not exceed
    logits = torch.randn(2, 30, 5).round()
    tensors = {"deltas": torch.randn(2, 30, 4), "logits": logits, "priors": torch.rand(30, 4) + 0.2}
    tensors = convert(tensors, dtype)
    export.onnx(torch.export.export(Detect(settings), tuple(tensors.values())), tmp_path / "op.onnx")
    found = run(session(tmp_path / "op.onnx"), **tensors)
    expected = ops.detect(**convert(tensors, torch.float32), **settings)
    assert found[1].dtype == dtype
    rounded = convert(expected, dtype)
    assert_equal_detections(convert(found, torch.float32), convert(rounded, torch.float32))


@torch.no_grad()
def test_onnx_of_heads_in_half_beside_float32_priors(generator, tmp_path):
    heads = torch.randn(2, 30, 4, generator=generator).half(), torch.randn(2, 30, 5, generator=generator).half()
    priors = torch.rand(30, 4, generator=generator) + 0.2
    export.onnx(torch.export.export(Detect({}), (*heads, priors)), tmp_path / "op.onnx")
    found = run(session(tmp_path / "op.onnx"), deltas=heads[0], logits=heads[1], priors=priors)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_equal_detections(found, ops.detect(*heads, priors))


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
    assert onnx.load(tmp_path / "detector.onnx").opset_import[0].version == 21
    images = torch.stack(pictures(((32, 32),) * 2))
    assert_equal_detections(run(session(tmp_path / "detector.onnx"), images=images), model.predict(images))


def test_wrong_calls(tmp_path):
    with pytest.raises(ValueError, match=r"must be in eval mode .* call eval\(\)"):
        export.program(small())
    with pytest.raises(ValueError, match=r"size must be positive, got \(0, 9\)"):
        export.program(small().eval(), (0, 9))
    with pytest.raises(ValueError, match=r"path must end in \.pt2, got detector\.so"):
        export.aot_inductor(small().eval(), "detector.so")
    with pytest.raises(TypeError, match=r"must be an ssd_ext\.models\.SSD, got Linear"):
        export.onnx(torch.nn.Linear(2, 2).eval(), tmp_path / "detector.onnx")
    nothing = (torch.rand(1, 0, 4), torch.rand(1, 0, 3), torch.rand(0, 4))
    with pytest.raises(ValueError, match="no detector without priors"):
        export.onnx(torch.export.export(Detect({}), nothing), tmp_path / "detector.onnx")
    with pytest.raises(ValueError, match="opset must be 18 or newer, got 17"):
        export.onnx(small().eval(), tmp_path / "detector.onnx", opset=17)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_onnx(package, python):
    code = f"import sys; sys.modules[{package!r}] = None; from ssd_ext import export; export.onnx(None, 'x')"
    assert 'pip install "ssd_ext[export]"' in python("-c", code).stderr
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
