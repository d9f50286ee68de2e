"""Training and evaluation loops; they know losses, logits and schedules, and no method.

The objective returns {"loss": scalar, part: detached scalar, ...}; a part's name is only ever a column of the log.
An *update* is one step of the optimizer. It takes the gradients of `accumulation` micro-batches, and positions in an
epoch are counted in micro-batches.
"""

import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import PlateauLRScheduler, TanhLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets import Batch, EvalLoader, TrainLoader
from distributed import Distributed, all_reduce_sum, any_rank, gather_names, lost_contact, max_over_ranks
from models.errors import UserError
from models.schedule import format_schedule
from sharding import copy_tensors, is_sharded, load_whole, local, sliced_state, whole
from utils import Progress, RunError, StopSignal, compile_model, log, seed_all

EMA_GAMMA = 9.0  # of the average's warm-up, as in TensorFlow's (1 + t) / (10 + t)


class LossFn(Protocol):
    """An objective: `parts = loss_fn(model, images, targets)`, of which parts["loss"] is differentiated.

    Its state holds the random streams that it draws from, so that a step can be repeated and a run resumed.
    """

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]: ...
    def start_epoch(self, epoch: int) -> None: ...
    def start_update(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Precision:
    """Autocast for the forward, and the scaler of fp16 gradients; dtype None is full precision."""

    device_type: str
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)


@dataclass
class EpochLog:
    """Sums over an epoch so far, equal on all ranks (but for the seconds): what a resumed epoch goes on from."""

    samples: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    nonfinite: int = 0  # skipped steps since the start of the run
    seconds: float = 0.0

    def means(self) -> dict[str, float]:
        """Return the mean of every part over the samples, in the order in which the objective gave them."""
        return {name: total / max(self.samples, 1) for name, total in self.sums.items()}


class UnreadableImages:
    """Names of unreadable images, counted over all ranks; past the limit the run ends."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: set[str] = set()

    def report(self, names: Sequence[str]) -> None:
        """Count the names that any rank met, and print the new ones.

        Raises:
            RunError: more images than the limit are unreadable.
        """
        for name in sorted(set(names) - self.names):
            self.names.add(name)
            log(f"unreadable image: {name} ({len(self.names)} so far, --max_bad_images {self.limit})")
        if len(self.names) > self.limit:
            raise RunError(
                f"{len(self.names)} unreadable images, more than --max_bad_images {self.limit}; "
                f"the last is {max(self.names)}: repair the data or raise the limit"
            )


@dataclass(frozen=True)
class RunControl:
    """The reasons that may end a run early, and how often it reports; its training and its evaluations share one.

    Attributes:
        stop: a signal's request, which the ranks exchange; None: nobody listens to signals.
        unreadable: where unreadable images are counted; None: they are not reported.
        max_nonfinite: steps that may be skipped before the run stops.
        log_every: updates, or batches of an evaluation, between two lines of progress; None is `Progress`'s own.
    """

    stop: StopSignal | None = None
    unreadable: UnreadableImages | None = None
    max_nonfinite: int = 10
    log_every: int | None = None

    @property
    def stop_requested(self) -> bool:
        return self.stop is not None and self.stop.requested is not None

    def stop_with_others(self) -> None:
        """Stop because a rank was asked to; the reason of a rank that was asked itself stays its own."""
        if self.stop is not None:
            self.stop.request("another rank")


class SharpnessAware:
    """The perturbation of SAM (arXiv 2010.01412) and its adaptive form ASAM (arXiv 2102.11600).

    The gradient of the update is taken at w + e(w), where e = rho * g / |g| is computed by each rank from its own
    samples (m-sharpness). The adaptive form scales elementwise by |w|: e = rho * w^2 g / |w g|. `ascend` moves the
    weights there; `restore` brings back the very bits from before, which subtracting e would not.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rho: float, adaptive: bool) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.rho, self.adaptive = rho, adaptive
        self.saved: list[Tensor] = []

    @torch.no_grad()
    def ascend(self, scale: float) -> None:
        """Add e(w) to the weights (the gradients are divided by the loss scale first), then clear the gradients."""
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
        """Put the weights back to where they were before `ascend`."""
        for parameter, saved in zip(self.parameters, self.saved, strict=True):
            parameter.copy_(saved)
        self.saved = []


@dataclass
class Learner:
    """A model and all that changes with it in training: optimizer, schedule of the rate, loss scale, average.

    `model` may be wrapped by DDP or compile; `module` is the bare one, whose parameters they share. With --fsdp both
    are one, whose parameters are spread over the processes.
    """

    model: nn.Module
    module: nn.Module
    objective: LossFn
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    precision: Precision
    dist: Distributed
    ema: ModelEmaV3 | None = None
    mixup: Mixup | None = None
    sharpness: SharpnessAware | None = None
    clip_grad: float | None = None
    accumulation: int = 1
    seed: int = 0
    ema_updates: int | None = 0  # done so far; None: the decay stays constant, as in runs before there was a warm-up

    @property
    def sharded(self) -> bool:
        """Whether the model is spread over the processes."""
        return is_sharded(self.module)

    @property
    def lr(self) -> float:
        """The learning rate before the factors of single groups."""
        return max(group["lr"] / group.get("lr_scale", 1.0) for group in self.optimizer.param_groups)

    def set_lr(self, epoch: float) -> float:
        """Set the learning rate of a position in the run, in epochs; returns it.

        timm's schedules are smooth in the epoch, so they are stepped at fractions of it. Its own way to update every
        step, `step_update(num_updates)`, needs schedules whose lengths are counted in updates. These differ in the last
        digits, and a checkpoint made by epochs could not go on: its lengths are part of the schedule's state.
        """
        if not isinstance(self.scheduler, PlateauLRScheduler):
            self.scheduler.step(epoch)  # type: ignore[arg-type]  # annotated as int
        return self.lr

    def scale_lr(self, factor: float) -> float:
        """Multiply the rates of the whole schedule but its floor and the start of its warm-up.

        Returns:
            The highest rate of the schedule before.
        """
        before = max(self.scheduler.base_values)
        self.scheduler.base_values = [value * factor for value in self.scheduler.base_values]
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor
        if warmup := self.scheduler.warmup_t:  # type: ignore[attr-defined]  # every schedule of timm's has one
            start = self.scheduler.warmup_lr_init  # type: ignore[attr-defined]
            tanh = isinstance(self.scheduler, TanhLRScheduler)  # its warm-up meets the schedule below its top
            tops = self.scheduler._get_lr(warmup) if tanh else self.scheduler.base_values
            steps = [(value - start) / warmup for value in tops]
            self.scheduler.warmup_steps = steps  # type: ignore[attr-defined]
        return before

    def end_epoch(self, epoch: int, accuracy: float) -> None:
        """Tell the schedule that waits for a plateau the validation accuracy of an epoch."""
        if isinstance(self.scheduler, PlateauLRScheduler):
            self.scheduler.step(epoch + 1, accuracy)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, under the names of DeiT's checkpoints.

        Of a model that is spread over the processes all ranks must call it; rank 0's has the tensors.
        """
        state = {
            "model": self.module.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "ema_updates": self.ema_updates,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": scheduler_state(self.scheduler),
            "scaler": self.precision.scaler.state_dict(),
        }
        return whole(state, keep=self.dist.is_main) if self.sharded else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load all of `state_dict` but the model: its weights are loaded when it is built, as for finetuning.

        Raises:
            ValueError, KeyError: the state is of another optimizer or schedule.
        """
        optimizer = state["optimizer"]
        self.optimizer.load_state_dict(sliced_state(self.optimizer, optimizer) if self.sharded else optimizer)
        load_scheduler_state(self.scheduler, state["lr_scheduler"])
        ema = state.get("model_ema")
        if self.ema is not None:  # a run that kept no average starts one from its weights
            load = partial(load_whole, self.ema.module) if self.sharded else self.ema.module.load_state_dict
            load(state["model"] if ema is None else ema)
            self.ema_updates = self.ema_updates if ema is None else state.get("ema_updates")
        if state.get("scaler"):  # a run without fp16 has left none
            self.precision.scaler.load_state_dict(state["scaler"])

    def gradients(self, group: Sequence[Batch], epoch: int, first: int, sync: bool = True) -> dict[str, Tensor]:
        """Accumulate the gradient of the mean loss over micro-batches; returns sums of parts over samples.

        The random streams are set from the position, so a repeated or resumed step draws the same again.

        Args:
            first: position in the epoch of the first micro-batch.
            sync: average the gradients over the ranks, which DDP does in the last backward.
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
            raise lost_contact("a sum of gradients", error) from error

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
        """Compute the gradients of one update, at the perturbed weights where sharpness is asked for.

        Returns:
            Sums of the loss and its parts over samples, at the weights themselves.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.start_update()  # all micro-batches, and both passes of sharpness, run the same schedules
        if self.sharpness is None:
            return self.gradients(group, epoch, first)
        sums = self.gradients(group, epoch, first, sync=False)
        self.sharpness.ascend(self.precision.scaler.get_scale())
        self.gradients(group, epoch, first)
        self.sharpness.restore()
        return sums

    def update(self) -> None:
        """Clip the gradients, step the optimizer, and let the average follow."""
        scaler = self.precision.scaler
        if self.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad)
        scaler.step(self.optimizer)
        scaler.update()
        if self.ema is not None:
            self.ema_updates = None if self.ema_updates is None else self.ema_updates + 1
            self.ema.update(self.module, self.ema_updates)

    def gradients_finite(self) -> bool:
        """Tell whether all gradients are finite; fp16's scaler looks itself (an overflow is part of its search)."""
        if self.precision.scaler.is_enabled():
            return True
        # of its own slices alone: the ranks exchange their answers later, and not all of them may get here
        grads = [local(parameter.grad) for parameter in self.module.parameters() if parameter.grad is not None]
        return bool(torch.isfinite(nn.utils.get_total_norm(grads))) if grads else True


def train_one_epoch(
    learner: Learner,
    loader: TrainLoader,
    control: RunControl,
    epoch: int,
    start: int = 0,
    *,
    epoch_log: EpochLog,
    after_step: Callable[[int], None] = lambda step: None,
) -> bool:
    """Train from micro-batch `start` to the end of an epoch, or until a stop is asked for on any rank.

    Args:
        epoch_log: sums that the steps add to.
        after_step: called after every update with the number of micro-batches done.

    Returns:
        True at the end of the epoch, False after a stop; all ranks decide together.

    Raises:
        RunError: too many non-finite steps or unreadable images.
    """
    learner.model.train()
    k, done, dist = learner.accumulation, start, learner.dist
    updates = grouped(loader.iterate(epoch, start), k)
    progress = Progress(updates, len(loader) // k, f"epoch {epoch}", control.log_every, dist.is_main, start // k)
    for group in progress:
        lr = learner.set_lr(epoch + done / len(loader))
        sums = learner.step_gradients(group, epoch, done)
        done += len(group)
        finite, stopping = sync_step(learner, group, sums, epoch_log, control)
        if finite:
            learner.update()
        else:
            skip_step(learner, epoch_log, control.max_nonfinite, epoch, done)
        if progress.due:
            progress.show(loss=epoch_log.means().get("loss", float("nan")), lr=lr)
        after_step(done)
        if stopping:
            return False
    return True


def grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Group consecutive micro-batches into updates; an incomplete last group is dropped."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def sync_step(
    learner: Learner, group: Sequence[Batch], sums: Mapping[str, Tensor], epoch_log: EpochLog, control: RunControl
) -> tuple[bool, bool]:
    """Exchange a step's sums and flags between the ranks, and add the sums to the epoch's.

    Everything goes in one all-reduce of one vector,

        [not finite, stop asked for, unreadable images met, samples, sum of each part ...]

    because every further exchange would cost each step another wait for the slowest rank. A rank acts on the sums only,
    never on its own flag: a signal that arrives a moment later waits for the next step. Otherwise one rank would leave
    the loop while the others wait for it in the next gradient exchange. Names of unreadable images are gathered in a
    second exchange, which all ranks enter because they have all seen the summed flag.

    Returns:
        Whether the loss and the gradients of all ranks are finite, and whether any rank is asked to stop.

    Raises:
        RunError: more images than the limit are unreadable.
    """
    names = [name for batch in group for name in batch.bad]
    finite = bool(torch.isfinite(sums["loss"])) and learner.gradients_finite()
    flags = [not finite, control.stop_requested, bool(names), sum(len(batch.images) for batch in group)]
    device = sums["loss"].device
    packed = torch.cat((torch.tensor(flags, dtype=torch.double, device=device), torch.stack(list(sums.values()))))
    nonfinite, stopping, any_unreadable, samples, *totals = all_reduce_sum(packed).tolist()
    if any_unreadable and control.unreadable is not None:
        control.unreadable.report(gather_names(names))
    if stopping:
        control.stop_with_others()
    if nonfinite:
        return False, bool(stopping)
    epoch_log.samples += samples
    for name, total in zip(sums, totals, strict=True):
        epoch_log.sums[name] = epoch_log.sums.get(name, 0.0) + total
    return True, bool(stopping)


def skip_step(learner: Learner, epoch_log: EpochLog, limit: int, epoch: int, done: int) -> None:
    """Drop the gradients of a step that is not finite on some rank, and count it.

    Raises:
        RunError: more steps than the limit were skipped.
    """
    epoch_log.nonfinite += 1
    learner.optimizer.zero_grad(set_to_none=True)
    scaler = learner.precision.scaler
    if scaler.is_enabled():  # its own update is skipped too, so that its search backs off here
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
    title: str = "eval",
    control: RunControl | None = None,
) -> list[Scores] | None:
    """Score several schedules in one pass over the data; every image counts once, whatever the number of ranks.

    Args:
        schedules: values of `model(images, r=...)`; None is the model's own.
        agreement: also compare with r = 0 of the same weights.
        title: of the lines of progress.
        control: unreadable images are reported to it, each is a wrong answer. Where it has a `stop`, the ranks look
            together before every batch, and a stop on any of them returns None.

    Raises:
        RunError: too many unreadable images, or outputs that are not finite.
    """
    control = control or RunControl()
    model.eval()
    # correct@1, correct@5, loss, agree, kl, images without finite logits, per schedule; then images and readable images
    sums = torch.zeros(len(schedules), 6, dtype=torch.double, device=dist.device)
    counts = torch.zeros(2, dtype=torch.double, device=dist.device)
    names: list[str] = []
    progress = Progress(loader, len(loader), title, control.log_every, dist.is_main)
    batches = iter(progress)
    for _ in range(max_over_ranks(len(loader), dist)):  # all ranks take as many turns, or they would not stop together
        if control.stop is not None and any_rank(control.stop_requested, dist):
            control.stop_with_others()
            return None
        batch = next(batches, None)  # a rank may have one batch fewer than another
        if batch is None:
            if is_sharded(model):  # which the other ranks cannot call alone
                for r in schedules:
                    model(torch.zeros(1, 3, *model.patch_embed.img_size, device=dist.device), r=r)  # type: ignore[union-attr,misc]
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
    if control.unreadable is not None and names:
        control.unreadable.report(names)
    if sums[:, 5].any():
        row = int(sums[:, 5].argmax())
        at = "" if schedules[row] is None else f" at r={format_schedule(schedules[row])}"
        raise RunError(
            f"{title}: the model's outputs are NaN or infinite for {int(sums[row, 5])} of {int(counts[1])} images{at}; "
            "its weights are damaged or its training diverged (lower --lr, set --clip_grad), or --amp fp16 overflows"
        )
    return [_scores(row, counts, agreement) for row in sums]


@torch.no_grad()
def answers(model: nn.Module, loader: EvalLoader, device: torch.device) -> np.ndarray:
    """Return the most probable class (n,) of every image of a loader."""
    found = [model(batch.images.to(device)).argmax(dim=1).cpu() for batch in loader]
    return torch.cat(found).numpy()


def _score(logits: Tensor, targets: Tensor, valid: Tensor, dense: Tensor | None) -> Tensor:
    """Sum correct@1, correct@5, loss, agree, kl and rows that are not finite over the readable images of a batch."""
    logits, targets = logits[valid].double(), targets[valid]
    if not len(logits):
        return torch.zeros(6, dtype=torch.double, device=logits.device)
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    agree, kl = loss.new_zeros(()), loss.new_zeros(())
    if dense is not None:
        other = dense[valid].double()
        agree = (other.argmax(1) == logits.argmax(1)).sum().double()
        kl = F.kl_div(logits.log_softmax(1), other.log_softmax(1), reduction="sum", log_target=True)
    nonfinite = (~logits.isfinite().all(dim=1)).sum().double()
    return torch.stack((hits[:, 0].sum().double(), hits.any(dim=1).sum().double(), loss, agree, kl, nonfinite))


def _scores(row: Tensor, counts: Tensor, agreement: bool) -> Scores:
    images, readable = counts.tolist()
    correct1, correct5, loss, agree, kl, _ = row.tolist()
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
    """Measure images per second of several models on the same images.

    The models take turns in interleaved rounds, so that their ratios survive a noisy machine.

    Args:
        runs: forward by name.
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
    """Measure the seconds of one call, a GPU's work included."""
    _synchronize(device)
    began = clock()
    call()
    _synchronize(device)
    return clock() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Return the median and both quartiles under the names median, q25 and q75."""
    q25, median, q75 = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "q25": float(q25), "q75": float(q75)}


# Building


def build_precision(args: Namespace, device: torch.device) -> Precision:
    """Build what --amp asks for, by default bf16 on a GPU and full precision on a CPU."""
    name = args.amp or ("bf16" if device.type == "cuda" else "none")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[name]
    return Precision(device.type, dtype, torch.amp.GradScaler(device.type, enabled=name == "fp16"))


def build_learner(
    args: Namespace,
    dist: Distributed,
    module: nn.Module,
    groups: list[dict[str, Any]],
    objective: LossFn,
    precision: Precision,
    mixup: Mixup | None,
    averaged: nn.Module | None = None,
) -> Learner:
    """Wrap the model as asked, and make its optimizer, schedule and average.

    Args:
        module: bare, or spread over the processes.
        averaged: what `sharding.shard` returned, if the module is spread.
        groups: parameters with their weight decay and factors on the rate (`models.parameters.parameter_groups`).
    """
    module.set_grad_checkpointing(args.grad_checkpointing)  # type: ignore[operator]
    ema = build_average(args, module, averaged) if args.model_ema else None
    model: nn.Module = compile_model(module) if args.compile else module
    if dist.distributed and not is_sharded(module):
        ids = [dist.device.index] if dist.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    optimizer = build_optimizer(args, groups, dist.world)
    sharpness = SharpnessAware(module.parameters(), args.sam_rho, args.sam_adaptive) if args.sam_rho else None
    return Learner(
        model=model,
        module=module,
        objective=objective,
        optimizer=optimizer,
        scheduler=build_scheduler(args, optimizer),
        precision=precision,
        dist=dist,
        ema=ema,
        mixup=mixup,
        sharpness=sharpness,
        clip_grad=args.clip_grad,
        accumulation=args.accumulation_steps,
        seed=args.seed,
        ema_updates=0 if args.model_ema_warmup else None,
    )


def build_average(args: Namespace, module: nn.Module, averaged: nn.Module | None = None) -> ModelEmaV3:
    """Build the moving average of the weights; its decay after t updates is t / (9 + t), at most the asked one.

    A constant decay of 0.99996 needs 25,000 updates to forget the initial weights, more than most runs have. With the
    warm-up the average always spans about the last ninth of the updates, be it 100 or 100,000 of them, until the asked
    decay is reached (0.99996 after 225,000 updates, of the 375,000 of DeiT's run). Parameters that do not train are
    their own average, and are held once, but for those of a model that is spread over the processes.

    Args:
        averaged: as for `build_learner`: a model that is spread cannot be copied whole.
    """
    average = ModelEmaV3(
        module if averaged is None else nn.ParameterList([nn.Parameter(torch.zeros(1))]),
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        warmup_gamma=EMA_GAMMA,
        warmup_power=1.0,
    )
    if averaged is not None:
        average.module = averaged.eval()
        copy_tensors(average.module, module)
        return average
    for own, parameter in zip(average.module.parameters(), module.parameters(), strict=True):
        if not parameter.requires_grad:
            own.data = parameter.data
    return average


def build_optimizer(args: Namespace, groups: list[dict[str, Any]], world: int) -> torch.optim.Optimizer:
    """Build timm's optimizer of that name; lr is scaled by the global batch / 512 as in DeiT.

    Raises:
        UserError: timm cannot make it, for instance because a library is missing.
    """
    factor = 1.0 if args.unscale_lr else args.batch_size * args.accumulation_steps * world / 512
    options = {"eps": args.opt_eps, "betas": args.opt_betas}
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


def build_scheduler(args: Namespace, optimizer: torch.optim.Optimizer) -> Scheduler:
    """Build timm's schedule over epochs; `Learner.set_lr` takes it at fractions of them."""
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
    assert scheduler is not None  # only for names that options refuses
    return scheduler


def scheduler_state(scheduler: Scheduler) -> dict[str, Any]:
    """Return all that a schedule remembers; timm's plateau leaves out the counters of the schedule that it wraps."""
    if not isinstance(scheduler, PlateauLRScheduler):
        return scheduler.state_dict()
    return {**scheduler.state_dict(), "inner": scheduler.lr_scheduler.state_dict()}


def load_scheduler_state(scheduler: Scheduler, state: Mapping[str, Any]) -> None:
    """Load what `scheduler_state` returned; states of DeiT and timm have no "inner"."""
    state = dict(state)
    inner = state.pop("inner", None)
    scheduler.load_state_dict(state)
    if inner is not None:
        scheduler.lr_scheduler.load_state_dict(inner)
