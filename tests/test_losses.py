"""Objectives: losses.py."""

import math
import os
from argparse import Namespace
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import build
import losses
from build import build_teacher
from losses import (
    Classification,
    Distillation,
    Objective,
    TwoPassConfig,
    build_mixup,
    build_objective,
    confidence,
    draw_r,
    global_masked_mean,
    warmup_schedule,
    with_drawn_r,
)
from models import MergeConfig, MergeOutput, MergingViT, UserError
from models.schedule import Inflection
from options import parse_args

DEFAULTS = {
    "recover": False,
    "distillation_type": "none",
    "teacher_model": "regnety_160",
    "teacher_path": None,
    "distillation_alpha": 0.5,
    "distillation_tau": 1.0,
    "merged_weight": 1.0,
    "full_weight": 0.0,
    "full_r_max": 8,
    "consistency_weight": 0.0,
    "consistency_threshold": 0.4,
    "bce_loss": False,
    "smoothing": 0.0,
    "r_warmup_epochs": 0,
    "seed": 0,
    "input_size": None,
    "batch_size": 8,
    "mixup": 0.0,
    "cutmix": 0.0,
    "cutmix_minmax": None,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
}


def arguments(**options: Any) -> Namespace:
    assert options.keys() <= DEFAULTS.keys()
    return Namespace(**(DEFAULTS | options))


def tiny(merge: MergeConfig | None = None, seed: int = 0, **options: Any) -> MergingViT:
    torch.manual_seed(seed)
    sizes = {
        "image_size": 16,
        "patch_size": 4,
        "num_classes": 5,
        "dim": 24,
        "depth": 3,
        "heads": 3,
        "mlp_dim": 48,
        "num_registers": 2,
    }
    return MergingViT(merge=merge or MergeConfig(method="tome", r=2), **(sizes | options))


def batch(size: int = 6, classes: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=dtype)
    return images, torch.randint(classes, (size,), generator=generator)


class Scripted(nn.Module):
    """Returns given logits and class tokens, merged on the first call and full on the second, and notes its r."""

    def __init__(self, *outputs: tuple[Tensor, Tensor], dist_logits: Tensor | None = None) -> None:
        super().__init__()
        self.outputs, self.dist_logits = list(outputs), dist_logits
        self.calls: list[Any] = []

    def forward(self, images: Tensor, r: Any = None, trace: bool = False) -> Any:
        logits, token = self.outputs[len(self.calls)]
        self.calls.append(r)
        if not trace:
            return logits
        mean = logits if self.dist_logits is None else (logits + self.dist_logits) / 2
        return MergeOutput(mean, token[:, None], *(None,) * 4, logits, self.dist_logits)  # type: ignore[arg-type]


class FixedTeacher(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def log(*odds: float) -> Tensor:
    """Logits whose softmax is odds / sum(odds)."""
    return torch.tensor(odds).log()


# Classification


def test_cross_entropy_by_hand() -> None:
    logits = torch.stack([log(1, 3), log(1, 1)])
    labels = torch.tensor([1, 0])
    plain = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    assert Classification()(logits, labels) == pytest.approx(plain)
    uniform = -(math.log(1 / 4) + math.log(3 / 4) + 2 * math.log(1 / 2)) / 4
    assert Classification(smoothing=0.2)(logits, labels) == pytest.approx(0.8 * plain + 0.2 * uniform)
    soft = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    wanted = -(0.3 * math.log(1 / 4) + 0.7 * math.log(3 / 4) + math.log(1 / 2)) / 2
    assert Classification(smoothing=0.2)(logits, soft) == pytest.approx(wanted)


def test_bce_counts_every_mixed_class_as_one() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    p = logits.sigmoid()[0]
    mixed = Classification(bce=True)(logits, torch.tensor([[0.1, 0.9, 0.0]]))
    assert mixed == pytest.approx(float(-(p[0].log() + p[1].log() + (1 - p[2]).log()) / 3))
    labels = Classification(bce=True)(logits, torch.tensor([1]))
    assert labels == pytest.approx(float(-((1 - p[0]).log() + p[1].log() + (1 - p[2]).log()) / 3))


def test_supervised_is_one_plain_pass_and_differentiable() -> None:
    model, (images, labels) = tiny(), batch()
    parts = build_objective(arguments())(model, images, labels)
    assert parts.keys() == {"loss", "ce"}
    assert parts["loss"].item() == pytest.approx(F.cross_entropy(model(images), labels).item())
    assert parts["loss"].requires_grad
    assert not parts["ce"].requires_grad
    scripted = Scripted((torch.zeros(6, 5), torch.zeros(6, 3)))
    build_objective(arguments())(scripted, images, labels)
    assert scripted.calls == [None]


def test_distilled_model_without_distillation_learns_by_the_mean_of_both_heads() -> None:
    model, (images, labels) = tiny(distilled=True), batch()
    parts = build_objective(arguments())(model, images, labels)
    out = model(images, trace=True)
    assert parts["loss"].item() == pytest.approx(
        F.cross_entropy((out.logits_class + out.logits_dist) / 2, labels).item()
    )


# Distillation


def test_soft_distillation_by_hand() -> None:
    teacher = FixedTeacher(torch.stack([log(1, 1), log(1, 16)]))
    loss = Distillation(teacher, hard=False, alpha=0.5, tau=2.0)(torch.stack([log(1, 9), log(1, 1)]), torch.zeros(2))
    # at tau 2 odds become their square roots: students 1:3 and 1:1, teachers 1:1 and 1:4
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    assert loss.item() == pytest.approx((first + second) * 4 / 4)


def test_hard_distillation_by_hand() -> None:
    teacher = FixedTeacher(torch.tensor([[0.0, 1.0], [5.0, 1.0]]))
    loss = Distillation(teacher, hard=True, alpha=0.5, tau=2.0)(torch.stack([log(1, 3), log(1, 4)]), torch.zeros(2))
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 5)) / 2)
    assert teacher.logits.grad is None


@pytest.mark.parametrize("with_token", [False, True])
def test_class_head_learns_labels_and_the_other_head_the_teacher(with_token: bool) -> None:
    logits, dist_logits = log(1, 3)[None], log(4, 1)[None]
    model = Scripted((logits, torch.zeros(1, 3)), dist_logits=dist_logits if with_token else None)
    args = arguments(distillation_type="hard", distillation_alpha=0.3)
    objective = build_objective(args, FixedTeacher(torch.tensor([[9.0, 0.0]])))
    parts = objective(model, torch.zeros(1, 3, 2, 2), torch.tensor([1]))
    distillation = -math.log(4 / 5) if with_token else -math.log(1 / 4)
    assert parts["ce"].item() == pytest.approx(-math.log(3 / 4))
    assert parts["distillation"].item() == pytest.approx(distillation)
    assert parts["loss"].item() == pytest.approx(0.7 * -math.log(3 / 4) + 0.3 * distillation)


def test_distillation_acts_on_the_merged_pass_of_a_pair() -> None:
    merged, full = (log(1, 3)[None], torch.zeros(1, 2)), (log(1, 1)[None], torch.ones(1, 2))
    distillation = Distillation(FixedTeacher(torch.tensor([[0.0, 9.0]])), hard=True, alpha=0.25, tau=1.0)
    pairing = TwoPassConfig(merged_weight=2.0, full_weight=0.5, consistency_weight=3.0, threshold=0.0)
    parts = Objective(Classification(), pairing, distillation, r=2)(
        Scripted(merged, full), torch.zeros(1, 3, 2, 2), torch.tensor([0])
    )
    wanted = 2 * (0.75 * -math.log(1 / 4) + 0.25 * -math.log(3 / 4)) + 0.5 * math.log(2) + 3 * 1.0
    assert parts["loss"].item() == pytest.approx(wanted)


# Full/merged pairing


def test_pairing_by_hand() -> None:
    merged = (
        torch.stack([log(1, 3), log(1, 1)]).requires_grad_(),
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]).requires_grad_(),
    )
    full = torch.stack([log(1, 1), log(1, 4)]).requires_grad_(), torch.tensor([[3.0, 2.0], [9.0, 9.0]]).requires_grad_()
    pairing = TwoPassConfig(merged_weight=1.0, full_weight=2.0, consistency_weight=3.0, threshold=0.6)
    model = Scripted(merged, full)
    parts = Objective(Classification(), pairing, r=4, seed=1)(model, torch.zeros(2, 3, 2, 2), torch.tensor([1, 1]))
    ce = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    full_ce = -(math.log(1 / 2) + math.log(4 / 5)) / 2
    # only the first image is surer than 0.6: mean over channels of (2, 0) squared
    assert parts["consistency"].item() == pytest.approx(2.0)
    assert parts["selected"].item() == 0.5
    assert parts["ce"].item() == pytest.approx(ce)
    assert parts["full_ce"].item() == pytest.approx(full_ce)
    assert parts["loss"].item() == pytest.approx(ce + 2 * full_ce + 3 * 2.0)
    parts["loss"].backward()
    # d/dx 3 * mean_C (y - x)^2 = -6 (y - x) / C, for the selected image only; the full pass is the target
    torch.testing.assert_close(merged[1].grad, torch.tensor([[-6.0, 0.0], [0.0, 0.0]]))
    assert full[1].grad is None
    assert full[0].grad is not None
    assert model.calls[0] is None
    assert model.calls[1] in range(8)


def test_a_pass_without_weight_is_not_run() -> None:
    images, labels = torch.zeros(1, 3, 2, 2), torch.tensor([0])
    output = (torch.zeros(1, 2), torch.zeros(1, 3))
    merged_only, full_only = Scripted(output), Scripted(output)
    assert Objective(Classification(), TwoPassConfig(), r=4)(merged_only, images, labels).keys() == {"loss", "ce"}
    assert merged_only.calls == [None]
    objective = Objective(Classification(), TwoPassConfig(merged_weight=0, full_weight=1, full_r_max=1), r=4)
    assert objective(full_only, images, labels).keys() == {"loss", "full_ce"}
    assert full_only.calls == [0]


def test_consistency_without_merged_loss_still_runs_both() -> None:
    output = (torch.zeros(1, 2), torch.zeros(1, 3))
    model = Scripted(output, output)
    pairing = TwoPassConfig(merged_weight=0, full_weight=1, consistency_weight=1, threshold=0)
    parts = Objective(Classification(), pairing, r=4)(model, torch.zeros(1, 3, 2, 2), torch.tensor([0]))
    assert parts.keys() == {"loss", "full_ce", "consistency", "selected"}
    assert len(model.calls) == 2


def test_pairing_over_a_model_matches_two_passes_by_hand() -> None:
    model, (images, labels) = tiny(), batch()
    args = arguments(full_weight=1.0, consistency_weight=3.0, consistency_threshold=0.0, seed=5)
    parts = build_objective(args, model=model)(model, images, labels)
    drawn = draw_r(8, torch.Generator().manual_seed(5))
    merged, full = model(images, trace=True), model(images, r=drawn, trace=True)
    distance = (full.tokens[:, 0] - merged.tokens[:, 0]).square().mean()
    ce = [F.cross_entropy(out.logits, labels) for out in (merged, full)]
    assert parts["loss"].item() == pytest.approx((ce[0] + ce[1] + 3 * distance).item(), rel=1e-5)
    assert parts["selected"].item() == 1.0


# The masked mean


def test_nothing_selected_is_exactly_zero_with_zero_gradient() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    mean = global_masked_mean(values, torch.tensor([False, False]))
    assert mean.item() == 0.0
    mean.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 0.0]


def test_masked_mean_and_its_gradient() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    mean = global_masked_mean(values, torch.tensor([True, False, True]))
    mean.backward()
    assert mean.item() == 3.5
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_two_ranks_average_to_the_global_masked_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    values, mask = torch.tensor([1.0, 2.0, 6.0, 4.0]), torch.tensor([True, True, True, False])
    monkeypatch.setattr(losses, "all_reduce_sum", lambda counts: torch.tensor([int(mask.sum()), 2]))
    shares = [global_masked_mean(values[part], mask[part]) for part in (slice(0, 2), slice(2, 4))]
    assert float(sum(shares)) / 2 == pytest.approx(3.0)
    per_rank = [values[part][mask[part]].mean() for part in (slice(0, 2), slice(2, 4))]
    assert float(sum(per_rank)) / 2 != pytest.approx(3.0), "a local mean would be wrong here"


def pair_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    # the threshold lies between the confidences of this batch, so that ranks select different numbers
    args = arguments(full_weight=1.0, consistency_weight=3.0, consistency_threshold=0.2, seed=5)
    parts = build_objective(args, model=tiny())(model, images, labels)
    parts["loss"].backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def pair_on_rank(rank: int, folder: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(tiny().double())
    images, labels = batch(8, dtype=torch.float64)
    gradients = pair_gradients(model, images[rank::2], labels[rank::2])
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    dist.destroy_process_group()


def test_ddp_gradient_of_the_pairing_equals_one_process(tmp_path: Any) -> None:
    model, (images, labels) = tiny().double(), batch(8, dtype=torch.float64)
    selected = confidence(model(images), labels) > 0.2
    assert selected[0::2].sum() != selected[1::2].sum(), "choose another threshold: the ranks should differ"
    wanted = pair_gradients(model, images, labels)
    mp.spawn(pair_on_rank, args=(str(tmp_path),), nprocs=2)
    got = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-12)


# Confidence


def test_confidence_of_labels_and_of_mixed_classes() -> None:
    logits = torch.stack([log(1, 3, 4), log(1, 3, 4), log(1, 3, 4)])
    assert confidence(logits, torch.tensor([0, 1, 2])).tolist() == pytest.approx([1 / 8, 3 / 8, 4 / 8])
    off = 0.1 / 3
    mixed = torch.tensor([[0.9 * 0.3 + off, 0.9 * 0.7 + off, off], [off, off, 0.9 + off], [0.0, 0.5, 0.5]])
    assert confidence(logits, mixed).tolist() == pytest.approx([4 / 8, 4 / 8, 7 / 8])


def test_confidence_of_targets_made_by_timm() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    mixup = build_mixup(arguments(mixup=0.8, cutmix=1.0, smoothing=0.1), num_classes=5)
    assert mixup is not None
    _, targets = mixup(images, labels)
    logits = torch.randn(4, 5)
    p = logits.softmax(dim=1)
    pairs = [{0}, {1, 2}, {2, 1}, {0}]  # mixed with the mirror position
    wanted = [sum(float(row[k]) for k in pair) for row, pair in zip(p, pairs, strict=True)]
    assert confidence(logits, targets).tolist() == pytest.approx(wanted)


def test_threshold_zero_selects_every_image() -> None:
    output = torch.tensor([[-1e4, 0.0]]), torch.zeros(1, 2)  # the true class has probability exactly 0
    full = output[0], torch.ones(1, 2)
    for threshold, wanted in ((0.0, 1.0), (0.1, 0.0)):
        pairing = TwoPassConfig(full_weight=1, consistency_weight=1, threshold=threshold)
        parts = Objective(Classification(), pairing, r=2)(
            Scripted(output, full), torch.zeros(1, 3, 2, 2), torch.tensor([0])
        )
        assert parts["consistency"].item() == wanted


# r of the full pass and of the warm-up


def test_drawn_r_is_uniform_below_its_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([draw_r(8, generator) for _ in range(4000)]))
    assert len(counts) == 8
    assert counts.min() > 400
    ratios = {draw_r(0.35, generator) for _ in range(2000)}
    assert ratios == {k / 100 for k in range(35)}
    assert {draw_r(0.29, generator) for _ in range(2000)} == {k / 100 for k in range(29)}
    assert {draw_r(1, generator) for _ in range(20)} == {0}


@pytest.mark.parametrize(
    ("r", "drawn", "wanted"),
    [
        (16, 5, 5),
        (0.35, 0.2, 0.2),
        (0.35, 3, 3),
        ((16, 0, 8), 4, (8, 0, 4)),
        ((16, 0, 9), 4, (7, 0, 4)),
        ((0, 0), 4, (0, 0)),
        ((), 4, ()),
        (Inflection(16, -1.0), 3, Inflection(3, -1.0)),
    ],
)
def test_drawn_r_takes_the_form_of_the_schedule(r: Any, drawn: float, wanted: Any) -> None:
    got = with_drawn_r(r, drawn)
    assert got == wanted
    assert type(got) is type(wanted)


@pytest.mark.parametrize(
    ("r", "wanted"),
    [
        (16, [0, 4, 8, 12]),
        (5, [0, 1, 2, 3]),
        (0.4, [0, 0.1, 0.2, 0.3]),
        ((16, 0, 8), [(0, 0, 0), (4, 0, 2), (8, 0, 4), (12, 0, 6)]),
        (Inflection(16, -1.0), [Inflection(r, -1.0) for r in (0, 4, 8, 12)]),
    ],
)
def test_warm_up_is_linear_and_ends_at_the_models_own(r: Any, wanted: list[Any]) -> None:
    assert [warmup_schedule(r, epoch, 4) for epoch in range(4)] == wanted
    objective = Objective(Classification(), TwoPassConfig(), r=r, warmup_epochs=4)
    assert objective.r_now == wanted[0]
    for epoch, r_now in [*enumerate(wanted), (4, None), (9, None)]:
        objective.start_epoch(epoch)
        assert objective.r_now == r_now
        tiny()(batch(2)[0], r=r_now)  # it is a schedule that the model takes


def test_the_warm_up_reaches_the_model() -> None:
    objective = Objective(Classification(), TwoPassConfig(), r=16, warmup_epochs=4)
    objective.start_epoch(2)
    model = Scripted((torch.zeros(1, 2), torch.zeros(1, 3)))
    objective(model, torch.zeros(1, 3, 2, 2), torch.tensor([0]))
    assert model.calls == [8]


def test_generator_state_round_trip(tmp_path: Any) -> None:
    def new() -> Objective:
        return Objective(Classification(), TwoPassConfig(full_weight=1, full_r_max=1000), r=4, seed=3)

    first, second = new(), new()
    assert [first.draw_full_r() for _ in range(5)] == [second.draw_full_r() for _ in range(5)]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    ahead = [first.draw_full_r() for _ in range(5)]
    third = new()
    third.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [third.draw_full_r() for _ in range(5)] == ahead
    assert len(set(ahead)) > 1


def test_the_draw_leaves_the_global_stream_alone() -> None:
    objective = Objective(Classification(), TwoPassConfig(full_weight=1), r=4)
    before = torch.get_rng_state()
    objective.draw_full_r()
    assert torch.equal(torch.get_rng_state(), before)


# What a user may get wrong


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--merged_weight 0", "both 0"),
        ("--merged_weight=-1", "--merged_weight"),
        ("--full_weight nan", "--full_weight"),
        ("--consistency_weight 1", "add --full_weight"),
        ("--consistency_threshold 1", "--consistency_threshold"),
        ("--full_weight 1 --full_r_max 8.5", "--full_r_max"),
        ("--full_weight 1 --full_r_max 0", "--full_r_max"),
        ("--smoothing 1", "--smoothing"),
        ("--bce_loss --smoothing 0.1", "add --smoothing 0"),
        ("--r_warmup_epochs=-1", "--r_warmup_epochs"),
        ("--distillation_type sfot", "'none', 'soft', 'hard'"),
        ("--distillation_type soft --distillation_tau 0", "--distillation_tau"),
        ("--distillation_type soft --merged_weight 0 --full_weight 1", "merged pass"),
        ("--cutmix 1 --mixup_mode row", "--mixup_mode"),
        ("--mixup 0.8 --batch_size 7", "even --batch_size, not 7"),
        ("--teacher_path t.pth", "--teacher_path has no effect"),
        ("--distillation_type hard --teacher_model regnety_16O", "did you mean .*regnety_160"),
    ],
)
def test_contradicting_options_are_refused(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(flags.split())


@pytest.mark.parametrize(
    ("options", "model_options", "message"),
    [
        ({"full_weight": 1.0}, {"merge": MergeConfig(method="none")}, "without merging"),
        ({"r_warmup_epochs": 2}, {"merge": MergeConfig(method="none")}, "--r_warmup_epochs has no effect"),
        ({"r_warmup_epochs": 2}, {"merge": MergeConfig(r=0)}, "with r = 0"),
        ({"full_weight": 1.0, "full_r_max": 0.5}, {"merge": MergeConfig(r=(4, 0, 2))}, "list of counts"),
        (
            {"full_weight": 1.0, "consistency_weight": 1.0},
            {"class_token": False, "global_pool": "avg", "num_registers": 0},
            "has none",
        ),
    ],
)
def test_options_that_contradict_the_model_are_refused(
    options: dict[str, Any], model_options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_objective(arguments(**options), model=tiny(**model_options))


# Mixup


def test_mixup_is_off_or_builds() -> None:
    assert build_mixup(arguments(batch_size=7), 5) is None
    mixup = build_mixup(arguments(cutmix_minmax=(0.2, 0.8), smoothing=0.2), 5)
    assert mixup is not None
    _, targets = mixup(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    assert targets.min().item() == pytest.approx(0.2 / 5)


# The teacher

SMALL = "resnet10t"


def test_no_teacher_without_distillation() -> None:
    assert build_teacher(arguments(), 5, "cpu") is None


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w}])
def test_teacher_from_a_file_is_frozen_and_evaluates(wrap: Any, tmp_path: Any) -> None:
    source = timm.create_model(SMALL, num_classes=5).eval()
    torch.save(wrap(source.state_dict()), tmp_path / "t.pth")
    args = arguments(distillation_type="hard", teacher_model=SMALL, teacher_path=str(tmp_path / "t.pth"))
    teacher = build_teacher(args, 5, "cpu")
    assert teacher is not None
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images), source(images))
    with pytest.raises(UserError, match="knows 5 classes, the data has 7: a teacher must know the classes"):
        build_teacher(args, 7, "cpu")


def test_teacher_of_our_own_with_registers(tmp_path: Any) -> None:
    from models.registry import create_model

    source = create_model("deit_digits", num_registers=3).eval()
    torch.save({"model": source.state_dict()}, tmp_path / "t.pth")
    args = arguments(distillation_type="soft", teacher_model="deit_digits", teacher_path=str(tmp_path / "t.pth"))
    teacher = build_teacher(args, 10, "cpu")
    assert teacher is not None
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images), source(images))
    with pytest.raises(UserError, match="knows 10 classes, the data has 7"):
        build_teacher(args, 7, "cpu")


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_missing_and_torn_teacher_files_are_one_line(content: bytes | None, tmp_path: Any) -> None:
    path = tmp_path / "t.pth"
    if content is not None:
        path.write_bytes(content)
    args = arguments(distillation_type="hard", teacher_model=SMALL, teacher_path=str(path))
    with pytest.raises(UserError, match="t.pth") as error:
        build_teacher(args, 5, "cpu")
    assert "\n" not in str(error.value)


def test_teacher_without_network_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("An error happened while trying to locate the file on the Hub")

    args = arguments(distillation_type="hard", teacher_model=SMALL)
    monkeypatch.setattr(build.timm, "create_model", offline)
    with pytest.raises(UserError, match="--teacher_path"):
        build_teacher(args, 5, "cpu")


def test_published_teacher_must_have_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(build.timm, "create_model", lambda name, pretrained: create(name, num_classes=1000))
    with pytest.raises(UserError, match="1000 classes, the data 5"):
        build_teacher(arguments(distillation_type="hard", teacher_model=SMALL), 5, "cpu")
