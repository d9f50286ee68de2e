"""Training and evaluation loops; they know losses, logits and schedules, and no method.

The objective returns {"loss": scalar, part: detached scalar, ...}; a part's name is only ever a column of the log.
"""

import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets import Batch, EvalLoader, TrainLoader
from distributed import Distributed, all_reduce_sum, any_rank, gather_names
from models.errors import UserError
from utils import Progress, RunError, StopSignal, compile_model, nearest, seed_all

Objective = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]

SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly")  # of timm, those that DeiT's flags describe


@dataclass(frozen=True)
class Precision:
    """Autocast of the forward and scaling of fp16 gradients; dtype None is full precision."""

    device_type: str
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)


@dataclass
class EpochLog:
    """Sums over an epoch so far, equal on all ranks: what a resumed epoch goes on from."""

    samples: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    nonfinite: int = 0

    def means(self) -> dict[str, float]:
        """Mean of every part over the samples, in the order the objective gave them."""
        return {name: total / max(self.samples, 1) for name, total in self.sums.items()}


class BadImages:
    """Names of unreadable images, counted over all ranks; past the limit the run ends."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: set[str] = set()

    def add(self, names: Sequence[str]) -> list[str]:
        """Note names of any rank; returns the new ones."""
        new = sorted(set(names) - self.names)
        self.names |= set(new)
        return new

    def check(self, log: Callable[[str], None], new: Sequence[str]) -> None:
        """Report new names.

        Raises:
            RunError: more images than the limit are unreadable.
        """
        for name in new:
            log(f"unreadable image: {name} ({len(self.names)} so far, --max_bad_images {self.limit})")
        if len(self.names) > self.limit:
            raise RunError(
                f"{len(self.names)} unreadable images, more than --max_bad_images {self.limit}; "
                f"the last is {max(self.names)}: repair the data or raise the limit"
            )


class SharpnessAware:
    """The perturbation of SAM (arXiv 2010.01412) and its adaptive form ASAM (arXiv 2102.11600).

    The gradient is taken at w + e(w), e = rho * g / |g|, per rank on its own samples (m-sharpness); adaptive scales by
    |w| elementwise. `ascend` moves the weights there, `restore` brings back the very bits from before.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rho: float, adaptive: bool) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.rho, self.adaptive = rho, adaptive
        self.saved: list[Tensor] = []

    @torch.no_grad()
    def ascend(self, scale: float) -> None:
        """Climb by the gradients at hand, which a scaler has multiplied by `scale`; then clear them."""
        self.saved = [parameter.detach().clone() for parameter in self.parameters]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad / scale for p in self.parameters]
        weights = [p.abs() if self.adaptive else None for p in self.parameters]
        scaled = [g if w is None else g * w for g, w in zip(grads, weights, strict=True)]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in scaled]))
        step = self.rho / (norm + 1e-12)
        if torch.isfinite(step):  # otherwise the step is skipped in the end anyway
            for parameter, grad, weight in zip(self.parameters, scaled, weights, strict=True):
                parameter.add_((grad if weight is None else grad * weight) * step)
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, saved in zip(self.parameters, self.saved, strict=True):
            parameter.copy_(saved)
        self.saved = []


@dataclass
class Trainer:
    """What a training step needs besides the data; `model` may be wrapped, `module` is the bare one."""

    model: nn.Module
    module: nn.Module
    objective: Any
    optimizer: torch.optim.Optimizer
    precision: Precision
    dist: Distributed
    ema: ModelEmaV3 | None = None
    mixup: Mixup | None = None
    sharpness: SharpnessAware | None = None
    clip_grad: float | None = None
    accumulation: int = 1
    seed: int = 0

    def gradients(self, group: Sequence[Batch], epoch: int, first: int, sync: bool = True) -> dict[str, Tensor]:
        """Accumulate the gradient of the mean loss over micro-batches; returns sums of parts over samples.

        Random streams are set by the position, so a repeated or resumed step draws the same again.
        """
        sums: dict[str, Tensor] = {}
        for offset, batch in enumerate(group):
            seed_all(self.seed, epoch, first + offset, self.dist.rank)
            images, targets = self._move(batch)
            last = sync and offset == len(group) - 1
            with self._no_sync() if not last else nullcontext():
                with self.precision.autocast():
                    parts = self.objective(self.model, images, targets)
                self._backward(parts["loss"] / len(group))
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() * len(images)
        return sums

    def _backward(self, loss: Tensor) -> None:
        """Differentiate; between ranks this exchanges gradients too, where a lost rank shows first."""
        try:
            self.precision.scaler.scale(loss).backward()
        except RuntimeError as error:
            if not re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
                raise
            reason = str(error).partition("\n")[0]
            raise RunError(f"lost contact with the other processes in a sum of gradients: {reason}") from error

    def _move(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self.dist.device, non_blocking=True)
        targets = batch.targets.to(self.dist.device, non_blocking=True)
        if self.mixup is None:
            return images, targets
        # timm's Mixup writes into its input, which on a CPU is the batch itself: a second pass would mix it twice
        return self.mixup(images.clone() if images is batch.images else images, targets)

    def _no_sync(self) -> AbstractContextManager:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def step_gradients(self, group: Sequence[Batch], epoch: int, first: int) -> dict[str, Tensor]:
        """The gradients of one update, at the perturbed weights where sharpness is asked for."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.sharpness is None:
            return self.gradients(group, epoch, first)
        streams = self.objective.state_dict()
        sums = self.gradients(group, epoch, first, sync=False)
        self.sharpness.ascend(self.precision.scaler.get_scale())
        self.objective.load_state_dict(streams)
        self.gradients(group, epoch, first)
        self.sharpness.restore()
        return sums

    def update(self) -> None:
        """Clip, step, and let the average follow."""
        scaler = self.precision.scaler
        if self.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad)
        scaler.step(self.optimizer)
        scaler.update()
        if self.ema is not None:
            self.ema.update(self.module)

    def gradients_finite(self) -> bool:
        """Whether all gradients are numbers; fp16's scaler judges its own (an overflow is part of its search)."""
        if self.precision.scaler.is_enabled():
            return True
        grads = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        return bool(torch.isfinite(nn.utils.get_total_norm(grads))) if grads else True


def train_one_epoch(
    trainer: Trainer,
    loader: TrainLoader,
    epoch: int,
    start: int = 0,
    *,
    epoch_log: EpochLog,
    set_lr: Callable[[float], float],
    stop: StopSignal,
    bad: BadImages,
    max_nonfinite: int,
    log: Callable[[str], None],
    log_every: int = 10,
    after_step: Callable[[int], None] = lambda step: None,
) -> bool:
    """Train from micro-batch `start` to the end of an epoch, or until a stop is asked for on any rank.

    Args:
        epoch_log: sums that the steps add to.
        set_lr: epoch as a fraction -> the learning rate, which it sets.
        after_step: called with the micro-batches done after every update.

    Returns:
        True at the end of the epoch, False after a stop; all ranks decide together.

    Raises:
        RunError: too many non-finite steps or unreadable images.
    """
    trainer.model.train()
    k, done = trainer.accumulation, start
    updates = grouped(loader.iterate(epoch, start), k)
    progress = Progress(updates, len(loader) // k, f"epoch {epoch}", log_every, trainer.dist.is_main, start // k)
    for group in progress:
        rate = set_lr(epoch + done / len(loader))
        sums = trainer.step_gradients(group, epoch, done)
        done += len(group)
        finite, stopping = _share(trainer, group, sums, epoch_log, stop, bad, log)
        if finite:
            trainer.update()
        else:
            _skip(trainer, epoch_log, max_nonfinite, epoch, done, log)
        if progress.due:
            progress.show(loss=epoch_log.means().get("loss", float("nan")), lr=rate)
        after_step(done)
        if stopping:
            return False
    return True


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Micro-batches of one update each."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def _share(
    trainer: Trainer,
    group: Sequence[Batch],
    sums: Mapping[str, Tensor],
    epoch_log: EpochLog,
    stop: StopSignal,
    bad: BadImages,
    log: Callable[[str], None],
) -> tuple[bool, bool]:
    """Exchange a step's sums and flags between ranks, once: is every rank's loss finite, and does any rank stop?

    A rank acts on what was exchanged only: a signal that comes a moment later waits for the next step, or the ranks
    would part ways.
    """
    names = [name for batch in group for name in batch.bad]
    finite = bool(torch.isfinite(sums["loss"])) and trainer.gradients_finite()
    flags = [not finite, bool(stop.requested), bool(names), sum(len(batch.images) for batch in group)]
    device = sums["loss"].device
    packed = torch.cat((torch.tensor(flags, dtype=torch.double, device=device), torch.stack(list(sums.values()))))
    nonfinite, stopping, has_bad, samples, *totals = all_reduce_sum(packed).tolist()
    if has_bad:
        bad.check(log, bad.add(gather_names(names)))
    if stopping and not stop.requested:
        stop.request("another rank")
    if nonfinite:
        return False, bool(stopping)
    epoch_log.samples += samples
    for name, total in zip(sums, totals, strict=True):
        epoch_log.sums[name] = epoch_log.sums.get(name, 0.0) + total
    return True, bool(stopping)


def _skip(trainer: Trainer, epoch_log: EpochLog, limit: int, epoch: int, done: int, log: Callable[[str], None]) -> None:
    epoch_log.nonfinite += 1
    trainer.optimizer.zero_grad(set_to_none=True)
    scaler = trainer.precision.scaler
    if scaler.is_enabled():
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
    log(f"epoch {epoch}: loss or gradient is not finite after micro-batch {done}; step skipped ({epoch_log.nonfinite})")
    if epoch_log.nonfinite > limit:
        raise RunError(
            f"stopped in epoch {epoch} at micro-batch {done}: {epoch_log.nonfinite} steps were not finite, more than "
            f"--max_nonfinite {limit}; lower --lr, set --clip_grad or use --amp bf16"
        )


@dataclass(frozen=True)
class Scores:
    """Results of one schedule; agree (%) and kl (nats) against the unmerged model are None where not asked for."""

    acc1: float
    acc5: float
    loss: float
    n_images: int
    agree: float | None = None
    kl: float | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    schedules: Sequence[Any],
    precision: Precision,
    dist: Distributed,
    *,
    agreement: bool = False,
    bad: BadImages | None = None,
    log: Callable[[str], None] = print,
    title: str = "eval",
    log_every: int = 10,
    stop: StopSignal | None = None,
) -> list[Scores] | None:
    """Scores of several schedules in one pass over the data; every image counts once, whatever the number of ranks.

    Args:
        schedules: values of `model(images, r=...)`; None is the model's own.
        agreement: also compare with r = 0 of the same weights.
        bad: where unreadable images are counted; each is a wrong answer.
        stop: where given, ranks look together after every batch, and a stop on any of them returns None.
    """
    model.eval()
    # correct@1, correct@5, loss, agree, kl, per schedule; then images and readable images
    sums = torch.zeros(len(schedules), 5, dtype=torch.double, device=dist.device)
    counts = torch.zeros(2, dtype=torch.double, device=dist.device)
    names: list[str] = []
    progress = Progress(loader, len(loader), title, log_every, dist.is_main)
    batches, steps = iter(progress), _most(len(loader))
    for _ in range(steps):
        if stop is not None and any_rank(stop.requested is not None, dist):
            stop.request("another rank")
            return None
        batch = next(batches, None)  # a rank may have one batch fewer than another
        if batch is None:
            continue
        images, targets, valid = (t.to(dist.device, non_blocking=True) for t in batch[:3])
        names += batch.bad
        counts += torch.stack((torch.tensor(len(valid), device=valid.device), valid.sum())).double()
        with precision.autocast():
            dense = model(images, r=0) if agreement else None
            for row, r in enumerate(schedules):
                logits = dense if dense is not None and r == 0 else model(images, r=r)
                sums[row] += _score(logits, targets, valid, dense)
        if progress.due:
            progress.show(acc1=100 * float(sums[0, 0]) / max(float(counts[0]), 1))
    sums, counts = all_reduce_sum(sums), all_reduce_sum(counts)
    names = gather_names(names)
    if bad is not None and names:
        bad.check(log, bad.add(names))
    return [_scores(row, counts, agreement) for row in sums]


def _most(length: int) -> int:
    """The largest number of batches of any rank."""
    return max(map(int, gather_names([str(length)])))


def _score(logits: Tensor, targets: Tensor, valid: Tensor, dense: Tensor | None) -> Tensor:
    """Sums over the readable images of a batch: correct@1, correct@5, loss, agree, kl."""
    logits, targets = logits[valid].double(), targets[valid]
    if not len(logits):
        return torch.zeros(5, dtype=torch.double, device=logits.device)
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    agree, kl = loss.new_zeros(()), loss.new_zeros(())
    if dense is not None:
        other = dense[valid].double()
        agree = (other.argmax(1) == logits.argmax(1)).sum().double()
        kl = F.kl_div(logits.log_softmax(1), other.log_softmax(1), reduction="sum", log_target=True)
    return torch.stack((hits[:, 0].sum().double(), hits.any(dim=1).sum().double(), loss, agree, kl))


def _scores(row: Tensor, counts: Tensor, agreement: bool) -> Scores:
    images, readable = counts.tolist()
    correct1, correct5, loss, agree, kl = row.tolist()
    per_image, per_readable = 1 / max(images, 1), 1 / max(readable, 1)
    return Scores(
        acc1=100 * correct1 * per_image,
        acc5=100 * correct5 * per_image,
        loss=loss * per_readable,
        n_images=int(images),
        agree=100 * agree * per_readable if agreement else None,
        kl=kl * per_readable if agreement else None,
    )


@torch.no_grad()
def throughput(
    runs: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor, precision: Precision, seconds: float = 20.0
) -> dict[str, dict[str, float]]:
    """Images per second of several models on the same images, in interleaved rounds: ratios survive a noisy machine.

    Args:
        runs: name -> forward.
        images: (B,3,H,W) on the device.
        seconds: time to spend in all; at least 5 rounds, at most 100, are run after a warm-up round.

    Returns:
        For each name median, q25 and q75, and the number of rounds.
    """

    def once(run: Callable[[Tensor], Tensor]) -> None:
        with precision.autocast():
            run(images)

    calls = {name: partial(once, run) for name, run in runs.items()}
    for call in calls.values():  # the second round of a model is the first without allocation and compilation
        seconds_of(call, images.device, time.perf_counter)
    a_round = sum(seconds_of(call, images.device, time.perf_counter) for call in calls.values())
    rounds = int(min(100, max(5, seconds / max(a_round, 1e-9))))
    times = {name: [] for name in runs}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds_of(call, images.device, time.perf_counter))
    return {name: quartiles(len(images) / np.array(taken)) | {"rounds": rounds} for name, taken in times.items()}


def seconds_of(call: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call, a GPU's work included."""
    _synchronize(device)
    began = clock()
    call()
    _synchronize(device)
    return clock() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Median, q25 and q75."""
    q25, median, q75 = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "q25": float(q25), "q75": float(q75)}


# Building


def build_precision(args: Namespace, device: torch.device) -> Precision:
    """--amp, by default bf16 on a GPU and full precision on a CPU."""
    name = args.amp or ("bf16" if device.type == "cuda" else "none")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[name]
    return Precision(device.type, dtype, torch.amp.GradScaler(device.type, enabled=name == "fp16"))


def build_trainer(
    args: Namespace,
    dist: Distributed,
    module: nn.Module,
    groups: list[dict[str, Any]],
    objective: Any,
    precision: Precision,
    mixup: Mixup | None,
) -> Trainer:
    """Wrap the model as asked, and make its optimizer and average."""
    module.set_grad_checkpointing(args.grad_checkpointing)  # type: ignore[operator]
    ema = ModelEmaV3(module, decay=args.model_ema_decay) if args.model_ema else None
    model: nn.Module = compile_model(module) if args.compile else module
    if dist.distributed:
        ids = [dist.device.index] if dist.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    optimizer = build_optimizer(args, groups, dist.world)
    sharpness = SharpnessAware(module.parameters(), args.sam_rho, args.sam_adaptive) if args.sam_rho else None
    return Trainer(
        model=model,
        module=module,
        objective=objective,
        optimizer=optimizer,
        precision=precision,
        dist=dist,
        ema=ema,
        mixup=mixup,
        sharpness=sharpness,
        clip_grad=args.clip_grad,
        accumulation=args.accumulation_steps,
        seed=args.seed,
    )


def build_optimizer(args: Namespace, groups: list[dict[str, Any]], world: int) -> torch.optim.Optimizer:
    """timm's optimizer of that name; lr is scaled by the global batch / 512 as in DeiT."""
    factor = 1.0 if args.unscale_lr else args.batch_size * args.accumulation_steps * world / 512
    options = {"eps": args.opt_eps, "betas": args.opt_betas}
    names = [name for name in list_optimizers() if not get_optimizer_info(name).second_order]
    if args.opt.lower().removeprefix("lookahead_") not in names:
        raise UserError(nearest(args.opt, names, "--opt"))
    try:
        return create_optimizer_v2(
            groups,
            opt=args.opt,
            lr=args.lr * args.lr_times * factor,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            **{key: value for key, value in options.items() if value is not None},
        )
    except (ValueError, AssertionError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"--opt {args.opt} cannot be made: {error}") from error


def build_scheduler(args: Namespace, optimizer: torch.optim.Optimizer) -> tuple[Scheduler, int]:
    """timm's schedule over epochs (taken at fractions of them), and the number of epochs with the cooldown."""
    if args.sched not in SCHEDULES:
        raise UserError(nearest(args.sched, SCHEDULES, "--sched"))
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        decay_epochs=args.decay_epochs,
        patience_epochs=args.patience_epochs,
        decay_rate=args.decay_rate,
        min_lr=args.min_lr * args.min_lr_times,
        warmup_lr=args.warmup_lr * args.min_lr_times,
        warmup_epochs=args.warmup_epochs,
        cooldown_epochs=args.cooldown_epochs,
    )
    assert scheduler is not None  # only for names that are not ours
    return scheduler, args.epochs + args.cooldown_epochs


def scheduler_state(scheduler: Scheduler) -> dict[str, Any]:
    """All that a schedule remembers: timm's plateau leaves out the counters of the schedule that it wraps."""
    inner = scheduler.lr_scheduler if type(scheduler).__name__ == "PlateauLRScheduler" else None
    return scheduler.state_dict() | ({} if inner is None else {"inner": inner.state_dict()})


def load_scheduler_state(scheduler: Scheduler, state: Mapping[str, Any]) -> None:
    """The inverse of `scheduler_state`; states of DeiT and timm have no "inner"."""
    state = dict(state)
    inner = state.pop("inner", None)
    scheduler.load_state_dict(state)
    if inner is not None:
        scheduler.lr_scheduler.load_state_dict(inner)
