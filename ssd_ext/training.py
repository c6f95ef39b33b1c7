"""Training a detector: fit(), which ``ssd_ext train`` calls."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ssd_ext import checkpoint
from ssd_ext.data import Dataset, augmentation, collate
from ssd_ext.evaluation import average_precision
from ssd_ext.ground_truth import GroundTruth
from ssd_ext.inference import detect_all_across_ranks, draw, filter_by_score
from ssd_ext.models import SSD
from ssd_ext.models.ssd import Images

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

AMP: dict[str, torch.dtype | None] = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULES = ("cosine", "step")
OPTIMIZERS = ("sgd", "adamw")
FLOATS = ("lr", "momentum", "weight_decay", "clip_grad_norm", "ema", "photometric", "zoom_out", "flip")


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the text names the step and its images."""


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the paper's for SSD300 on VOC, but for the cosine.

    Args:
        epochs: passes over the training images.
        batch_size: images of a step, of all ranks together.
        lr: learning rate after the warm-up.
        optimizer: ``"sgd"``, or ``"adamw"``, which needs a tenth of the rate or less and learns from fewer steps.
        momentum: of SGD; the first of AdamW's betas.
        weight_decay: of all weights but biases and those of normalisation.
        schedule: ``"cosine"`` down to 0, or ``"step"``: a tenth from each of ``milestones`` on.
        milestones: fractions of all steps.
        warmup: steps over which the rate rises from a thousandth; at most a tenth of all.
        freeze: first modules of ``model.backbone.features`` to leave as they are, batch statistics included: quicker,
            and often no worse where the backbone knows more images than the data set has.
        clip_grad_norm: largest norm of the gradient of all weights together; None does not look.
        amp: ``"bfloat16"`` or ``"float16"`` for the network; the loss computes in float32.
        channels_last: memory format of network and images.
        ema: decay of an average of the weights that is evaluated and kept instead of them; None for none.
        crop: whether images are cropped.
        photometric: this and the next two are probabilities of :func:`ssd_ext.data.augmentation`.
        zoom_out: of placing an image on a larger canvas.
        flip: of mirroring an image; 0 where left and right matter, as in writing.
        deterministic: restrict cuDNN to algorithms that give the same result on every run.
        sync_batch_norm: batch statistics of all ranks together (GPUs only).
        workers: processes that load images, of each rank.
        seed: of everything random.
        save_every: steps between checkpoints, beside one at each end of an epoch: what a crash may cost.
        evaluate_every: epochs between evaluations; the last is always evaluated.

    Raises:
        ValueError: a value out of its range.
    """

    epochs: int = 120
    batch_size: int = 32
    lr: float = 1e-3
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.67, 0.83)
    warmup: int = 500
    freeze: int = 0
    clip_grad_norm: float | None = None
    amp: str = "none"
    channels_last: bool = False
    ema: float | None = None
    crop: bool = True
    photometric: float = 0.5
    zoom_out: float = 0.5
    flip: float = 0.5
    deterministic: bool = True
    sync_batch_norm: bool = False
    workers: int = 2
    seed: int = 0
    save_every: int = 500
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        """Refuse what would only be noticed after a while."""
        for name in FLOATS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))  # NumPy's numbers cannot be saved
        for name in ("epochs", "batch_size", "save_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("momentum", "weight_decay", "warmup", "freeze", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        for name in ("photometric", "zoom_out", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, 0 to 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, got {self.lr}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.amp not in AMP:
            raise ValueError(f"amp must be one of {', '.join(AMP)}, got {self.amp!r}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be between 0 and 1, got {self.ema}")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be a positive number, got {self.clip_grad_norm}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, ``0 <= step < steps``, as a fraction of ``lr``."""
        warmup = min(self.warmup, steps // 10)
        if step < warmup:
            return 0.001 + 0.999 * (step + 1) / (warmup + 1)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        return 0.1 ** sum(step >= milestone * steps for milestone in self.milestones)


# ---- data: what a step sees depends on seed, step and rank alone ---------------------------------


class Batches:
    """The batches of the steps from ``start`` on: lists of (index, seed of the augmentation).

    Each epoch is a new permutation. All batches have one size: the last one of an epoch is filled up from the
    epoch's beginning. Rank r of a step has the r-th part of that step's batch.
    """

    def __init__(self, images: int, recipe: Recipe, start: int = 0, rank: int = 0, ranks: int = 1) -> None:
        """See the class; ``images`` is the size of the data set."""
        if recipe.batch_size % ranks:
            raise ValueError(f"batch_size must be a multiple of the {ranks} ranks, got {recipe.batch_size}")
        self.images, self.recipe, self.start, self.rank, self.ranks = images, recipe, start, rank, ranks
        self.per_epoch = math.ceil(images / recipe.batch_size)
        self.steps = self.per_epoch * recipe.epochs

    def __len__(self) -> int:
        """Steps that are left."""
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """One list a step."""
        size, own = self.recipe.batch_size, self.recipe.batch_size // self.ranks
        last = None
        for step in range(self.start, self.steps):
            epoch, k = divmod(step, self.per_epoch)
            if epoch != last:
                random = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
                order = torch.randperm(self.images, generator=random).repeat(math.ceil(size / self.images) + 1)
                seeds = torch.randint(2**62, order.shape, generator=random)
                last = epoch
            mine = slice(k * size + self.rank * own, k * size + (self.rank + 1) * own)
            yield list(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True))


class Augmented(torch.utils.data.Dataset[Any]):
    """A data set whose items, asked for by (index, seed), are augmented by that seed alone."""

    def __init__(self, dataset: Dataset, transform: Callable[[Tensor, dict[str, Any]], Any]) -> None:
        """See the class."""
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, at: tuple[int, int]) -> Any:
        """The image and target, augmented."""
        index, seed = at
        image, target = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image, target)


# ---- state ---------------------------------------------------------------------------------------


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer, which lets biases and weights of normalisation be as large as they like."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


class Run:
    """Everything that a checkpoint holds."""

    def __init__(self, model: SSD, recipe: Recipe, classes: Sequence[str], device: torch.device):
        """A run at its first step."""
        self.model, self.recipe, self.classes = model, recipe, list(classes)
        self.optimizer = optimizer_of(model, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "float16")
        self.average: AveragedModel | None = None
        if recipe.ema is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
        self.step = 0
        self.best = -math.inf
        self.history: list[dict[str, float]] = []  # of each epoch
        self.sums: dict[str, Tensor] = {}  # of the losses of this epoch's `counted` steps
        self.counted = 0
        self.images = 0  # of the data set

    @property
    def trained(self) -> SSD:
        """The weights to use: the average where there is one."""
        return self.model if self.average is None else cast(SSD, self.average.module)

    def state(self) -> dict[str, Any]:
        """What :mod:`ssd_ext.checkpoint` writes; ``"model"`` is all that a detector needs."""
        return {
            "model": self.trained.state_dict(),
            "architecture": self.model.architecture,
            "classes": self.classes,
            "training": {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "averaged": None if self.average is None else self.average.n_averaged,
                "step": self.step,
                "best": self.best,
                "history": self.history,
                "sums": {name: value.item() for name, value in self.sums.items()},
                "counted": self.counted,
                "images": self.images,
                "recipe": asdict(self.recipe),
            },
        }

    def resume(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint of the same model, classes and recipe."""
        if "training" not in state:
            raise ValueError(f"{path} holds a model without the state of a training run: give it as weights instead")
        training = state["training"]
        same = {
            "architecture": (state["architecture"], self.model.architecture),
            "classes": (list(state["classes"]), self.classes),
            "number of images": (training["images"], self.images),
        }
        recipe = asdict(self.recipe)
        same |= {k: (v, recipe.get(k)) for k, v in training["recipe"].items() if k not in FREE_TO_CHANGE}
        for name, (saved, now) in same.items():
            if saved != now:
                raise ValueError(f"cannot resume from {path}: its {name} is {saved}, this run's {now}")
        self.model.load_state_dict(training["model"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(state["model"])
            self.average.n_averaged.copy_(training["averaged"])
        self.step, self.best, self.history = training["step"], training["best"], training["history"]
        device = next(self.model.parameters()).device
        self.sums = {k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in training["sums"].items()}
        self.counted = training["counted"]


FREE_TO_CHANGE = ("workers", "save_every", "evaluate_every")  # by a run that is resumed


class Journal:
    """What rank 0 tells and keeps of a run: progress bar, TensorBoard, checkpoints."""

    def __init__(self, out: Path, run: Run, batches: Batches, rank: int):
        """Nothing is written before the ``with``."""
        self.out, self.run, self.batches, self.writes = out, run, batches, rank == 0
        self.steps = 0  # of this process, in this epoch
        self.since = time.perf_counter()
        self.board: SummaryWriter | None = None

    def __enter__(self) -> "Journal":
        """Open what is written to."""
        if self.writes:
            self.out.mkdir(parents=True, exist_ok=True)
            self.board = _summary_writer(self.out)
        self.bar = tqdm(
            total=self.batches.steps, initial=self.run.step, unit="step", disable=not self.writes, dynamic_ncols=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.bar.close()
        if self.board:
            self.board.close()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Count a step."""
        for name, value in losses.items():
            self.run.sums[name] = self.run.sums.get(name, 0) + value.double()
        self.run.counted += 1
        self.steps += 1
        self.bar.update()
        if self.writes and self.run.step % 20 == 0:
            self.bar.set_postfix(loss=f"{torch.stack(list(losses.values())).sum().item():.3f}")
            if self.board:
                for name, value in losses.items():
                    self.board.add_scalar(f"step/{name}", value, self.run.step)

    def end_epoch(self, epoch: int, val_set: Dataset | None = None) -> None:
        """Note the epoch, with what is found on ``val_set`` if that is given, and write checkpoints."""
        run = self.run
        images_per_second = self.steps * self.batches.recipe.batch_size / (time.perf_counter() - self.since)
        if distributed.is_initialized():  # each rank's losses are its part of the batch's
            for total in run.sums.values():
                distributed.all_reduce(total)
                total /= distributed.get_world_size()
            for buffer in run.trained.buffers():  # statistics of batch normalisation
                distributed.broadcast(buffer, 0)
        entry = {name: (value / run.counted).item() for name, value in run.sums.items()}
        entry |= {"epoch": epoch, "lr": run.optimizer.param_groups[0]["lr"], "images_per_second": images_per_second}
        run.sums, run.counted = {}, 0
        if val_set is not None:
            found = detect_all_across_ranks(run.trained, val_set, workers=run.recipe.workers)
            targets = [val_set.target(i) for i in range(len(val_set))]
            entry["mAP@0.5"] = average_precision(found, targets, self.run.model.num_classes).mAP
        self.run.history.append(entry)
        if self.writes:
            self.bar.write(", ".join(f"{name} {value:.4g}" for name, value in entry.items()))
            if self.board:
                for name, value in entry.items():
                    self.board.add_scalar(name, value, epoch)
                if val_set is not None:
                    self._add_pictures(self.board, epoch, val_set, found)
        if entry.get("mAP@0.5", -math.inf) > self.run.best:
            self.run.best = entry["mAP@0.5"]
            self.save(self.out / "best.pt")
        self.save(self.out / "last.pt")
        self.steps, self.since = 0, time.perf_counter()

    def _add_pictures(
        self, board: "SummaryWriter", epoch: int, val_set: Dataset, found: list[dict[str, Tensor]], count: int = 4
    ) -> None:
        for i in range(min(count, len(val_set))):
            picture = draw(val_set[i][0], filter_by_score(found[i], 0.3), self.run.classes)
            board.add_image(f"detections/{i}", picture, epoch)

    def save(self, path: Path) -> None:
        """Write a checkpoint of the run as it is."""
        if self.writes:
            checkpoint.save(self.run.state(), path)


def _summary_writer(out: Path) -> "SummaryWriter | None":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out)


def _check(model: SSD, train_set: Dataset, val_set: Dataset | None) -> None:
    if len(train_set) == 0:
        raise ValueError("the training set has no images")
    if any(getattr(dataset, "transform", None) is not None for dataset in (train_set, val_set)):
        raise ValueError("data sets must be without a transform: training images are augmented here, others are not")
    if len(train_set.classes) != model.num_classes - 1:
        raise ValueError(
            f"the model must have a class for each of the data's and one for background: it has {model.num_classes}, "
            f"the data {len(train_set.classes)} ({', '.join(train_set.classes)})"
        )
    if val_set is not None and list(val_set.classes) != list(train_set.classes):
        raise ValueError(
            f"training and validation must have the same classes, got {train_set.classes} and {val_set.classes}"
        )


def _freeze(model: SSD, count: int) -> Sequence[nn.Module]:
    if count == 0:
        return []
    features = getattr(model.backbone, "features", None)
    if not isinstance(features, nn.Sequential):
        raise ValueError(f"freeze must be 0 for a backbone without features (see ssd_ext.models.Backbone), got {count}")
    if count > len(features):
        raise ValueError(f"freeze must be at most {len(features)}, the features of this backbone, got {count}")
    frozen = list(features[:count])
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def _train_mode(network: nn.Module, frozen: Sequence[nn.Module]) -> None:
    network.train()
    for module in frozen:
        module.eval()


def plot_history(history: Sequence[dict[str, float]], path: str | Path) -> None:
    """Draw losses, mAP and learning rate of each epoch (:attr:`Run.history`) into a picture file."""
    from matplotlib.figure import Figure

    kept = [name for name in ("bbox_regression", "classification", "mAP@0.5", "lr") if any(name in e for e in history)]
    figure = Figure(figsize=(7, 1.8 * len(kept)), layout="constrained")
    for name, ax in zip(kept, figure.subplots(len(kept), 1, sharex=True, squeeze=False)[:, 0], strict=True):
        points = [(e["epoch"], e[name]) for e in history if name in e]
        ax.plot(*zip(*points, strict=True), color="#2e5e8c")
        ax.set_ylabel(name)
        ax.grid(alpha=0.3)
    ax.set_xlabel("epoch")
    figure.savefig(path, dpi=120)


# ---- the loop ------------------------------------------------------------------------------------


def train_step(
    run: Run, network: nn.Module, images: Images, ground_truth: GroundTruth, names: Sequence[str], rate: float
) -> dict[str, Tensor]:
    """One step of the optimizer.

    Args:
        run: what is trained.
        network: ``run.model``, or what wraps it (``DistributedDataParallel``, ``torch.compile``).
        images: as the model takes them.
        ground_truth: of the images.
        names: of the images.
        rate: fraction of the recipe's learning rate.

    Returns:
        The losses, detached.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite; the weights are those before the step.
    """
    recipe, device = run.recipe, next(run.model.parameters()).device
    for group in run.optimizer.param_groups:
        group["lr"] = recipe.lr * rate
    amp = AMP[recipe.amp]
    with torch.autocast(device.type, dtype=amp) if amp else nullcontext():
        losses = network(images, ground_truth)
    loss = sum(losses.values())
    if not math.isfinite(loss.item()):
        values = ", ".join(f"{name} {value.item()}" for name, value in losses.items())
        raise NonFiniteLossError(
            f"the loss of step {run.step} is not finite ({values}); its images: {', '.join(names)}"
        )
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    if recipe.clip_grad_norm is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.average is not None:
        run.average.update_parameters(run.model)
    run.step += 1
    return {name: value.detach() for name, value in losses.items()}


def fit(
    model: SSD,
    train_set: Dataset,
    recipe: Recipe,
    out: str | Path,
    *,
    val_set: Dataset | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    stop_at: int | None = None,
) -> Run:
    """Train ``model``; in a process group of ``torch.distributed``, as one of its ranks.

    Args:
        model: to train; its weights change.
        train_set: as :func:`ssd_ext.data.load_dataset` gives it.
        recipe: how.
        out: folder for ``last.pt`` and ``best.pt`` (by mAP at IoU 0.5 on ``val_set``), which
            :func:`ssd_ext.inference.load_detector` reads, and for TensorBoard.
        val_set: evaluated as the recipe says; None: never, and there is no ``best.pt``.
        device: to train on.
        resume: go on from ``out/last.pt`` if there is one: the same steps as if nothing had happened.
        stop_at: stop after the step of that number, as if interrupted.

    Returns:
        The run; ``run.history`` has the losses, images/s and mAP of each epoch.

    Raises:
        ValueError: an empty data set or one with a transform, other classes than the model's or the validation's,
            an ``out`` that holds another run.
        NonFiniteLossError: see :func:`train_step`.
        OSError: a checkpoint cannot be written; the one before is unharmed.
    """
    device, out = torch.device(device), Path(out)
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if ranks > 1 else 0
    last = out / "last.pt"
    _check(model, train_set, val_set)
    if last.exists() and not resume:
        raise ValueError(f"{out} holds a run already: resume it, or name another folder")

    model.to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.sync_batch_norm and ranks > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    frozen = _freeze(model, recipe.freeze)
    run = Run(model, recipe, train_set.classes, device)
    run.images = len(train_set)
    if resume and last.exists():
        run.resume(checkpoint.load(last), last)
    if ranks > 1:
        steps = [run.step] * ranks
        distributed.all_gather_object(steps, run.step)
        if len(set(steps)) > 1:
            raise ValueError(f"the ranks would go on from different steps, {steps}: {out} must be one folder for all")
    torch.backends.cudnn.deterministic = recipe.deterministic
    network: nn.Module = model
    if ranks > 1:
        network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    batches = Batches(len(train_set), recipe, run.step, rank, ranks)
    augment = augmentation(
        model.image_size, photometric=recipe.photometric, zoom_out=recipe.zoom_out, crop=recipe.crop, flip=recipe.flip
    )
    loader = DataLoader(
        Augmented(train_set, augment),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=recipe.workers,
        pin_memory=device.type == "cuda",
    )
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.loss.across_ranks = ranks > 1
    try:
        with Journal(out, run, batches, rank) as journal:
            _train_mode(network, frozen)
            for images, ground_truth, names in loader:
                torch.manual_seed(recipe.seed * 1_000_003 + run.step * ranks + rank)  # of dropout, if there is one
                images = images.to(device, non_blocking=True, memory_format=layout)  # augmented to one size: one tensor
                ground_truth = ground_truth.to(device, non_blocking=True)
                rate = recipe.rate(run.step, batches.steps)
                journal.add(train_step(run, network, images, ground_truth, names, rate))
                epoch, inside = divmod(run.step, batches.per_epoch)
                if inside == 0:
                    due = epoch % recipe.evaluate_every == 0 or run.step == batches.steps
                    journal.end_epoch(epoch, val_set if due else None)
                    _train_mode(network, frozen)
                elif run.step % recipe.save_every == 0:
                    journal.save(last)
                if run.step == stop_at:
                    break
    finally:
        model.loss.across_ranks = False
    return run
