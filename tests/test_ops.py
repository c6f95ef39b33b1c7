"""What every op must do, on every case of its description."""

import dataclasses
import itertools
import math
import re
import sys

import pytest
import torch
from conftest import DEVICES, GPU_PARAMS, SIMD_LEVELS, at_and_beside

from benchmarks.peers import MissingPeerError, peers_of
from opinfo import OPS
from opinfo.boxes import DECODE
from opinfo.spec import EXACT, convert, map_tensors, tensors_in
from ssd_ext import GroundTruth, ops
from ssd_ext.priors import SSD300_VOC

CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}", marks=[pytest.mark.slow] if case.benchmark else [])
    for op in OPS
    for case in op.cases
]
SMALL = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in op.cases if not case.benchmark]
ORDINARY = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in op.cases[:2]]
EACH = [pytest.param(op, op.small_case, id=op.name) for op in OPS]
ERRORS = [pytest.param(op, error, id=f"{op.name}-{error.name}") for op in OPS for error in op.errors]
BAD_NUMBERS = (math.nan, math.inf, -math.inf)
PEERS = [
    pytest.param(op, case, peer, id=f"{op.name}-{case.name}-{peer}", marks=[pytest.mark.slow] if case.benchmark else [])
    for op in OPS
    for case in op.cases
    for peer in peers_of(op).calls
    if case.peers and torch.float32 in case.dtypes
]


def assert_same_bits(a, b, where=""):
    a, b = list(tensors_in(a)), list(tensors_in(b))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}\n{text}")
        if x.is_floating_point():
            assert torch.equal(x.signbit() & ~x.isnan(), y.signbit() & ~y.isnan()), where


def spread(t):
    """The same values, every second element of a wider tensor."""
    return t.unsqueeze(-1).repeat(*[1] * t.dim(), 2)[..., 0] if t.dim() else t


def with_one_bad_number(inputs):
    """The inputs with a NaN or an infinity in one element, again and again; each time where it is, too."""
    for i, t in enumerate(tensors_in(inputs)):
        if not t.is_floating_point() or not t.numel():
            continue
        columns = t.shape[-1] if t.dim() > 1 else 1
        rows = t.numel() // columns
        wanted = range(columns) if columns <= 8 else (0, 1, columns - 1)
        for row, column, bad in itertools.product({0, min(35, rows - 1), rows - 1}, wanted, BAD_NUMBERS):
            changed = map_tensors(inputs, torch.clone)
            at = torch.unravel_index(torch.tensor(row * columns + column), t.shape)
            list(tensors_in(changed))[i][at] = bad
            yield f"{bad} in row {row}, column {column} of tensor {i}", changed


def requiring_grad(op, inputs):
    return {
        k: v.clone().requires_grad_() if k in op.differentiable and v.is_floating_point() else v
        for k, v in inputs.items()
    }


@pytest.mark.parametrize(("op", "case"), CASES)
def test_agrees_with_float64_reference(op, case, device, generator):
    made = case.make(generator)
    exact = []  # of float32 and of float64, which hold the same numbers: made in float32
    for dtype in case.dtypes:
        inputs = convert(made, dtype)
        before = map_tensors(inputs, torch.clone)
        result = op.op(**convert(inputs, device=device))
        expected = exact[0] if exact and dtype in EXACT else op.reference(**convert(inputs, case.oracle))
        if dtype in EXACT:
            exact.append(expected)
        wrong = op.mismatch(inputs, result, expected)
        assert wrong is None, f"{dtype}: {wrong}"
        assert_same_bits(inputs, before)


@pytest.fixture
def flush(threads):
    """In this thread, numbers next to 0 are 0."""
    threads(1)
    if not torch.set_flush_denormal(True):
        pytest.skip("a CPU that does not flush")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(("op", "case"), [c for c in CASES if c.values[1].oracle == torch.float32])
def test_flushes_as_the_reference(op, case, flush, simd, generator):
    inputs = case.make(generator)
    expected = op.reference(**inputs)
    for level in SIMD_LEVELS:
        simd(level)
        wrong = op.mismatch(inputs, op.op(**inputs), expected)
        assert wrong is None, f"{level}: {wrong}"


@pytest.mark.parametrize(("op", "case"), CASES)
def test_same_bits_for_every_simd_level_and_thread_count(op, case, simd, threads, generator):
    made = case.make(generator)
    for dtype in case.dtypes:
        inputs = convert(made, dtype)
        expected = op.op(**inputs)
        for level in SIMD_LEVELS:
            for count in (1, 2, 3):
                simd(level)
                threads(count)
                assert_same_bits(op.op(**inputs), expected)


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_any_stride_gives_the_same_bits(op, case, device, generator):
    inputs = convert(case.make(generator), device=device)

    def shifted(t):  # contiguous, but not aligned for vector loads
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)

    expected = op.op(**inputs)
    assert_same_bits(op.op(**map_tensors(inputs, spread)), expected)
    assert_same_bits(op.op(**map_tensors(inputs, shifted)), expected)


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_every_output_is_written(op, case, device, generator):
    made = case.make(generator)
    for dtype in case.dtypes:
        inputs = convert(made, dtype, device)
        expected = op.op(**inputs)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN or the greatest integer
        try:
            assert torch.empty(3).isnan().all()
            assert_same_bits(op.op(**inputs), expected)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_cuda_gives_the_cpu_result(op, case, gpu, generator):
    made = case.make(generator)
    for dtype in case.dtypes:
        inputs = convert(made, dtype)
        assert_same_bits(gpu(op.op, inputs), op.op(**inputs))


@pytest.mark.parametrize("gpu", GPU_PARAMS[:1], indirect=True)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_cuda_gives_the_cpu_result_at_full_size(op, gpu, generator):
    inputs = op.full_size_case.make(generator)
    assert_same_bits(gpu(op.op, inputs), op.op(**inputs))


@pytest.mark.parametrize(("op", "case"), ORDINARY)
def test_one_bad_number(op, case, generator):
    for where, inputs in with_one_bad_number(case.make(generator)):
        wrong = op.mismatch(inputs, op.op(**inputs), op.reference(**convert(inputs, torch.float64)))
        assert wrong is None, f"{where}: {wrong}"


@pytest.mark.parametrize("gpu", GPU_PARAMS[:1], indirect=True)
@pytest.mark.parametrize(("op", "case"), ORDINARY)
def test_cuda_gives_the_cpu_result_of_one_bad_number(op, case, gpu, generator):
    for where, inputs in with_one_bad_number(case.make(generator)):
        assert_same_bits(gpu(op.op, inputs), op.op(**inputs), where)


@pytest.mark.parametrize(("op", "case"), [c for c in ORDINARY if c.values[0].thresholds])
def test_thresholds_decide_to_the_bit(op, case, device, generator):
    made = case.make(generator)
    for dtype in EXACT:
        inputs = convert(made, dtype)
        for name, compared in op.thresholds.items():
            numbers = compared(inputs)
            numbers = numbers[(numbers > 0) & (numbers < 1)].unique()
            assert len(numbers) > 8
            for threshold in at_and_beside(numbers[:: len(numbers) // 8]):
                changed = {**inputs, name: threshold}
                wrong = op.mismatch(changed, op.op(**convert(changed, device=device)), op.reference(**changed))
                assert wrong is None, f"{name}={threshold}, {dtype}: {wrong}"


@pytest.mark.parametrize(("op", "case"), EACH)
def test_what_is_no_plain_tensor_is_named(op, case, generator):
    inputs = case.make(generator)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            parts = {name: (value, lambda wrong, name=name: {name: wrong})}
        elif isinstance(value, GroundTruth):
            parts = {
                f"{name}.{part}": (
                    t,
                    lambda wrong, part=part, given=value: {"ground_truth": given._replace(**{part: wrong})},
                )
                for part, t in value._asdict().items()
            }
        else:
            continue
        for shown, (tensor, change) in parts.items():
            wrong_ones = {
                "ndarray": tensor.numpy(),
                "list": tensor.tolist(),
                "dict": {"tensor": tensor},
                "a nested tensor": torch.nested.nested_tensor([tensor, tensor]),
                "layout torch.sparse_coo": tensor.to_sparse(),
                "a quantized tensor": torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
            }
            for said, wrong in wrong_ones.items():
                with pytest.raises(ValueError, match=rf"{re.escape(shown)} must be a plain tensor, got .*{said}"):
                    op.op(**{**inputs, **change(wrong)})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: ops.decode(x, x, variances=0.1), "decode: variances must be 2 numbers, got 0.1"),
        (lambda x: ops.encode(x, x, variances=("a", "b")), r"encode: variances must be 2 numbers, got \('a', 'b'\)"),
        (lambda x: ops.detect(x[None], x[None], x, window=1.0), "detect: window must be 4 numbers, got 1.0"),
        (lambda x: ops.nms(x, x[:, 0], "0.5"), "nms: iou_threshold must be a number, got '0.5'"),
        (lambda x: ops.nms(x, x[:, 0], None), "nms: iou_threshold must be a number, got None"),
        (lambda x: ops.nms(x, x[:, 0], torch.rand(2)), r"nms: iou_threshold must be a number, got tensor"),
        (lambda x: ops.detect(x[None], x[None], x, topk_per_class=1.5), "topk_per_class must be an integer, got 1.5"),
        (lambda x: ops.encode(x, x, variances=(0.1, "b")), r"variances must be 2 numbers, got \(0.1, 'b'\)"),
        (lambda x: ops.detect(x[None], x[None], x, topk_per_class=2**63), "must be an integer of 64 bits"),
        (lambda x: ops.detect(x[None], x[None], x, topk_per_class=-(2**64)), "must be an integer of 64 bits"),
        (
            lambda x: ops.detect(x[None], x[None], x, class_agnostic="x"),
            "class_agnostic must be True or False, got 'x'",
        ),
    ],
)
def test_what_is_no_number_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(torch.rand(3, 4))


def test_remedies_for_what_is_no_tensor():
    x = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"priors must be a plain tensor, got a PriorSpec \(its priors\(\) are one\)"):
        ops.decode(x, SSD300_VOC)
    for wrong, kind in ((x.tolist(), "list"), (tuple(x.tolist()), "tuple"), (x.numpy(), "ndarray")):
        with pytest.raises(ValueError, match=rf"got {kind} \(torch.as_tensor makes one\)"):
            ops.decode(x, wrong)


def test_arguments_that_may_be_none_are_not_named():
    x, given = torch.rand(3, 4), GroundTruth.from_lists([torch.rand(2, 4).sort().values])
    with pytest.raises(ValueError, match="iou_threshold must be a number, got 'a'"):
        ops.match(given, x, low_threshold=None, min_force_iou=None, iou_threshold="a")
    with pytest.raises(ValueError, match="class_agnostic must be True or False, got 'x'"):
        ops.detect(x[None], x[None], x, window=None, class_agnostic="x")


def test_meta_tensors_are_plain():
    x = torch.rand(3, 4, device="meta")
    number = torch.ones(2, dtype=torch.int64, device="meta")
    assert ops.decode(x, x).shape == (3, 4)
    assert ops.match(GroundTruth(x[:2], number, number), x).shape == (1, 3)


@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.float16, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float16)],
)
def test_mixed_dtypes_have_the_shapes_and_types_that_the_compiler_is_told(first, second):
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6]] * 3, dtype=first, requires_grad=True)
    priors, only = torch.tensor([[0.5, 0.5, 0.3, 0.4]] * 3, dtype=second), ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ssd_ext.encode.default, (boxes, priors, [0.1, 0.2]), test_utils=only)
    torch.library.opcheck(torch.ops.ssd_ext.decode.default, (boxes, priors, [0.1, 0.2], 4.0), test_utils=only)


def test_other_errors_stay_as_they_are():
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        ops.nms(torch.rand(3, 4), torch.rand(3))
    with pytest.raises(RuntimeError, match="no gradient for priors"):
        ops.decode(torch.rand(3, 4), torch.rand(3, 4, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(("op", "error"), ERRORS)
def test_wrong_input_is_refused(op, error):
    with pytest.raises(error.error, match=error.match):
        op.op(**error.make())


@pytest.mark.parametrize(("op", "case", "peer"), PEERS)
def test_agrees_with_peer(op, case, peer, generator):
    inputs = case.make(generator)
    try:
        call = peers_of(op).calls[peer](inputs)
    except (MissingPeerError, ImportError) as e:
        pytest.skip(str(e))
    wrong = op.mismatch(inputs, op.op(**inputs), call())
    assert wrong is None, wrong


@pytest.mark.parametrize(("op", "case"), SMALL)
def test_opcheck(op, case, device, generator):
    # opcheck compares gradients without allowing NaN to equal NaN
    finite = map_tensors(case.make(generator), lambda t: t.nan_to_num(0, 10, -10) if t.is_floating_point() else t)
    inputs = requiring_grad(op, convert(finite, device=device))
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "ssd_ext":
                seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Recorder():
        op.op(**inputs)
    called = [func.name() for func, _, _ in seen]
    assert called == [f"ssd_ext::{op.schema}"], f"{op.name} must call its schema once, and no other op, got {called}"
    ((func, args, kwargs),) = seen
    torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize(("op", "case"), [c for c in SMALL if c.values[0].differentiable and c.values[1].smooth])
def test_gradients_are_finite_differences(op, case, device, generator):
    inputs = convert(case.make(generator), torch.float64, device)
    names = op.differentiable
    leaves = tuple(inputs[name].clone().requires_grad_() for name in names)

    def call(*values):
        return op.op(**{**inputs, **dict(zip(names, values, strict=True))})

    fast = sum(leaf.numel() for leaf in leaves) > 300  # random directions instead of every element
    assert torch.autograd.gradcheck(call, leaves, fast_mode=fast)
    if op.twice_differentiable:
        assert torch.autograd.gradgradcheck(call, leaves)
        return
    first = torch.autograd.grad(sum(t.sum() for t in tensors_in(call(*leaves))), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(t.sum() for t in first).backward()


@pytest.mark.parametrize(("op", "case"), [c for c in EACH if c.values[0].differentiable])
def test_transforms_of_torch_func(op, case, generator):
    inputs = convert(case.make(generator), torch.float64)
    leaves = tuple(inputs[name] for name in op.differentiable)

    def total(*values):
        return sum(
            t.sum() for t in tensors_in(op.op(**{**inputs, **dict(zip(op.differentiable, values, strict=True))}))
        )

    gradient = torch.func.grad(total, argnums=tuple(range(len(leaves))))
    expected = torch.autograd.functional.jacobian(total, leaves)
    assert_same_bits(gradient(*leaves), expected)
    assert_same_bits(torch.func.jacrev(total, argnums=tuple(range(len(leaves))))(*leaves), expected)
    torch._dynamo.reset()
    assert_same_bits(torch.compile(gradient, backend="aot_eager")(*leaves), expected)

    stacked = [torch.stack([t, t * 0.75], -1) for t in leaves]
    each = list(zip(*[t.unbind(-1) for t in stacked], strict=True))
    assert_same_bits(torch.vmap(total, in_dims=-1)(*stacked), torch.stack([total(*one) for one in each]))
    gradients = [torch.stack(g) for g in zip(*[gradient(*one) for one in each], strict=True)]
    assert_same_bits(torch.vmap(gradient, in_dims=-1)(*stacked), gradients)

    with pytest.raises(ValueError, match=r"torch\.vmap over a dimension of size 0"):
        torch.vmap(total, in_dims=-1)(*[t[..., :0] for t in stacked])
    with pytest.raises(RuntimeError, match=r"no derivative in forward mode .*: use jacrev"):
        torch.func.jvp(total, leaves, leaves)
    second = torch.func.jacrev(torch.func.jacrev(total))
    if op.twice_differentiable:
        assert torch.isfinite(second(*leaves)).all()
    else:
        with pytest.raises(RuntimeError, match="no second derivative"):
            second(*leaves)


def test_torch_func_is_told_why_there_is_no_gradient():
    boxes = torch.rand(3, 4)
    with pytest.raises(RuntimeError, match="ssd_ext::box_iou is not differentiable: use a loss"):
        torch.func.grad(lambda b: ops.box_iou(b, boxes).sum())(boxes)


@pytest.mark.parametrize(("op", "case"), EACH)
def test_enters_python_for_autograd_only_where_a_gradient_is_asked_for(op, case, generator):
    def enters(inputs):
        files = set()
        sys.setprofile(lambda frame, *_: files.add(frame.f_code.co_filename))
        try:
            op.op(**inputs)
        finally:
            sys.setprofile(None)
        return any(file.endswith("_library/autograd.py") for file in files)

    inputs = case.make(generator)
    assert not enters(inputs)
    if op.differentiable:
        assert enters(requiring_grad(op, inputs))
        with torch.no_grad():
            assert not enters(requiring_grad(op, inputs))


@pytest.mark.parametrize(("op", "case"), EACH)
def test_compiles_without_graph_break(op, case, generator):
    inputs = case.make(generator)
    torch._dynamo.reset()
    compiled = torch.compile(lambda kwargs: op.op(**kwargs), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(inputs), op.op(**inputs))


@pytest.mark.parametrize(("op", "case"), EACH)
def test_exports(op, case, generator):
    inputs = case.make(generator)

    class Module(torch.nn.Module):
        def forward(self, kwargs):
            return op.op(**kwargs)

    program = torch.export.export(Module(), (inputs,))
    result = op.op(**inputs)
    assert_same_bits(program.module()(inputs), result)
    (output,) = program.graph.find_nodes(op="output")
    promised = [node.meta["val"] for node in output.all_input_nodes]
    assert [(t.dtype, t.dim()) for t in promised] == [(t.dtype, t.dim()) for t in tensors_in(result)]


@pytest.mark.parametrize(("op", "case"), EACH)
def test_autocast_computes_in_float32(op, case, device, generator):
    made = convert(case.make(generator), device=device)
    inputs = convert(made, torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = op.op(**inputs)
    assert_same_bits(result, op.op(**convert(inputs, torch.float32)))
    mixed = dict(inputs)
    first = next(k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point())
    mixed[first] = inputs[first].float()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_bits(op.op(**mixed), result)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and a CUDA build")
@pytest.mark.parametrize(("op", "case"), [c for c in CASES if c.values[0].capturable])
def test_captures_in_a_cuda_graph_without_host_sync(op, case, generator):
    inputs = convert(case.make(generator), device="cuda")
    expected = op.op(**inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.op(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.op(**inputs)
    for t in tensors_in(captured):
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, expected)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and a CUDA build")
@pytest.mark.parametrize(("op", "case"), EACH)
def test_mixed_devices_are_refused(op, case, generator):
    inputs = case.make(generator)
    last = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)][-1]
    inputs[last] = inputs[last].cuda()
    with pytest.raises(ValueError, match="must be on the device of"):
        op.op(**inputs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaling": None}, "decode: needs full_size or scaling"),
        ({"schema": "decoed"}, "schema is the name of a torch.ops.ssd_ext op, and 'decoed' is none"),
        ({"cases": [OPS[0].cases[0]] * 2}, "two cases are named"),
        ({"errors": [OPS[0].errors[0]] * 2}, "two errors are named 'not boxes'"),
        ({"differentiable": ("deltas", "anchors")}, "differentiable names anchors, which the op does not have"),
        ({"thresholds": {"threshold": None}}, "thresholds names threshold, which the op does not have"),
    ],
)
def test_a_description_says_what_it_lacks(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(DECODE, **changes)


def test_a_description_says_which_input_it_lacks(generator):
    small = dataclasses.replace(DECODE, full_size=DECODE.small_case.make)
    with pytest.raises(ValueError, match="full_size of decode must have a dimension of 8732 or more, got "):
        small.full_size_case.make(generator)
    with pytest.raises(ValueError, match="decode: needs a small case in float32"):
        _ = dataclasses.replace(DECODE, cases=[]).small_case


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_first_two_cases_are_of_two_sizes_and_leave_lanes_idle(op, generator):
    sizes = {max(n for t in tensors_in(case.make(generator)) for n in t.shape) for case in op.cases[:2]}
    assert len(sizes) == 2
    assert any(n > 32 and n % 8 for n in sizes)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_full_size_is_that_of_a_detector(op, generator):
    op.full_size_case.make(generator)  # or raises


def test_descriptions_cover_every_op():
    import ssd_ext

    described = {op.name for op in OPS}
    assert described == set(ssd_ext.ops.__all__) - {"unpad"}  # which is a loop in Python
    assert described <= set(ssd_ext.reference.__all__)
    for op in OPS:
        assert op.op.__doc__
        for word in ("Args:", "Returns:", "Raises:", "Source:"):
            assert word in op.op.__doc__, f"{op.name} docstring lacks {word}"
