"""multibox_loss and MultiBoxLoss beyond what the generic suite asks of every op."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import DEVICES, EMULATED, SIMD_LEVELS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_detect import memory_peak
from test_ops import assert_same_bits

from opinfo.inputs import ssd300_priors, synthetic_gts
from opinfo.multibox_loss import MULTIBOX_LOSS
from opinfo.spec import FLOATS, HALVES, close, convert
from ssd_ext import _C, GroundTruth, MultiBoxLoss, ops, priors, reference

CASES = [pytest.param(case, id=case.name) for case in MULTIBOX_LOSS.cases if not case.benchmark]


def gradients(op, weights=(1.0, 1.0), **inputs):
    """Of weights[0] * loc + weights[1] * conf, in deltas and logits."""
    leaves = [inputs[name].detach().clone().requires_grad_() for name in ("deltas", "logits")]
    loc, conf = op(**{**inputs, "deltas": leaves[0], "logits": leaves[1]})
    return torch.autograd.grad(weights[0] * loc + weights[1] * conf, leaves, allow_unused=True)


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_float64_reference(case, device, generator):
    made = case.make(generator)
    count = max(1, int((made["target_labels"] > 0).sum()))  # undoes the division, so that rows have gradients about 1
    for dtype in FLOATS:
        inputs = convert(made, dtype)
        found = gradients(ops.multibox_loss, (count, -0.5 * count), **convert(inputs, device=device))
        expected = gradients(reference.multibox_loss, (count, -0.5 * count), **convert(inputs, torch.float64))
        for name, f, e in zip(("deltas", "logits"), found, expected, strict=True):
            assert f.dtype == dtype
            assert f.shape == e.shape
            # A tie of exact losses that rounding parts, or the other way round, may go to another row; the sum
            # of the losses does not tell, and the cases named so are looked at by test_selects_as_hard_negatives.
            if name == "logits" and "ties" in case.name:
                continue
            wrong = close(f, e, {torch.float32: 2e-5, torch.float64: 1e-11, torch.float16: 2e-3, torch.bfloat16: 1e-2})
            assert wrong is None, f"{dtype}, {name}: {wrong}"


@pytest.mark.parametrize("case", CASES)
def test_gradients_have_the_same_bits_for_every_simd_level_and_thread_count(case, simd, threads, generator):
    made = case.make(generator)
    for dtype in FLOATS:
        inputs = convert(made, dtype)
        expected = gradients(ops.multibox_loss, **inputs)
        for level in SIMD_LEVELS:
            for count in (1, 3):
                simd(level)
                threads(count)
                assert_same_bits(gradients(ops.multibox_loss, **inputs), expected)


@pytest.mark.parametrize("case", CASES)
def test_cuda_gives_the_cpu_gradients(case, gpu, generator):
    made = case.make(generator)
    for dtype in FLOATS:
        inputs = convert(made, dtype)
        found = gpu(partial(gradients, ops.multibox_loss), inputs)
        assert_same_bits(found, gradients(ops.multibox_loss, **inputs))


def random_images(batch, priors, classes, generator):
    return {
        "deltas": torch.randn(batch, priors, 4, generator=generator),
        "logits": torch.randn(batch, priors, classes, generator=generator),
        "target_deltas": torch.randn(batch, priors, 4, generator=generator),
        "target_labels": (torch.rand(batch, priors, generator=generator) < 0.01).long(),
    }


def test_more_priors_than_a_gpu_block_has_registers_for(gpu, generator):
    inputs = random_images(2, 10_300, 2, generator)
    inputs["target_labels"][0, :10_240] = 0  # none of the first batch of priors is kept
    inputs["logits"][0, :10_240, 0] += 100
    found = gpu(partial(gradients, ops.multibox_loss), inputs)
    assert_same_bits(found, gradients(ops.multibox_loss, **inputs))


def test_gradient_refuses_what_no_forward_saved():
    ranks, divisors = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="ranks must be int32, got int64"):
        torch.ops.ssd_ext.multibox_loss_logits_gradient(
            torch.ones(()), torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), ranks, divisors
        )


def test_gradient_of_a_label_that_is_no_class_is_nan():
    labels, ranks, divisors = torch.tensor([[3, 1]]), torch.zeros(1, 2, dtype=torch.int32), torch.ones(1).long()
    gradient = torch.ops.ssd_ext.multibox_loss_logits_gradient(
        torch.ones(()), torch.zeros(1, 2, 3), labels, ranks, divisors
    )
    assert gradient.isnan().tolist() == [[[True] * 3, [False] * 3]]


def test_more_priors_than_the_gradient_counts_are_refused(gpu):
    def call(grad_loc, deltas, labels, divisors):
        deltas, labels = deltas.expand(1, 2**32, 4), labels.expand(1, 2**32)
        torch.ops.ssd_ext.multibox_loss_deltas_gradient(grad_loc, deltas, deltas, labels, divisors, 1.0, 1.0)

    one = torch.ones(1, 1, dtype=torch.int64)
    inputs = {"grad_loc": torch.zeros(()), "deltas": torch.zeros(1, 1, 4), "labels": one, "divisors": one[0]}
    with pytest.raises(ValueError, match=r"4294967295 priors on CUDA, got \[1, 4294967296\]"):
        gpu(call, inputs)


@pytest.mark.skipif(bool(EMULATED), reason="takes minutes in the emulator: a thousand threads for each image")
def test_more_images_than_a_gpu_grid_is_high(gpu, generator):
    inputs = random_images(65_540, 1, 2, generator)
    found = gpu(partial(gradients, ops.multibox_loss), inputs)
    assert_same_bits(found, gradients(ops.multibox_loss, **inputs))


def selected(logits, labels, device="cpu", **arguments):
    """``[B, P]``: whose logits have a gradient."""
    zeros = torch.zeros(*labels.shape, 4, dtype=logits.dtype)
    inputs = {"deltas": zeros, "logits": logits, "target_deltas": zeros, "target_labels": labels}
    _, gradient = gradients(ops.multibox_loss, **convert(inputs, device=device), **arguments)
    return (gradient != 0).any(-1).cpu()


@pytest.mark.parametrize("spread", [1, 10, 100])
@pytest.mark.parametrize("min_negatives", [0, 37, 150, 299])
def test_selects_as_hard_negatives(spread, min_negatives, device, generator):
    """The exact losses, in float64, part all rows here by more than float32 rounds away."""
    logits = torch.randn(3, 300, 21, generator=generator) * spread
    labels = torch.where(torch.rand(3, 300, generator=generator) < 0.05, 4, 0)
    losses = -logits.double().log_softmax(-1)[..., 0]
    mask = reference.hard_negatives(losses, labels, min_negatives=min_negatives)
    found = selected(logits, labels, device, min_negatives=min_negatives)
    # a loss below what float32 holds has no gradient either
    told = losses > 1e-30
    assert torch.equal(found & told, (mask | (labels > 0)) & told)


def test_lowest_prior_wins_a_tie(device):
    logits = torch.zeros(1, 50, 5)
    logits[0, 20, 3] = 1
    labels = torch.zeros(1, 50, dtype=torch.int64)
    for wanted, expected in [(1, [20]), (3, [0, 1, 20]), (49, list(range(49)))]:
        assert selected(logits, labels, device, min_negatives=wanted)[0].nonzero().flatten().tolist() == expected


def test_losses_that_round_to_zero_are_told_apart(device):
    logits = torch.zeros(1, 40, 3)
    logits[..., 0] = 40.0 - torch.arange(40) % 7  # every loss is below 1e-14, and log(1 + it) is 0 in float32
    labels = torch.zeros(1, 40, dtype=torch.int64)
    kept = selected(logits, labels, device, min_negatives=7)[0].nonzero().flatten().tolist()
    assert kept == [5, 6, 12, 13, 20, 27, 34]


VALUES = [0.0, -0.0, 1.0, 2.5, -3.0, 44.3, 60.0, -90.0, 88.7, 130.0, 5000.0, -1e30, 3e38, math.inf, -math.inf, math.nan]


@st.composite
def images(draw):
    batch, n, classes = draw(st.integers(1, 2)), draw(st.integers(1, 24)), draw(st.integers(1, 20))
    count = batch * n
    logits = draw(st.lists(st.sampled_from(VALUES), min_size=count * classes, max_size=count * classes))
    labels = draw(st.lists(st.integers(-2, classes - 1), min_size=count, max_size=count))
    rows = torch.tensor(draw(st.lists(st.sampled_from(VALUES), min_size=4 * count, max_size=4 * count)))
    return {
        "deltas": rows.view(batch, n, 4),
        "logits": torch.tensor(logits).view(batch, n, classes),
        "target_deltas": torch.zeros(batch, n, 4),
        "target_labels": torch.tensor(labels).view(batch, n),
        "neg_to_pos_ratio": draw(st.sampled_from([0.0, 0.5, 3.0])),
        "min_negatives": draw(st.sampled_from([0, 2, 20])),
        "normalize": draw(st.sampled_from(["batch", "image"])),
    }


def test_a_sum_beyond_float32_is_infinite(device):
    rows = torch.full((1, 1, 4), 3e38, device=device)
    labels = torch.ones(1, 1, dtype=torch.int64, device=device)
    loc, conf = ops.multibox_loss(rows, torch.zeros(1, 1, 2, device=device), -rows, labels)
    assert loc.item() == math.inf
    assert conf.item() == pytest.approx(math.log(2))


@settings(deadline=None, max_examples=300)
@given(images())
def test_hostile_numbers(inputs):
    """Of one mind with float64, NaN for NaN and infinity for infinity."""
    results = ops.multibox_loss(**inputs)
    expected = reference.multibox_loss(**convert(inputs, torch.float64))
    wrong = close(results, expected, {torch.float32: 1e-5})
    assert wrong is None, wrong
    gradients(ops.multibox_loss, **inputs)


def test_by_hand(device):
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 0.0]]], device=device)
    labels = torch.tensor([[0, 1, 0, -1]], device=device)
    deltas = torch.tensor([[[9.0] * 4, [0.5, -2.0, 0.0, 1.0], [9.0] * 4, [9.0] * 4]], device=device)
    loc, conf = ops.multibox_loss(deltas, logits, torch.zeros_like(deltas), labels, neg_to_pos_ratio=1.0, alpha=2.0)
    assert loc.item() == pytest.approx(2 * (0.125 + 1.5 + 0 + 0.5))
    positive = math.log(1 + 2 * math.exp(-1))
    mined = math.log(2 + math.exp(3))  # prior 2: the other negative is easier, prior 3 ignored
    assert conf.item() == pytest.approx(positive + mined)


@pytest.mark.parametrize("normalize", ["batch", "image"])
def test_dividing(normalize, device):
    """Two images of 1 and 3 positives whose priors are all alike."""
    logits = torch.zeros(2, 8, 2, device=device)
    labels = torch.tensor([[1] + [0] * 7, [1] * 3 + [0] * 5], device=device)
    deltas = torch.ones(2, 8, 4, device=device)
    loc, conf = ops.multibox_loss(
        deltas, logits, torch.zeros_like(deltas), labels, neg_to_pos_ratio=1.0, normalize=normalize
    )
    assert loc.item() == pytest.approx(2.0)
    assert conf.item() == pytest.approx(2 * math.log(2))
    labels[0] = 0  # nothing counts in an image without positives, unless min_negatives says so
    loc, conf = ops.multibox_loss(
        deltas, logits, torch.zeros_like(deltas), labels, neg_to_pos_ratio=0.0, min_negatives=2, normalize=normalize
    )
    assert loc.item() == pytest.approx(2.0 if normalize == "batch" else 1.0)
    terms = 7 / 3 if normalize == "batch" else (2 / 2 + 5 / 3) / 2
    assert conf.item() == pytest.approx(terms * math.log(2))


def test_priors_that_are_no_tensor_are_named():
    gt = [{"boxes": torch.rand(1, 4).sort().values, "labels": torch.ones(1).long()}]
    with pytest.raises(
        ValueError, match=r"MultiBoxLoss: priors must be a plain tensor, got a PriorSpec \(its priors\(\)"
    ):
        MultiBoxLoss(priors.SSD300_COCO)
    with pytest.raises(ValueError, match="MultiBoxLoss: priors must be a plain tensor, got list"):
        MultiBoxLoss()(torch.zeros(1, 1, 4), torch.zeros(1, 1, 2), gt, [[0.5, 0.5, 1, 1]])
    whole = [{"boxes": torch.tensor([[0, 0, 1, 1]]), "labels": torch.ones(1).long()}]
    for numbers in (torch.tensor([[1, 1, 2, 2]]), torch.rand(1, 4)):
        with pytest.raises(ValueError, match=r"ground_truth.boxes must be float32.*, got int64"):
            MultiBoxLoss(numbers)(torch.zeros(1, 1, 4), torch.zeros(1, 1, 2), whole)


@pytest.mark.parametrize("normalize", ["batch", "image"])
@pytest.mark.parametrize("min_negatives", [1, 40, 89])
def test_an_image_without_objects_weighs_no_more_than_one_with(normalize, min_negatives, device):
    settings = {"min_negatives": min_negatives, "normalize": normalize}
    deltas = torch.zeros(2, 100, 4, device=device)
    labels = torch.zeros(2, 100, dtype=torch.int64, device=device)
    labels[0, :10] = 1
    logits = torch.zeros(2, 100, 2, device=device, requires_grad=True)
    _, conf = ops.multibox_loss(deltas, logits, deltas, labels, **settings)
    with_objects, without = torch.autograd.grad(conf, logits)[0].abs().sum((1, 2)).tolist()
    assert 0 < without <= with_objects
    _, conf = ops.multibox_loss(deltas, logits, deltas, torch.zeros_like(labels), **settings)
    assert conf.item() == pytest.approx(math.log(2))  # the mean of all that count


def test_without_objects_the_loss_is_zero_and_differentiable(device):
    inputs = convert(
        next(c for c in MULTIBOX_LOSS.cases if c.name == "no positive").make(torch.Generator()), device=device
    )
    assert [x.item() for x in ops.multibox_loss(**inputs)] == [0, 0]
    assert not any(g.any() for g in gradients(ops.multibox_loss, **inputs))


def test_dtypes_may_differ(device, generator):
    inputs = MULTIBOX_LOSS.cases[0].make(generator)
    mixed = {**inputs, "logits": inputs["logits"].bfloat16(), "deltas": inputs["deltas"].double()}
    loc, conf = ops.multibox_loss(**convert(mixed, device=device))
    assert (loc.dtype, conf.dtype) == (torch.float64, torch.float32)
    assert close((loc, conf), reference.multibox_loss(**convert(mixed, torch.float64)), MULTIBOX_LOSS.tolerance) is None
    found = gradients(ops.multibox_loss, **mixed)
    assert [g.dtype for g in found] == [torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
def test_module_in_half_keeps_its_priors(dtype, generator):
    priors = torch.rand(40, 4, generator=generator) + 0.1
    deltas, logits = (torch.randn(2, 40, n, generator=generator).to(dtype) for n in (4, 3))
    exact, half = MultiBoxLoss(priors), MultiBoxLoss(priors).to(dtype)
    assert torch.equal(half.priors, priors)
    objects = [{"boxes": torch.tensor([[0.2, 0.1, 0.7, 0.9]]), "labels": torch.tensor([1])}] * 2
    for boxes in (objects[0]["boxes"], objects[0]["boxes"].to(dtype)):  # which may be of any dtype
        losses = half(deltas, logits, [{**target, "boxes": boxes} for target in objects])
        wanted = exact(deltas.float(), logits.float(), [{**target, "boxes": boxes.float()} for target in objects])
        assert [x.item() for x in losses] == [x.item() for x in wanted]


def test_gradient_has_the_layout_of_the_logits(generator):
    inputs = next(c for c in MULTIBOX_LOSS.cases if c.name == "class-major").make(generator)
    _, gradient = gradients(ops.multibox_loss, **inputs)
    assert gradient.stride() == inputs["logits"].stride()
    _, expected = gradients(ops.multibox_loss, **{k: v.contiguous() for k, v in inputs.items()})
    assert_same_bits(gradient, expected)


def test_one_of_two_losses(device, generator):
    inputs = MULTIBOX_LOSS.cases[0].make(generator)
    deltas, logits = (inputs[name].to(device).requires_grad_() for name in ("deltas", "logits"))
    loc, conf = ops.multibox_loss(
        deltas, logits, inputs["target_deltas"].to(device), inputs["target_labels"].to(device)
    )
    loc.backward(retain_graph=True)
    assert deltas.grad.any()
    assert logits.grad is None or not logits.grad.any()
    conf.backward()
    assert logits.grad.any()


def test_targets_are_constants(generator):
    inputs = MULTIBOX_LOSS.cases[0].make(generator)
    inputs["target_deltas"].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient for target_deltas"):
        sum(ops.multibox_loss(**inputs)).backward()


def test_a_label_that_is_no_class_shows_on_a_gpu(gpu, generator):
    inputs = MULTIBOX_LOSS.cases[0].make(generator)
    inputs["target_labels"][-1, -1] = inputs["logits"].size(2)  # the next logit is out of bounds
    loc, conf = gpu(ops.multibox_loss, inputs)
    assert torch.isfinite(loc)
    assert torch.isnan(conf)
    _, gradient = gpu(partial(gradients, ops.multibox_loss), inputs)
    assert gradient[-1, -1].isnan().all()
    gradient[-1, -1] = 0
    assert torch.isfinite(gradient).all()


# ---- MultiBoxLoss -------------------------------------------------------------------------------


def objects(generator):
    boxes, labels = synthetic_gts(4, generator)
    boxes[2], labels[2] = boxes[2][:0], labels[2][:0]  # an image without objects
    return boxes, labels


@pytest.mark.parametrize("normalize", ["batch", "image"])
def test_module_from_raw_ground_truth(normalize, device, generator):
    boxes, labels = objects(generator)
    priors = ssd300_priors()[::40].contiguous()
    deltas, logits = (
        torch.randn(4, len(priors), 4, generator=generator),
        torch.randn(4, len(priors), 81, generator=generator),
    )
    module = MultiBoxLoss(priors, force="last", alpha=0.5, normalize=normalize, validate=True).to(device)
    assert not module.state_dict()
    assert "force='last'" in repr(module)
    on = partial(convert, device=device)
    ground_truth = GroundTruth.from_lists(boxes, labels)
    losses = module(on(deltas), on(logits), on(ground_truth))
    targets = reference.assign_targets(ground_truth, priors, force="last")
    expected = reference.multibox_loss(
        *convert([deltas, logits, *targets], torch.float64), alpha=0.5, normalize=normalize
    )
    assert close(losses, expected, {torch.float32: 1e-5}) is None
    per_call = MultiBoxLoss(force="last", alpha=0.5, normalize=normalize)
    dicts = [{"boxes": on(b), "labels": on(k)} for b, k in zip(boxes, labels, strict=True)]
    assert_same_bits(per_call(on(deltas), on(logits), dicts, on(priors)), losses)


def test_module_trains_on_images_without_objects(device):
    priors = ssd300_priors()[::100].contiguous().to(device)
    deltas = torch.zeros(2, len(priors), 4, device=device, requires_grad=True)
    logits = torch.zeros(2, len(priors), 3, device=device, requires_grad=True)
    nothing = GroundTruth.from_lists([torch.empty(0, 4, device=device)] * 2)
    sum(MultiBoxLoss(priors)(deltas, logits, nothing)).backward()
    assert not logits.grad.any()
    sum(MultiBoxLoss(priors, min_negatives=5)(deltas, logits, nothing)).backward()
    assert logits.grad.any(-1).sum(1).tolist() == [5, 5]
    assert not deltas.grad.any()


def test_module_takes_priors_once():
    priors = torch.rand(3, 4)
    heads = torch.zeros(1, 3, 4), torch.zeros(1, 3, 2), GroundTruth.from_lists([torch.empty(0, 4)])
    for module, more in [(MultiBoxLoss(), ()), (MultiBoxLoss(priors), (priors,))]:
        with pytest.raises(ValueError, match="priors must be given"):
            module(*heads, *more)


def test_module_validates_labels():
    heads = torch.zeros(1, 1, 4), torch.zeros(1, 1, 3)
    one = GroundTruth.from_lists([torch.tensor([[0.1, 0.1, 0.5, 0.5]])], [torch.tensor([3])])
    with pytest.raises(ValueError, match=r"label must be in 1\.\.2"):
        MultiBoxLoss(torch.tensor([[0.3, 0.3, 0.4, 0.4]]), validate=True)(*heads, one)


def test_a_large_gradient_has_the_layout_of_its_logits():
    inputs = MULTIBOX_LOSS.scaling(4)
    for logits in (inputs["logits"].transpose(1, 2).contiguous().transpose(1, 2), inputs["logits"][:, :, ::2]):
        case = {**inputs, "logits": logits, "target_labels": inputs["target_labels"].clamp(max=logits.shape[2] - 1)}
        found = gradients(ops.multibox_loss, **case)[1]
        assert found.stride() == torch.empty_like(logits).stride()
        assert torch.equal(found, gradients(ops.multibox_loss, **{**case, "logits": logits.contiguous()})[1])


def mapping_flags(address):
    """Linux's flags of the mapping that holds this address."""
    held = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            held = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif held and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:x}")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with huge pages")
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_a_large_gradient_may_have_huge_pages(layout):
    inputs = MULTIBOX_LOSS.scaling(32)
    if layout == "strided":
        inputs["logits"] = inputs["logits"].transpose(1, 2).contiguous().transpose(1, 2)
    _, found = gradients(ops.multibox_loss, **inputs)
    begin, huge = found.data_ptr(), 2 << 20
    first = -(-begin // huge) * huge
    last = (begin + found.nbytes) // huge * huge - 1
    assert "hg" in mapping_flags(first)
    assert "hg" in mapping_flags(last)
    assert begin == first or "hg" not in mapping_flags(begin), "what is beside it keeps its pages"


SHORT_OF_MEMORY = """
import resource, torch
from pathlib import Path
from ssd_ext import ops

torch.set_num_threads(2)
inputs = {
    "deltas": torch.zeros(2, 1_000_000, 4),
    "logits": torch.ones(2, 1_000_000, 3, requires_grad=True),
    "target_deltas": torch.zeros(2, 1_000_000, 4),
    "target_labels": (torch.arange(2_000_000).view(2, -1) % 1000 == 0).long(),
}

def leave(mebibytes):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (mebibytes << 20), -1))

ops.multibox_loss(**inputs)
leave(12)  # ranks take 8, the lists of an image 24
try:
    ops.multibox_loss(**inputs)
except MemoryError:
    leave(1000)
    print(sum(ops.multibox_loss(**inputs)).item())
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists() or "sanitizers" in _C.build_info(), reason="needs Linux and its malloc"
)
def test_memory_that_runs_out_in_a_thread_is_an_error(python):
    # With a threshold of its own, malloc() maps large blocks one by one, and gives them back.
    done = python("-c", SHORT_OF_MEMORY, MALLOC_MMAP_THRESHOLD_="1000000")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.skipif("sanitizers" in _C.build_info(), reason="a sanitizer keeps freed memory")
def test_memory_is_bounded(threads):
    inputs = MULTIBOX_LOSS.scaling(32)
    threads(2)
    ops.multibox_loss(**inputs)
    assert memory_peak(lambda: ops.multibox_loss(**inputs)) < 2e6
    leaves = [inputs[name].requires_grad_() for name in ("deltas", "logits")]
    made = []
    peak = memory_peak(lambda: made.extend(torch.autograd.grad(sum(ops.multibox_loss(**inputs)), leaves)))
    assert peak < sum(t.nbytes for t in made) + 2e6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), scale=st.sampled_from([1.0, 30.0, 3000.0]), double=st.booleans(), k=st.integers(0, 40)
)
def test_mines_the_greatest_ranks_whatever_the_logits(seed, scale, double, k):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 40, 5, generator=g) * 3
    logits += (torch.rand(1, 40, 1, generator=g) < 0.3) * torch.randn(1, 40, 1, generator=g) * scale
    logits[..., 0] += (torch.rand(1, 40, generator=g) < 0.3) * torch.randn(1, 40, generator=g) * scale
    logits = logits.double() if double else logits
    nothing = torch.zeros(1, 40, 4)
    labels = torch.zeros(1, 40, dtype=torch.int64)

    def ranks(wanted):
        return torch.ops.ssd_ext.multibox_loss(nothing, logits, nothing, labels, 0.0, wanted, 1.0, 1.0, False)[2][0]

    every = ranks(40)
    mined = ranks(k)
    least = torch.iinfo(every.dtype).min
    best = every.sort(descending=True, stable=True).indices[:k]
    expected = torch.full_like(every, least).scatter(0, best, every[best])
    assert torch.equal(mined, expected)


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and a CUDA build")
def test_forward_and_backward_in_a_cuda_graph(generator):
    made = MULTIBOX_LOSS.cases[0].make(generator)
    inputs = convert(made, device="cuda")
    expected = gradients(ops.multibox_loss, **inputs)
    leaves = [inputs[name].requires_grad_() for name in ("deltas", "logits")]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(sum(ops.multibox_loss(**inputs)), leaves)
    for t in captured:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, expected)


def test_settings_are_checked_when_they_are_given():
    with pytest.raises(ValueError, match="normalize must be 'batch' or 'image', got 'mean'"):
        MultiBoxLoss(normalize="mean")


def test_logits_of_one_image_are_refused_with_validation_too():
    with pytest.raises(ValueError, match=r"logits must be \[B, P, C\], got \[4, 3\]"):
        MultiBoxLoss(torch.rand(4, 4), validate=True)(
            torch.zeros(1, 4, 4), torch.zeros(4, 3), GroundTruth.from_lists([torch.zeros(0, 4)])
        )
