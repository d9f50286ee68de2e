"""The loops against slow, hand-written oracles: gradients, sharpness, skipping, averaging, scores, speed."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import digits
from tiny import ours
from torch import Tensor, nn

import engine
import options
from datasets import Batch
from distributed import Distributed
from engine import (
    EpochLog,
    Learner,
    Precision,
    RunControl,
    SharpnessAware,
    UnreadableImages,
    build_learner,
    build_precision,
    build_scheduler,
    evaluate,
    load_scheduler_state,
    scheduler_state,
    throughput,
    train_one_epoch,
)
from losses import build_mixup, build_objective
from models import MergeConfig, UserError
from models.parameters import parameter_groups
from utils import RunError, StopSignal

CPU = torch.device("cpu")
ALONE = Distributed(CPU)
PLAIN = Precision("cpu", None, torch.amp.GradScaler("cpu", enabled=False))


def make_learner(
    *flags: object, model: Any = None, double: bool = True, dist: Distributed = ALONE, teacher: Any = None
) -> Learner:
    """A learner of a tiny merging model as main.py builds it, in double precision unless asked otherwise."""
    args = options.parse_args(digits(*flags))
    module = ours(MergeConfig(method="tome", r=2), num_registers=2) if model is None else model
    module = module.double() if double else module.float()
    groups = parameter_groups(module, args.weight_decay)
    objective, mixup = build_objective(args, teacher, module), build_mixup(args, 10)
    return build_learner(args, dist, module, groups, objective, build_precision(args, CPU), mixup)


def make_batch(size: int = 6, seed: int = 0, dtype: torch.dtype = torch.double, bad: tuple[str, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator, dtype=dtype)
    targets = torch.randint(10, (size,), generator=generator)
    return Batch(images, targets, torch.ones(size, dtype=torch.bool), bad)


def join(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([batch[i] for batch in batches]) for i in range(3)), ())  # type: ignore[arg-type]


class Loader:
    """Batches as a training loader gives them."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return iter(self.batches[start:])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def train(
    learner: Learner,
    batches: list[Batch],
    *,
    stop: StopSignal | None = None,
    unreadable: UnreadableImages | None = None,
    max_nonfinite: int = 10,
    set_lr: Callable[[float], float] = lambda epoch: 0.0,
    **options: Any,
) -> bool:
    control = RunControl(stop or StopSignal(), unreadable or UnreadableImages(10), max_nonfinite)
    learner.set_lr = set_lr  # type: ignore[method-assign]
    options.setdefault("epoch_log", EpochLog())
    return train_one_epoch(learner, Loader(batches), control, 0, **options)  # type: ignore[arg-type]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that the engine logs."""
    logged: list[str] = []
    monkeypatch.setattr(engine, "log", logged.append)
    return logged


# Gradients


@pytest.mark.parametrize("flags", [[], ["--r", 2, "--full_weight", 1, "--consistency_weight", 3, "--full_r_max", 4]])
def test_accumulation_equals_the_large_batch(flags: list[object]) -> None:
    flags = [*flags, *(["--consistency_threshold", 0] if flags else []), "--smoothing", 0.1]
    small, large = (make_learner(*flags) for _ in range(2))
    batches = [make_batch(4, seed) for seed in range(3)]
    sums = small.step_gradients(batches, 0, 0)
    wanted = large.step_gradients([join(batches)], 0, 0)
    assert sums.keys() == wanted.keys()
    for name in sums:
        torch.testing.assert_close(sums[name], wanted[name])
    got, grads = gradients(small.module), gradients(large.module)
    assert got.keys() == grads.keys() and max(float(g.abs().max()) for g in grads.values()) > 1e-3
    for name in got:
        torch.testing.assert_close(got[name], grads[name], rtol=1e-9, atol=1e-12)


def test_a_step_draws_the_same_again() -> None:
    learner = make_learner("--mixup", 0.8, "--cutmix", 1)
    learner.module.pos_drop = nn.Dropout(0.3)
    batch = make_batch()
    learner.module.train()
    losses = []
    for epoch, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        torch.rand(3)  # the streams' state before does not matter
        losses.append(float(learner.gradients([batch], epoch, step)["loss"]))
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_sam_without_a_radius_is_the_base_optimizer() -> None:
    assert make_learner("--sam_rho", 0).sharpness is None
    base, still = make_learner(), make_learner()
    still.sharpness = SharpnessAware(still.module.parameters(), 0.0, adaptive=False)
    batches = [make_batch(4, seed) for seed in range(2)]
    for learner in (base, still):
        learner.step_gradients(batches, 0, 0)
        learner.update()
    got, wanted = weights(still.module), weights(base.module)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_by_hand(adaptive: bool) -> None:
    rho = 0.3
    learner = make_learner("--sam_rho", rho, *(["--sam_adaptive"] if adaptive else []), "--smoothing", 0)
    batch, twin = make_batch(), copy.deepcopy(learner.module)
    before = weights(twin)

    def loss() -> Tensor:
        return F.cross_entropy(twin(batch.images), batch.targets)

    names, parameters = zip(*twin.named_parameters(), strict=True)
    first = torch.autograd.grad(loss(), parameters)
    scale = [p.detach().abs() if adaptive else torch.ones_like(p) for p in parameters]
    norm = math.sqrt(sum(((g * s) ** 2).sum().item() for g, s in zip(first, scale, strict=True)))
    with torch.no_grad():
        for parameter, g, s in zip(parameters, first, scale, strict=True):
            parameter += rho * s**2 * g / norm
    wanted = dict(zip(names, torch.autograd.grad(loss(), parameters), strict=True))
    sums = learner.step_gradients([batch], 0, 0)
    got = gradients(learner.module)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-7, atol=1e-10)
    changes = [(got[name] - g).abs().max().item() for name, g in zip(names, first, strict=True)]
    assert max(changes) > 1e-3, "the perturbation should matter in this test"
    after = weights(learner.module)
    assert all(torch.equal(after[name], before[name]) for name in before)
    twin.load_state_dict(before)
    assert float(sums["loss"]) / len(batch.images) == pytest.approx(loss().item())  # the one at the weights themselves


def test_both_passes_of_sam_see_the_same_mixed_images_and_schedule() -> None:
    flags = ("--r", 2, "--full_weight", 1, "--mixup", 0.8, "--sam_rho", 0.1)
    learner = make_learner(*flags)
    seen: list[tuple[Any, Tensor]] = []
    learner.module.register_forward_pre_hook(
        lambda _, inputs, options: seen.append((options["r"], inputs[0].clone())), with_kwargs=True
    )
    batch = make_batch()
    before = batch.images.clone()
    learner.step_gradients([batch], 0, 0)
    assert len(seen) == 4 and torch.equal(batch.images, before)
    for first, second in (seen[0::2], seen[1::2]):
        assert first[0] == second[0] or first is second
    assert seen[0][0] == seen[2][0] and seen[1][0] == seen[3][0]
    assert torch.equal(seen[0][1], seen[2][1]) and not torch.equal(seen[0][1], before)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_clipping_scales_the_whole_gradient(factor: float) -> None:
    learner = make_learner()
    learner.optimizer = torch.optim.SGD(learner.module.parameters(), lr=1.0)
    before = weights(learner.module)
    learner.step_gradients([make_batch()], 0, 0)
    grads = gradients(learner.module)
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    learner.clip_grad = factor * norm
    learner.update()
    for name, old in before.items():
        step = old - dict(learner.module.named_parameters())[name]
        torch.testing.assert_close(step, grads[name] * min(1.0, factor), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("warmup", "decay", "decays"), [(False, 0.9, [0.9] * 4), (True, 0.15, [0, 1 / 10, 0.15, 0.15])]
)
def test_the_average_follows_by_its_formula(warmup: bool, decay: float, decays: list[float]) -> None:
    """The decay after t updates is t / (9 + t), counted from 0, until it reaches the asked one."""
    learner = make_learner("--model_ema_decay", decay, "--model_ema_warmup" if warmup else "--no_model_ema_warmup")
    assert learner.ema is not None
    wanted = {name: tensor.clone() for name, tensor in learner.module.state_dict().items()}
    for step, kept in enumerate(decays):
        learner.step_gradients([make_batch(4, step)], 0, step)
        learner.update()
        for name, tensor in learner.module.state_dict().items():
            wanted[name] = kept * wanted[name] + (1 - kept) * tensor
    for name, tensor in learner.ema.module.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name])
    assert not torch.equal(wanted["head.weight"], learner.module.state_dict()["head.weight"])


@pytest.mark.parametrize("updates", [100, 100_000])
def test_the_average_spans_the_last_part_of_a_run_of_any_length(updates: int) -> None:
    """The weights of the first half of a run have next to no share in its average, those of the last tenth most."""
    ema = make_learner("--model_ema_decay", 0.99996).ema
    assert ema is not None
    decays = np.array([ema.get_decay(step) for step in range(1, updates + 1)])
    shares = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1)  # of the weights after each update
    assert shares.sum() == pytest.approx(1) and decays.prod() == 0  # nothing is left of the initial weights
    assert shares[: updates // 2].sum() < 0.01 and 0.5 < shares[-updates // 9 :].sum() < 0.8


# The loop


def test_an_epoch_counts_samples_and_calls_back_after_every_update() -> None:
    learner = make_learner("--accumulation_steps", 2)
    batches = [make_batch(4, seed) for seed in range(6)]
    log, rates, done = EpochLog(), [], []
    assert train(learner, batches, epoch_log=log, set_lr=lambda e: rates.append(e) or 0.1, after_step=done.append)
    assert (log.samples, done) == (24, [2, 4, 6]) and rates == pytest.approx([0, 1 / 3, 2 / 3])
    later = EpochLog()
    assert train(learner, batches, start=4, epoch_log=later, after_step=done.append)
    assert (later.samples, done[-1]) == (8, 6) and later.means().keys() == {"loss", "ce"}
    assert train(learner, batches, start=6), "nothing left to do is no stop"


def test_a_stop_ends_the_epoch_after_the_update_that_saw_it() -> None:
    stop, done = StopSignal(), []

    def after(step: int) -> None:
        done.append(step)
        if step == 2:
            stop.request("SIGTERM")  # too late for this step: other ranks do not know of it

    assert not train(make_learner(), [make_batch(2, s) for s in range(5)], stop=stop, after_step=after)
    assert done == [1, 2, 3] and stop.requested == "SIGTERM"


def poison(step: int, value: float = float("nan")) -> list[Batch]:
    batches = [make_batch(4, seed) for seed in range(4)]
    batches[step].images[0] = value
    return batches


def test_a_step_that_is_not_finite_is_skipped_and_counted(lines: list[str]) -> None:
    learner, twin = make_learner(), make_learner()
    log, states = EpochLog(), []
    batches = poison(1)
    after = lambda _: states.append(weights(learner.module))  # noqa: E731
    assert train(learner, batches, epoch_log=log, after_step=after)
    assert log.nonfinite == 1 and log.samples == 12 and math.isfinite(log.means()["loss"])
    assert len(lines) == 1 and "micro-batch 2" in lines[0] and "skipped" in lines[0]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # what the skipped step leaves behind is nothing: the others are those of a run that never met it
    train(twin, batches[:1])
    for step in (2, 3):
        twin.step_gradients([batches[step]], 0, step)
        twin.update()
    assert all(torch.equal(tensor, states[3][name]) for name, tensor in weights(twin.module).items())


def test_too_many_of_them_stop_the_run_and_name_the_step() -> None:
    batches = [batch for step in (0, 1, 2) for batch in [poison(step)[step]]]
    with pytest.raises(RunError, match="epoch 0 at micro-batch 2.*--max_nonfinite 1"):
        train(make_learner(), batches, max_nonfinite=1)
    carried = EpochLog(nonfinite=1)  # an earlier epoch's count
    with pytest.raises(RunError, match="micro-batch 1:"):
        train(make_learner(), batches, max_nonfinite=1, epoch_log=carried)


def test_a_gradient_that_is_not_finite_counts_too() -> None:
    learner = make_learner()
    learner.module.head.weight.register_hook(lambda grad: grad * float("inf"))
    before, log = weights(learner.module), EpochLog()
    assert train(learner, [make_batch(4)], epoch_log=log) and log.nonfinite == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(learner.module).items())


def test_the_scaler_of_fp16_finds_its_scale() -> None:
    learner = make_learner("--amp", "fp16", double=False)
    scaler = learner.precision.scaler
    batch = make_batch(4, dtype=torch.float)
    before, log = weights(learner.module), EpochLog()
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**100})
    assert train(learner, [batch], epoch_log=log)
    assert scaler.get_scale() == 2.0**99 and log.nonfinite == 0, "an overflow is part of the search"
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(learner.module).items())
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**10})
    assert train(learner, [batch], epoch_log=log) and math.isfinite(log.means()["loss"])
    assert not torch.equal(before["head.weight"], learner.module.head.weight)
    wrong = batch._replace(images=batch.images * float("nan"))
    assert train(learner, [wrong], epoch_log=log) and log.nonfinite == 1 and scaler.get_scale() == 2.0**9


def test_fp16_gradients_are_clipped_and_perturbed_in_their_own_units() -> None:
    flags = ("--clip_grad", 0.5, "--sam_rho", 0.05)
    plain, half = make_learner(*flags, double=False), make_learner(*flags, "--amp", "fp16", double=False)
    for learner in (plain, half):
        learner.optimizer = torch.optim.SGD(learner.module.parameters(), lr=1.0)
        learner.precision.scaler.load_state_dict({**learner.precision.scaler.state_dict(), "scale": 256.0})
        learner.step_gradients([make_batch(4, dtype=torch.float)], 0, 0)
        learner.update()
    for name, tensor in weights(plain.module).items():
        torch.testing.assert_close(weights(half.module)[name], tensor, rtol=0.05, atol=5e-3)


def test_unreadable_images_are_named_once_and_end_the_run_past_the_limit(lines: list[str]) -> None:
    unreadable = UnreadableImages(2)
    batches = [make_batch(2, bad=("b.png",)), make_batch(2, bad=("a.png", "b.png")), make_batch(2)]
    assert train(make_learner(), batches, unreadable=unreadable)
    assert [line.split()[2] for line in lines] == ["b.png", "a.png"]
    with pytest.raises(RunError, match="3 unreadable images, more than --max_bad_images 2.*c.png"):
        train(make_learner(), [make_batch(2, bad=("c.png",))], unreadable=unreadable)


# Evaluation


class Table(nn.Module):
    """Logits looked up by the value of an image's first pixel, per schedule."""

    def __init__(self, tables: dict[Any, Tensor]) -> None:
        super().__init__()
        self.tables, self.calls = tables, []

    def forward(self, images: Tensor, r: Any = None) -> Tensor:
        self.calls.append(r)
        return self.tables[r][images[:, 0, 0, 0].long()]


def numbered(n: int, size: int, classes: int, unreadable: tuple[int, ...] = ()) -> Loader:
    """n images whose pixels are their number, of class number % classes."""
    batches = []
    for begin in range(0, n, size):
        numbers = torch.arange(begin, min(n, begin + size))
        valid = torch.tensor([int(i) not in unreadable for i in numbers])
        names = tuple(f"{int(i)}.png" for i in numbers[~valid])
        images = (numbers * valid).float()[:, None, None, None].expand(-1, 3, 2, 2)
        batches.append(Batch(images, numbers % classes, valid, names))
    return Loader(batches)


@pytest.mark.parametrize("classes", [3, 10])
def test_scores_by_hand(lines: list[str], classes: int) -> None:
    n, unreadable = 23, (4, 5, 20)
    generator = torch.Generator().manual_seed(1)
    tables = {r: torch.randn(n, classes, generator=generator) for r in (0, 2)}
    loader = numbered(n, 4, classes, unreadable)
    schedules = [2, 0]
    control = RunControl(unreadable=UnreadableImages(5))
    got = evaluate(Table(tables), loader, schedules, PLAIN, ALONE, agreement=True, control=control)  # type: ignore[arg-type]
    readable = [i for i in range(n) if i not in unreadable]
    assert got is not None and len(lines) == 3 and "20.png" in lines[0]
    for r, scores in zip(schedules, got, strict=True):
        logits, dense = tables[r].double(), tables[0].double()
        top = [sorted(range(classes), key=lambda c: -float(logits[i, c])) for i in range(n)]
        assert scores.n_images == n
        assert scores.acc1 == pytest.approx(100 * sum(top[i][0] == i % classes for i in readable) / n)
        assert scores.acc5 == pytest.approx(100 * sum(i % classes in top[i][:5] for i in readable) / n)
        p, q = dense.softmax(1), logits.softmax(1)
        loss = -sum(math.log(q[i, i % classes]) for i in readable) / len(readable)
        kl = sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in readable) / len(readable)
        same = sum(int(dense[i].argmax()) == top[i][0] for i in readable)
        assert (scores.loss, scores.kl) == (pytest.approx(loss), pytest.approx(kl, abs=1e-9))
        assert scores.agree == pytest.approx(100 * same / len(readable))


def test_the_unmerged_pass_is_shared_and_agreement_is_asked_for() -> None:
    model = Table({0: torch.eye(6), 2: torch.eye(6), None: torch.eye(6)})
    loader: Any = numbered(6, 6, 6)
    evaluate(model, loader, [0, 2], PLAIN, ALONE, agreement=True)
    assert model.calls == [0, 2]
    model.calls.clear()
    (scores,) = evaluate(model, loader, [None], PLAIN, ALONE) or ()
    assert model.calls == [None] and scores.agree is None and scores.kl is None and scores.acc1 == 100


def test_an_evaluation_ends_early_past_the_limit_and_on_a_stop() -> None:
    model, loader = Table({None: torch.eye(8)}), numbered(8, 2, 8, (1, 2, 3))
    options: dict[str, Any] = {"precision": PLAIN, "dist": ALONE}
    with pytest.raises(RunError, match="3 unreadable images, more than --max_bad_images 2"):
        evaluate(model, loader, [None], control=RunControl(unreadable=UnreadableImages(2)), **options)  # type: ignore[arg-type]
    stop = StopSignal()
    stop.request("SIGUSR1")
    assert evaluate(model, loader, [None], control=RunControl(stop), **options) is None  # type: ignore[arg-type]
    assert stop.requested == "SIGUSR1"


def test_evaluation_of_nothing_readable_is_zero_and_not_nan() -> None:
    (scores,) = evaluate(Table({None: torch.eye(2)}), numbered(2, 2, 2, (0, 1)), [None], PLAIN, ALONE) or ()  # type: ignore[arg-type]
    assert (scores.acc1, scores.loss, scores.n_images) == (0, 0, 2)
    json.dumps(vars(scores))


# Speed


def test_throughput_interleaves_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr("engine.time.perf_counter", lambda: clock[0])

    def forward(name: str, seconds: Callable[[int], float]) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            order.append(name)
            clock[0] += seconds(order.count(name))
            return images

        return run

    runs = {"fast": forward("fast", lambda n: 0.5 if n > 2 else 9.0), "slow": forward("slow", lambda n: 1.0)}
    speeds = throughput(runs, torch.zeros(4, 3, 2, 2), PLAIN, seconds=80)
    assert order[4:] == ["fast", "slow"] * speeds["fast"]["rounds"] and speeds["fast"]["rounds"] == 8
    assert speeds["fast"] == {"median": 8.0, "q25": 8.0, "q75": 8.0, "rounds": 8}
    assert speeds["slow"]["median"] == 4.0
    assert throughput(runs, torch.zeros(4, 3, 2, 2), PLAIN, seconds=0)["slow"]["rounds"] == 5


# Building


@pytest.mark.parametrize("name", ["cosine", "tanh", "step", "multistep", "plateau", "poly"])
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler:FutureWarning")
def test_a_schedule_goes_on_where_it_was_saved(name: str) -> None:
    args = options.parse_args(
        digits("--sched", name, "--epochs", 12, "--warmup_epochs", 2, "--patience_epochs", 1, "--decay_epochs", 3)
    )

    def make() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, build_scheduler(args, optimizer)

    def rates(optimizer: Any, scheduler: Any, epochs: range) -> list[float]:
        found = []
        for epoch in epochs:
            scheduler.step(epoch, 50.0)  # an accuracy that does not improve
            found.append(optimizer.param_groups[0]["lr"])
        return found

    (optimizer, scheduler), (again, resumed) = make(), make()
    wanted = rates(optimizer, scheduler, range(12))
    first, before = make()
    got = rates(first, before, range(5))
    again.load_state_dict(first.state_dict())
    load_scheduler_state(resumed, json.loads(json.dumps(scheduler_state(before))))
    assert got + rates(again, resumed, range(5, 12)) == wanted
    assert len(set(wanted)) >= (3 if name == "multistep" else 4)  # its steps are at epochs 90, 180, ...


def test_lr_is_scaled_by_the_global_batch() -> None:
    def rate(*flags: object) -> float:
        return make_learner("--lr", 0.512, "--batch_size", 8, *flags).optimizer.param_groups[0]["lr"]

    assert rate() == pytest.approx(0.008)
    assert rate("--accumulation_steps", 4) == pytest.approx(0.032)
    assert rate("--lr_times", 0.5) == pytest.approx(0.004)
    assert rate("--unscale_lr", "--accumulation_steps", 4) == pytest.approx(0.512)


@pytest.mark.parametrize("flags", [["--opt", "adamx"], ["--opt", "adahessian"], ["--opt", "fusedlamb"]])
def test_an_optimizer_that_cannot_be_used_is_refused_before_training(flags: list[str]) -> None:
    with pytest.raises(UserError, match="--opt"):
        make_learner(*flags)
