"""Objectives: supervised, distillation (soft, hard, by a token), and the full/merged pairing with consistency.

An objective turns (model, images, targets) into {"loss": scalar, part: detached scalar, ...}; the loop knows no more.
The pairing is MCTF's: the same weights are run twice on a batch, merged by the schedule and merged less (the *full*
pass), and the class token of the merged pass is drawn to that of the full pass. Shapes: B batch, K classes, C channels.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from distributed import all_reduce_sum
from models import MergeConfig, MergingViT, UserError
from models.schedule import Inflection, Schedule

Criterion = Callable[[Tensor, Tensor], Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precision to float32, in which losses are computed under autocast; double stays double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Classification:
    """Cross entropy of logits (B,K) with labels (B,) or soft targets (B,K), as DeiT chooses it.

    Args:
        smoothing: of labels; soft targets bring their own.
        bce: binary cross entropy per class instead, with 1 for every class that has any target mass (DeiT-III).
    """

    def __init__(self, smoothing: float = 0.0, bce: bool = False) -> None:
        hard = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
        # threshold 0 makes every class with target mass a 1; smoothing would do so to all, and options refuses it
        binary = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
        self.hard: Criterion = binary if bce else hard
        self.soft: Criterion = binary if bce else SoftTargetCrossEntropy()

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        criterion = self.soft if targets.ndim == 2 else self.hard
        return criterion(at_least_float32(logits), targets)


class Distillation:
    """DeiT's distillation (arXiv 2012.12877): logits (B,K) towards a frozen teacher's on the same images.

    Args:
        teacher: images -> logits (B,K), frozen.
        hard: cross entropy with the teacher's class; otherwise KL at temperature tau, times tau^2 / (B K).
        alpha: weight of this term; 1 - alpha is the weight of the labels.
        whole: compare the model's whole prediction, of a distilled model the mean of both heads, and divide the KL by B
            alone: for a teacher that is the unmerged model itself.
    """

    def __init__(self, teacher: nn.Module, hard: bool, alpha: float, tau: float, whole: bool = False) -> None:
        self.teacher, self.hard, self.alpha, self.tau, self.whole = teacher, hard, alpha, tau, whole

    def __call__(self, logits: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = at_least_float32(self.teacher(images))
        logits = at_least_float32(logits)
        if self.hard:
            return F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        student = F.log_softmax(logits / self.tau, dim=1)
        teacher = F.log_softmax(teacher_logits / self.tau, dim=1)
        # tau^2 undoes the factor 1 / tau^2 of the gradients; DeiT divides by B K, not by B
        count = len(logits) if self.whole else logits.numel()
        return F.kl_div(student, teacher, reduction="sum", log_target=True) * self.tau**2 / count


@dataclass(frozen=True)
class TwoPassConfig:
    """Weights of the merged and the full pass over one model (MCTF, arXiv 2403.10030, section 3.4).

    Attributes:
        merged_weight, full_weight: weights of the two classification losses; with full_weight 0 there is one pass.
        full_r_max: the full pass merges a random r' below it: an integer, or below 1 a ratio in steps of 0.01.
        consistency_weight: weight of the distance between both class tokens.
        threshold: an image counts for the consistency if its merged pass gives the true classes more probability than
            this; 0 means that all images count.
    """

    merged_weight: float = 1.0
    full_weight: float = 0.0
    full_r_max: float = 8
    consistency_weight: float = 0.0
    threshold: float = 0.4

    @property
    def runs_merged(self) -> bool:
        return bool(self.merged_weight or self.consistency_weight)


@dataclass(frozen=True)
class _Pass:
    """The outputs of one forward: `logits` are the model's prediction, the others go into the losses."""

    logits: Tensor
    logits_class: Tensor
    logits_dist: Tensor
    class_token: Tensor | None


class Objective:
    """The training objective: `parts = objective(model, images, targets)`, then `parts["loss"].backward()`.

    Parts, where they apply: "ce" (merged, or only, pass), "distillation", "full_ce", "consistency", "selected" (share
    of the images that counted for the consistency). Parts are not weighted. With a distillation token the class head
    learns from the labels and the other head from the teacher; without one, the same logits do both. Without
    distillation a distilled model's mean of both heads learns from the labels.

    Args:
        criterion: loss of logits and targets.
        passes: weights of the two passes.
        distillation: it acts on the merged pass.
        r: the model's schedule; the full pass and the warm-up derive theirs from it.
        warmup_epochs: r of the merged pass grows linearly from 0 in epoch 0 to r in this epoch.
        seed: seed of the stream that r' is drawn from; the same on all ranks, so that all ranks run the same shapes.
    """

    def __init__(
        self,
        criterion: Criterion,
        passes: TwoPassConfig,
        distillation: Distillation | None = None,
        r: Schedule = 0,
        warmup_epochs: int = 0,
        seed: int = 0,
    ) -> None:
        self.criterion, self.passes, self.distillation = criterion, passes, distillation
        self.r, self.warmup_epochs = r, warmup_epochs
        self.generator = torch.Generator().manual_seed(seed)
        self.full_r: Schedule | None = None
        alpha = distillation.alpha if distillation else 0.0
        self.weights = {
            "ce": passes.merged_weight * (1 - alpha),
            "distillation": passes.merged_weight * alpha,
            "full_ce": passes.full_weight,
            "consistency": passes.consistency_weight,
        }
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Set `r_now`, the schedule of the merged pass; None is the model's own."""
        warming = epoch < self.warmup_epochs
        self.r_now: Schedule | None = warmup_schedule(self.r, epoch, self.warmup_epochs) if warming else None

    def start_update(self) -> None:
        """Draw the r' of an update's full passes; without this call one is drawn for the first batch, and kept."""
        if self.passes.full_weight:
            self.full_r = self.draw_full_r()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the position in the stream of r'; everything else follows from the arguments."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"].cpu())

    def draw_full_r(self) -> Schedule:
        """Draw the next r' of the full pass, in the form of the model's schedule."""
        return with_drawn_r(self.r, draw_r(self.passes.full_r_max, self.generator))

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Compute the loss and its parts; images (B,3,H,W), targets (B,) or (B,K).

        `model` may be wrapped by DDP or compile. With the pairing it runs twice before the backward.
        """
        # the merged pass is first: its dropout and drop-path draw the same numbers with and without a full pass
        merged = self._forward(model, images, self.r_now) if self.passes.runs_merged else None
        if self.full_r is None:
            self.start_update()
        full = self._forward(model, images, self.full_r) if self.passes.full_weight else None
        parts: dict[str, Tensor] = {}
        if merged is not None and self.passes.merged_weight:
            parts["ce"] = self.criterion(merged.logits_class, targets)
            if self.distillation is not None:
                parts["distillation"] = self.distillation(merged.logits_dist, images)
        if full is not None:
            parts["full_ce"] = self.criterion(full.logits_class, targets)
        if merged is not None and full is not None and self.passes.consistency_weight:
            parts |= self._consistency_parts(merged, full, targets)
        terms = [weight * parts[name] for name, weight in self.weights.items() if name in parts]
        return {"loss": torch.stack(terms).sum()} | {name: part.detach() for name, part in parts.items()}

    def _forward(self, model: nn.Module, images: Tensor, r: Schedule | None) -> _Pass:
        by_heads = self.distillation is not None and not self.distillation.whole
        if not by_heads and not self.passes.consistency_weight:
            logits = model(images, r=r)  # nothing else is needed, so that no trace is kept
            return _Pass(logits, logits, logits, None)
        out = model(images, r=r, trace=True)
        if not by_heads:
            return _Pass(out.logits, out.logits, out.logits, out.tokens[:, 0])
        logits_dist = out.logits_class if out.logits_dist is None else out.logits_dist
        return _Pass(out.logits, out.logits_class, logits_dist, out.tokens[:, 0])

    def _consistency_parts(self, merged: _Pass, full: _Pass, targets: Tensor) -> dict[str, Tensor]:
        assert merged.class_token is not None and full.class_token is not None
        # the full pass is the target: the merged pass is drawn to it, not the other way round
        target, token = at_least_float32(full.class_token.detach()), at_least_float32(merged.class_token)
        distance = (target - token).square().mean(dim=1)
        threshold = self.passes.threshold
        # threshold 0 is not "more than 0": a probability may underflow to exactly 0
        selected = confidence(merged.logits, targets) > threshold if threshold else torch.ones_like(distance).bool()
        return {"consistency": global_masked_mean(distance, selected), "selected": selected.float().mean()}


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the probability (B,) that logits (B,K) give to the true class, or to all classes of a mixed image.

    Label smoothing gives every class of a soft target some mass, so that the mixed classes are those with more than the
    least mass of their row.
    """
    probabilities = at_least_float32(logits.detach()).softmax(dim=1)
    if targets.ndim == 1:
        return probabilities.gather(1, targets[:, None])[:, 0]
    mixed = targets > targets.min(dim=1, keepdim=True).values
    return (probabilities * mixed).sum(dim=1)


def global_masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Take the mean of values (B,) where mask (B,) holds, over all ranks; 0 with gradient 0 where it holds nowhere.

    Ranks select different numbers of images, so that the mean of their means would not be the mean. Each rank returns
    its sum over the global count times the number of ranks: DDP averages gradients over the ranks, and the average of
    these is the gradient of the global mean.
    """
    # one exchange sums the counts, and ones, which make the number of ranks
    count, world = all_reduce_sum(torch.stack((mask.sum(), mask.new_ones((), dtype=torch.long)))).to(values.dtype)
    return torch.where(mask, values, 0.0).sum() * world / count.clamp(min=1)


def warmup_schedule(r: Schedule, epoch: int, epochs: int) -> Schedule:
    """Scale a schedule by epoch / epochs, with counts rounded down."""
    if isinstance(r, Inflection):
        return Inflection(r.r * epoch // epochs, r.inflection)
    if isinstance(r, tuple):
        return tuple(int(count) * epoch // epochs for count in r)
    return r * epoch // epochs if isinstance(r, int) else (round(r * epoch / epochs, 6) or 0)


def with_drawn_r(r: Schedule, drawn: float) -> Schedule:
    """Put a drawn r' in the place of a schedule's r; an explicit list is scaled to the mean r', counts rounded down."""
    if isinstance(r, Inflection):
        return Inflection(int(drawn), r.inflection)
    if isinstance(r, tuple):
        return tuple(int(count) * int(drawn) * len(r) // (int(sum(r)) or 1) for count in r)
    return drawn


def draw_r(r_max: float, generator: torch.Generator) -> float:
    """Draw r' uniformly from {0, ..., r_max - 1}, for r_max below 1 from {0, 0.01, ...} below r_max."""
    choices = int(r_max) if r_max >= 1 else math.ceil(round(r_max * 100, 6))  # rounded: 0.07 * 100 is above 7
    drawn = int(torch.randint(choices, (), generator=generator))
    return drawn if r_max >= 1 or not drawn else drawn / 100


def build_objective(args: Namespace, teacher: nn.Module | None = None, model: MergingViT | None = None) -> Objective:
    """Build the objective that the command line asks for.

    Args:
        teacher: a frozen classifier; needed with distillation.
        model: the bare model, whose schedule and tokens are read; needed by the pairing and the warm-up of r.

    Raises:
        UserError: options that contradict the model or do nothing with it.
    """
    passes = TwoPassConfig(
        merged_weight=args.merged_weight,
        full_weight=args.full_weight,
        full_r_max=args.full_r_max,
        consistency_weight=args.consistency_weight,
        threshold=args.consistency_threshold,
    )
    distillation = None
    if args.distillation_type != "none":
        assert teacher is not None, "distillation needs a teacher"
        hard = args.distillation_type == "hard"
        distillation = Distillation(teacher, hard, args.distillation_alpha, args.distillation_tau, whole=args.recover)
    if passes.full_weight or args.r_warmup_epochs:
        assert model is not None, "the pairing and the warm-up of r need the model"
        _check_model(model, passes, args.r_warmup_epochs)
    r = 0 if model is None else model.merge.r
    criterion = Classification(args.smoothing, args.bce_loss)
    return Objective(criterion, passes, distillation, r, args.r_warmup_epochs, args.seed)


def _check_model(model: MergingViT, passes: TwoPassConfig, warmup_epochs: int) -> None:
    """Refuse what the model, whose merging may come from its checkpoint, makes useless."""
    check_merging(model.merge, bool(passes.full_weight), warmup_epochs)
    if passes.consistency_weight and model.cls_token is None:
        raise UserError("--consistency_weight compares class tokens, and this model has none; leave it out")
    if passes.full_weight and passes.full_r_max < 1 and isinstance(model.merge.r, tuple):
        raise UserError("--full_r_max below 1 draws a ratio, but --r is a list of counts; give an integer --full_r_max")


def check_merging(merge: MergeConfig, full_pass: bool, warmup_epochs: int) -> None:
    """Refuse objectives that a merging makes useless.

    Args:
        full_pass: whether there is a pass at a random r'.
        warmup_epochs: epochs over which r grows.
    """
    if not full_pass and not warmup_epochs:
        return
    option = "--full_weight" if full_pass else "--r_warmup_epochs"
    if merge.method == "none":
        raise UserError(f"{option} has no effect without merging; give --r or --merge")
    if warmup_epochs and merge.r == 0:
        raise UserError("--r_warmup_epochs has no effect with r = 0; give --r")


def mixes_images(args: Namespace) -> bool:
    """Tell whether the options ask for Mixup or CutMix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_mixup(args: Namespace, num_classes: int) -> Mixup | None:
    """Build timm's Mixup and CutMix on (images, labels), or None where both are off."""
    if not mixes_images(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
