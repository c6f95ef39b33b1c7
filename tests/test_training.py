"""Training: the same run twice, through interruptions, in several processes."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_cases import small_with_neck
from torch import nn
from torchvision import tv_tensors

from ssd_ext import GroundTruth, checkpoint
from ssd_ext.data import load_dataset
from ssd_ext.inference import load_detector
from ssd_ext.models import SSD, ssdlite320_mobilenet_v2
from ssd_ext.priors import PriorSpec
from ssd_ext.training import Batches, NonFiniteLossError, Recipe, Run, fit, train_step

SAMPLE = Path(__file__).resolve().parent.parent / "samples" / "playing_cards"
SHORT = Recipe(epochs=2, batch_size=4, lr=0.01, warmup=2, workers=0, save_every=2, seed=3)


class Small(nn.Module):
    """Two maps, without batch normalisation, whose statistics would know of the ranks."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 8, 5, 8, 2), nn.ReLU(), nn.Dropout(dropout))
        self.high = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())

    def forward(self, x):
        low = self.low(x)
        return [low, self.high(low)]


def small_model(classes=7, dropout=0.0):
    torch.manual_seed(0)
    return SSD(Small(dropout), PriorSpec((64, 64), ((8, 8), (4, 4)), (0.2, 0.5, 0.9), ((2,), (2,))), classes)


@pytest.fixture(scope="module")
def cards():
    return load_dataset(SAMPLE, "train")


def weights_of(run):
    return {name: value.clone() for name, value in run.trained.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- what a step sees ----------------------------------------------------------------------------


def test_every_image_is_seen_once_an_epoch():
    batches = list(Batches(12, Recipe(epochs=3, batch_size=4)))
    assert len(batches) == 9
    epochs = [[index for batch in batches[e : e + 3] for index, _ in batch] for e in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len({seed for batch in batches for _, seed in batch}) == 36


@pytest.mark.parametrize("images", [1, 3, 5, 9])
def test_the_last_batch_of_an_epoch_is_filled_up(images):
    batches = list(Batches(images, Recipe(epochs=2, batch_size=4)))
    assert {len(batch) for batch in batches} == {4}
    half = [index for batch in batches[: len(batches) // 2] for index, _ in batch]
    assert set(half) == set(range(images))


def test_ranks_share_the_batch_of_one_process():
    recipe = Recipe(epochs=2, batch_size=6)
    parts = [list(Batches(10, recipe, 1, rank, 3)) for rank in range(3)]
    joined = [[*a, *b, *c] for a, b, c in zip(*parts, strict=True)]
    assert joined == list(Batches(10, recipe, 1))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 4 ranks, got 6"):
        Batches(10, recipe, ranks=4)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("cosine", {10: 1.0, 55: 0.5, 99: 0.0003}), ("step", {10: 1.0, 68: 0.1, 84: 0.01})]
)
def test_schedule(schedule, expected):
    recipe = Recipe(schedule=schedule, warmup=10)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert all(rates[i] < rates[i + 1] for i in range(10))
    assert 0.001 < rates[0] < 0.1
    for step, rate in expected.items():
        assert rates[step] == pytest.approx(rate, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be a positive number, got -1"),
        ({"lr": math.nan}, "lr must be a positive number, got nan"),
        ({"schedule": "linear"}, "schedule must be one of cosine, step, got 'linear'"),
        ({"optimizer": "lamb"}, "optimizer must be one of sgd, adamw, got 'lamb'"),
        ({"amp": "int8"}, "amp must be one of none, bfloat16, float16, got 'int8'"),
        ({"ema": 1.0}, "ema must be between 0 and 1, got 1.0"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be a positive number, got 0.0"),
        ({"flip": 1.5}, "flip must be a probability, 0 to 1, got 1.5"),
        ({"workers": -1}, "workers must be a finite number >= 0, got -1"),
    ],
)
def test_wrong_recipe(given, text):
    with pytest.raises(ValueError, match=text):
        Recipe(**given)


# ---- the same run --------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{}, {"workers": 2}], ids=["twice", "with workers"])
def test_seeds_give_the_same_run(cards, tmp_path, changed):
    first = fit(small_model(), cards, SHORT, tmp_path / "a")
    second = fit(small_model(), cards, Recipe(**{**vars(SHORT), **changed}), tmp_path / "b")
    assert_same(weights_of(first), weights_of(second))
    other = fit(small_model(), cards, Recipe(**{**vars(SHORT), "seed": 4}), tmp_path / "c")
    assert not torch.equal(first.model.backbone.low[0].weight, other.model.backbone.low[0].weight)


@pytest.mark.parametrize("stop_at", [2, 3, 4])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_resumed_exactly(cards, tmp_path, stop_at, ema):
    recipe = Recipe(**{**vars(SHORT), "ema": ema})
    whole = fit(small_model(dropout=0.3), cards, recipe, tmp_path / "whole")
    fit(small_model(dropout=0.3), cards, recipe, tmp_path / "parts", stop_at=stop_at)
    model = small_model(dropout=0.3)
    for p in model.parameters():
        nn.init.zeros_(p)
    parts = fit(model, cards, recipe, tmp_path / "parts", resume=True)
    assert parts.step == whole.step == 6
    assert_same(weights_of(whole), weights_of(parts))
    assert_same(whole.model.state_dict(), parts.model.state_dict())
    for one, two in zip(whole.history, parts.history, strict=True):
        assert {**one, "images_per_second": 0} == {**two, "images_per_second": 0}


def test_a_run_is_not_overwritten_or_mixed_up(cards, tmp_path):
    fit(small_model(), cards, SHORT, tmp_path, stop_at=2)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run already"):
        fit(small_model(), cards, SHORT, tmp_path)
    with pytest.raises(ValueError, match=r"its lr is 0\.01, this run's 0\.5"):
        fit(small_model(), cards, Recipe(**{**vars(SHORT), "lr": 0.5}), tmp_path, resume=True)
    other = small_model()
    other.image_size = (96, 96)
    with pytest.raises(ValueError, match="its architecture is"):
        fit(other, cards, SHORT, tmp_path, resume=True)
    with pytest.raises(ValueError, match="its number of images is 12, this run's 6"):
        fit(small_model(), load_dataset(SAMPLE, "test"), SHORT, tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before
    fit(small_model(), cards, Recipe(**{**vars(SHORT), "save_every": 7}), tmp_path, resume=True)


def test_wrong_data(cards, tmp_path):
    with pytest.raises(ValueError, match=r"it has 5, the data 6 \(ace, "):
        fit(small_model(5), cards, SHORT, tmp_path)
    with pytest.raises(ValueError, match="data sets must be without a transform"):
        fit(small_model(), load_dataset(SAMPLE, "train", transform=lambda *item: item), SHORT, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_detector_of_ones_own_is_loaded_into_one(cards, tmp_path):
    run = fit(small_model(), cards, SHORT, tmp_path)
    with pytest.raises(ValueError, match="holds a detector with a backbone, neck or head of its own"):
        load_detector(tmp_path / "last.pt")
    loaded, classes = load_detector(tmp_path / "last.pt", model=small_model())
    assert classes == cards.classes
    assert_same(loaded.state_dict(), weights_of(run))


@pytest.mark.parametrize(
    ("make", "count", "beyond"),
    [(lambda: ssdlite320_mobilenet_v2(7, image_size=(96, 96)), 5, 20), (lambda: small_with_neck(num_classes=7), 2, 4)],
    ids=["ssdlite", "with a neck"],
)
def test_frozen_features_stay_as_they_are(cards, tmp_path, make, count, beyond):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = fit(model, cards, Recipe(**{**vars(SHORT), "epochs": 1, "freeze": count}), tmp_path)
    for name, value in run.model.state_dict().items():
        frozen = any(name.startswith(f"backbone.features.{i}.") for i in range(count))
        moved = not torch.equal(value, before[name])
        assert not (frozen and moved), name
        assert frozen or moved or "weight" not in name, name
    text = f"freeze must be at most {beyond - 1}, the features of this backbone, got {beyond}"
    with pytest.raises(ValueError, match=text):
        fit(model, cards, Recipe(freeze=beyond), tmp_path / "more")


def test_nothing_to_freeze_without_features(cards, tmp_path):
    with pytest.raises(ValueError, match=r"freeze must be 0 for a backbone without features .*, got 1"):
        fit(small_model(), cards, Recipe(freeze=1), tmp_path)
    assert not any(tmp_path.iterdir())


# ---- failures ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_images(cards, tmp_path):
    model = small_model()
    with torch.no_grad():
        model.class_heads[0].bias[3] = math.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 0 is not finite .*nan.* its images: ") as caught:
        fit(model, cards, SHORT, tmp_path)
    first = next(iter(Batches(len(cards), SHORT)))
    for index, _ in first:
        assert cards.names[index] in str(caught.value)
    assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in model.state_dict().items())
    assert not (tmp_path / "last.pt").exists()


def test_images_without_objects_train():
    model = small_model()
    run = Run(model, SHORT, ["x"] * 6, torch.device("cpu"))
    nothing = GroundTruth.from_lists([torch.zeros(0, 4)] * 2)
    losses = train_step(run, model.train(), torch.rand(2, 3, 64, 64), nothing, ["a", "b"], 1.0)
    assert [value.item() for value in losses.values()] == [0.0, 0.0]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save({"x": torch.ones(3)}, path)
    script = (
        "import resource, signal, torch; from ssd_ext import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        f"checkpoint.save({{'x': torch.ones(100_000)}}, {str(path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], env=_environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert "cannot write" in done.stderr
    assert torch.equal(checkpoint.load(path)["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "cut off"])
def test_a_corrupt_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "last.pt"
    checkpoint.save({"x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500] if content is None else content)
    with pytest.raises(ValueError, match=r"last\.pt: corrupt"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        checkpoint.load(tmp_path / "none.pt")


# ---- several processes ---------------------------------------------------------------------------


class Emptied:
    """A data set without its objects."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.classes = dataset.classes

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        image, target = self.dataset[i]
        nothing = {k: v[:0] for k, v in target.items() if isinstance(v, torch.Tensor)}
        nothing["boxes"] = tv_tensors.wrap(nothing["boxes"], like=target["boxes"])
        return image, target | nothing


RANK = """
import gc, os, sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, os.environ["TESTS"])
from test_training import SAMPLE, SHORT, Emptied, small_model
from ssd_ext import MultiBoxLoss
from ssd_ext.data import load_dataset
from ssd_ext.priors import SSD300_VOC
from ssd_ext.training import fit
distributed.init_process_group("gloo")
torch.set_num_threads(1)

def gradient(rows, targets, across_ranks, min_negatives=20):
    scale = torch.ones(1, requires_grad=True)
    criterion = MultiBoxLoss(priors, min_negatives=min_negatives, across_ranks=across_ranks)
    loss = sum(criterion(rows[..., :4] * scale, rows[..., 4:] * scale, targets))
    assert torch.isfinite(loss)
    loss.backward()
    return scale.grad

priors = SSD300_VOC.priors()[-40:]

rows = torch.randn(4, 40, 7, generator=torch.Generator().manual_seed(0))
some = {"boxes": torch.tensor([[0.2, 0.2, 0.7, 0.8]]), "labels": torch.tensor([1])}
none = {name: value[:0] for name, value in some.items()}
ignored = {"boxes": torch.cat([priors[:28, :2] - priors[:28, 2:] / 2, priors[:28, :2] + priors[:28, 2:] / 2], 1)}
ignored["labels"] = torch.full((28,), -1)
own = slice(2 * distributed.get_rank(), 2 * distributed.get_rank() + 2)
for four in ("SSSN", "SNNN", "NNNN", "SNIN", "INNN"):
    targets = [{"S": some, "N": none, "I": ignored}[letter] for letter in four]
    of_ranks = gradient(rows[own], targets[own], across_ranks=True)
    distributed.all_reduce(of_ranks)
    torch.testing.assert_close(of_ranks / 2, gradient(rows, targets, across_ranks=False))
assert gradient(rows[own], [none] * 2, across_ranks=True, min_negatives=0) == 0

cards = load_dataset(SAMPLE, "train")
own = Emptied(cards) if os.environ["EMPTY"] == "1" and distributed.get_rank() else cards
gc.disable()  # or it frees by chance what fit must not leave behind
run = fit(small_model(), own, SHORT, sys.argv[1], val_set=cards)
assert not any(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects()), "it outlives its group"
if distributed.get_rank() == 0:
    torch.save(run.trained.state_dict(), sys.argv[1] + "/weights.pt")
distributed.destroy_process_group()
"""


def _environment(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TESTS": str(Path(__file__).parent), **more}


def _torchrun(tmp_path, out, **environment):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, out]
    return subprocess.run(
        command, env=_environment(OMP_NUM_THREADS="1", **environment), capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
def test_two_processes_train_as_one_does(cards, tmp_path):
    one = fit(small_model(), cards, SHORT, tmp_path / "one", val_set=cards)
    out = tmp_path / "two"
    done = _torchrun(tmp_path, out, EMPTY="0")
    assert done.returncode == 0, done.stderr
    two = torch.load(out / "weights.pt", weights_only=True)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    saved = checkpoint.load(out / "last.pt")["training"]
    assert saved["step"] == one.step
    if importlib.util.find_spec("tensorboard"):
        assert len(list(out.glob("events.out.*"))) == 1  # of one rank
    for name in ("bbox_regression", "classification"):
        assert saved["history"][0][name] == pytest.approx(one.history[0][name], rel=1e-4)
    assert saved["history"][-1]["mAP@0.5"] == pytest.approx(one.history[-1]["mAP@0.5"], abs=1e-6)


@pytest.mark.slow
def test_a_rank_without_objects_does_not_hang(tmp_path):
    done = _torchrun(tmp_path, tmp_path / "out", EMPTY="1")
    assert done.returncode == 0, done.stderr
