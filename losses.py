"""Objectives: supervised, distillation (soft, hard, by a token), and the full/merged pairing with consistency.

An objective turns (model, images, targets) into {"loss": scalar, part: detached scalar, ...}; the loop knows
no more. Shapes: B batch, K classes, C channels.
"""

import difflib
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from checkpoint import load_checkpoint
from distributed import all_reduce_sum
from models import MergingViT, UserError
from models.registry import NAMES, create_model, quick_when_offline, timm_name
from models.schedule import Inflection, Schedule
from models.weights import extract_state_dict, load_weights, unwrap_state_dict

Criterion = Callable[[Tensor, Tensor], Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32 under autocast; double stays double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Classification:
    """Cross entropy of logits (B,K) with labels (B,) or soft targets (B,K), as DeiT chooses it.

    Args:
        smoothing: of labels; soft targets bring their own.
        bce: binary cross entropy per class instead, with 1 for every class that has any target mass (DeiT-III).
    """

    def __init__(self, smoothing: float = 0.0, bce: bool = False) -> None:
        hard = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
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
        alpha: weight of this term, 1 - alpha is that of the labels.
    """

    def __init__(self, teacher: nn.Module, hard: bool, alpha: float, tau: float) -> None:
        self.teacher, self.hard, self.alpha, self.tau = teacher, hard, alpha, tau

    def __call__(self, logits: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = at_least_float32(self.teacher(images))
        logits = at_least_float32(logits)
        if self.hard:
            return F.cross_entropy(logits, wanted.argmax(dim=1))
        student, wanted = (F.log_softmax(x / self.tau, dim=1) for x in (logits, wanted))
        return F.kl_div(student, wanted, reduction="sum", log_target=True) * self.tau**2 / logits.numel()


@dataclass(frozen=True)
class Pairing:
    """Weights of the merged and the full pass over one model (MCTF, arXiv 2403.10030, section 3.4).

    Attributes:
        merged_weight, full_weight: of the two classification losses; full_weight 0 means one pass.
        full_r_max: the full pass merges a random r' below it: an integer, or below 1 a ratio in steps of 0.01.
        consistency_weight: of the distance between both class tokens.
        threshold: only images whose merged pass gives the true classes more probability count; 0 means all.
    """

    merged_weight: float = 1.0
    full_weight: float = 0.0
    full_r_max: float = 8
    consistency_weight: float = 0.0
    threshold: float = 0.4

    def __post_init__(self) -> None:
        for name in ("merged_weight", "full_weight", "consistency_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} must be a number >= 0, not {getattr(self, name)}")
        if self.merged_weight == self.full_weight == 0:
            raise UserError("--merged_weight and --full_weight are both 0: there is nothing to train; set one of them")
        if self.consistency_weight and not self.full_weight:
            raise UserError("--consistency_weight has no effect without the full pass; add --full_weight 1")
        if not 0 <= self.threshold < 1:
            raise UserError(f"--consistency_threshold must be in [0, 1), not {self.threshold}")
        if not self.full_r_max > 0 or (self.full_r_max >= 1 and self.full_r_max != int(self.full_r_max)):
            raise UserError(f"--full_r_max must be an integer >= 1 or a ratio between 0 and 1, not {self.full_r_max}")

    @property
    def runs_merged(self) -> bool:
        return bool(self.merged_weight or self.consistency_weight)


@dataclass(frozen=True)
class _Pass:
    """What a forward left behind; `logits` is what the model predicts with, the others feed the losses."""

    logits: Tensor
    logits_class: Tensor
    logits_dist: Tensor
    class_token: Tensor | None


class Objective:
    """The training objective: `parts = objective(model, images, targets)`, then `parts["loss"].backward()`.

    Parts, where they apply: "ce" (merged, or only, pass), "distillation", "full_ce", "consistency", "selected" (share
    of the images that counted for the consistency). A part is not weighted. With a distillation token the class head
    learns from the labels and the other head from the teacher; without one, the same logits do both. Without
    distillation a distilled model's mean of both heads learns from the labels.

    Args:
        criterion: loss of logits and targets.
        pairing: weights of the two passes.
        distillation: acts on the merged pass.
        r: the model's schedule; the pairing and the warm-up derive theirs from it.
        warmup_epochs: r of the merged pass grows linearly from 0 in epoch 0 to r in this epoch.
        seed: of the stream that r' comes from; the same on all ranks, so that all ranks run the same shapes.
    """

    def __init__(
        self,
        criterion: Criterion,
        pairing: Pairing,
        distillation: Distillation | None = None,
        r: Schedule = 0,
        warmup_epochs: int = 0,
        seed: int = 0,
    ) -> None:
        self.criterion, self.pairing, self.distillation = criterion, pairing, distillation
        self.r, self.warmup_epochs = r, warmup_epochs
        self.generator = torch.Generator().manual_seed(seed)
        alpha = distillation.alpha if distillation else 0.0
        self.weights = {
            "ce": pairing.merged_weight * (1 - alpha),
            "distillation": pairing.merged_weight * alpha,
            "full_ce": pairing.full_weight,
            "consistency": pairing.consistency_weight,
        }
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Set `r_now`, the schedule of the merged pass; None is the model's own."""
        warming = epoch < self.warmup_epochs
        self.r_now: Schedule | None = ramped(self.r, epoch, self.warmup_epochs) if warming else None

    def state_dict(self) -> dict[str, Tensor]:
        """The position in the stream of r'; everything else follows from the arguments."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"].cpu())

    def draw_full_r(self) -> Schedule:
        """The next r' of the full pass, in the form of the model's schedule."""
        return replaced(self.r, draw_r(self.pairing.full_r_max, self.generator))

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss and its parts; images (B,3,H,W), targets (B,) or (B,K).

        `model` may be wrapped by DDP or compile. With the pairing it runs twice before the backward.
        """
        merged = self._forward(model, images, self.r_now) if self.pairing.runs_merged else None
        full = self._forward(model, images, self.draw_full_r()) if self.pairing.full_weight else None
        parts: dict[str, Tensor] = {}
        if merged is not None and self.pairing.merged_weight:
            parts["ce"] = self.criterion(merged.logits_class, targets)
            if self.distillation is not None:
                parts["distillation"] = self.distillation(merged.logits_dist, images)
        if full is not None:
            parts["full_ce"] = self.criterion(full.logits_class, targets)
        if merged is not None and full is not None and self.pairing.consistency_weight:
            parts |= self._consistency_parts(merged, full, targets)
        terms = [weight * parts[name] for name, weight in self.weights.items() if name in parts]
        return {"loss": torch.stack(terms).sum()} | {name: part.detach() for name, part in parts.items()}

    def _forward(self, model: nn.Module, images: Tensor, r: Schedule | None) -> _Pass:
        if self.distillation is None and not self.pairing.consistency_weight:
            logits = model(images, r=r)
            return _Pass(logits, logits, logits, None)
        out = model(images, r=r, trace=True)
        if self.distillation is None:
            return _Pass(out.logits, out.logits, out.logits, out.tokens[:, 0])
        logits_dist = out.logits_class if out.logits_dist is None else out.logits_dist
        return _Pass(out.logits, out.logits_class, logits_dist, out.tokens[:, 0])

    def _consistency_parts(self, merged: _Pass, full: _Pass, targets: Tensor) -> dict[str, Tensor]:
        assert merged.class_token is not None and full.class_token is not None
        wanted, token = at_least_float32(full.class_token.detach()), at_least_float32(merged.class_token)
        distance = (wanted - token).square().mean(dim=1)
        threshold = self.pairing.threshold
        selected = confidence(merged.logits, targets) > threshold if threshold else torch.ones_like(distance).bool()
        return {"consistency": global_masked_mean(distance, selected), "selected": selected.float().mean()}


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """Probability (B,) that logits (B,K) give to the true class, or to all classes mixed into soft targets.

    Label smoothing gives every class some mass, so the mixed classes are those above the least mass of their row.
    """
    probabilities = at_least_float32(logits.detach()).softmax(dim=1)
    if targets.ndim == 1:
        return probabilities.gather(1, targets[:, None])[:, 0]
    mixed = targets > targets.min(dim=1, keepdim=True).values
    return (probabilities * mixed).sum(dim=1)


def global_masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B,) where mask (B,) holds, over all ranks; exactly 0, with gradient 0, where it never does.

    A rank returns its share times the number of ranks: DDP's mean of gradients is then the gradient of the global mean.
    """
    count, world = all_reduce_sum(torch.stack((mask.sum(), mask.new_ones((), dtype=torch.long)))).to(values.dtype)
    return torch.where(mask, values, 0.0).sum() * world / count.clamp(min=1)


def ramped(r: Schedule, step: int, steps: int) -> Schedule:
    """A schedule's r times step / steps, counts rounded down."""
    if isinstance(r, Inflection):
        return Inflection(r.r * step // steps, r.inflection)
    if isinstance(r, tuple):
        return tuple(int(count) * step // steps for count in r)
    return r * step // steps if isinstance(r, int) else (round(r * step / steps, 6) or 0)


def replaced(r: Schedule, drawn: float) -> Schedule:
    """A schedule with the drawn r' for its r; an explicit list is scaled to the mean r', counts rounded down."""
    if isinstance(r, Inflection):
        return Inflection(int(drawn), r.inflection)
    if isinstance(r, tuple):
        return tuple(int(count) * int(drawn) * len(r) // (int(sum(r)) or 1) for count in r)
    return drawn


def draw_r(r_max: float, generator: torch.Generator) -> float:
    """Uniform r' in {0, ..., r_max - 1}, for r_max below 1 in {0, 0.01, ...} below r_max."""
    choices = int(r_max) if r_max >= 1 else math.ceil(round(r_max * 100, 6))
    drawn = int(torch.randint(choices, (), generator=generator))
    return drawn if r_max >= 1 or not drawn else drawn / 100


def build_objective(args: Namespace, teacher: nn.Module | None = None, model: MergingViT | None = None) -> Objective:
    """The objective that the command line asks for.

    Args:
        teacher: what `build_teacher` made; needed with distillation.
        model: not wrapped; its schedule and tokens are read. Needed by the pairing and the warm-up of r.

    Raises:
        UserError: options that contradict each other, the model, or do nothing.
    """
    pairing = Pairing(
        merged_weight=args.merged_weight,
        full_weight=args.full_weight,
        full_r_max=args.full_r_max,
        consistency_weight=args.consistency_weight,
        threshold=args.consistency_threshold,
    )
    warmup = args.r_warmup_epochs
    if warmup < 0:
        raise UserError(f"--r_warmup_epochs must be >= 0, not {warmup}")
    if pairing.full_weight or warmup:
        if model is None:
            raise ValueError("the pairing and the warm-up of r need the model")
        _check_model(model, pairing, warmup)
    r = 0 if model is None else model.merge.r
    return Objective(_build_criterion(args), pairing, _build_distillation(args, teacher), r, warmup, args.seed)


def _check_model(model: MergingViT, pairing: Pairing, warmup: int) -> None:
    option = "--full_weight" if pairing.full_weight else "--r_warmup_epochs"
    if model.merge.method == "none":
        raise UserError(f"{option} has no effect without merging; give --r or --merge")
    if warmup and model.merge.r == 0:
        raise UserError("--r_warmup_epochs has no effect with r = 0; give --r")
    if pairing.consistency_weight and model.cls_token is None:
        raise UserError("--consistency_weight compares class tokens, and this model has none; leave it out")
    if pairing.full_weight and pairing.full_r_max < 1 and isinstance(model.merge.r, tuple):
        raise UserError("--full_r_max below 1 draws a ratio, but --r is a list of counts; give an integer --full_r_max")


def _build_criterion(args: Namespace) -> Classification:
    if not 0 <= args.smoothing < 1:
        raise UserError(f"--smoothing must be in [0, 1), not {args.smoothing}")
    if args.bce_loss and args.smoothing:
        raise UserError("--bce_loss trains on hard 0/1 targets, which smoothing contradicts; add --smoothing 0")
    return Classification(args.smoothing, args.bce_loss)


def _build_distillation(args: Namespace, teacher: nn.Module | None) -> Distillation | None:
    if args.distillation_type == "none":
        return None
    if args.distillation_type not in ("soft", "hard"):
        raise UserError(f"--distillation_type must be none, soft or hard, not {args.distillation_type!r}")
    if not 0 <= args.distillation_alpha <= 1 or not args.distillation_tau > 0:
        raise UserError("--distillation_alpha must be in [0, 1] and --distillation_tau above 0")
    if not args.merged_weight:
        raise UserError("--distillation_type acts on the merged pass; it needs --merged_weight above 0")
    if teacher is None:
        raise ValueError("distillation needs a teacher")
    return Distillation(teacher, args.distillation_type == "hard", args.distillation_alpha, args.distillation_tau)


def build_teacher(args: Namespace, num_classes: int, device: torch.device | str) -> nn.Module | None:
    """The frozen teacher on `device` in evaluation mode, or None without distillation.

    Any timm model name, with weights from --teacher_path (file or URL) or published ones.

    Raises:
        UserError: unknown name, no weights to be had, or not of these classes.
    """
    name, path = args.teacher_model, args.teacher_path
    if args.distillation_type == "none":
        if path:
            raise UserError("--teacher_path has no effect without distillation; add --distillation_type hard or soft")
        return None
    if name not in NAMES and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"unknown teacher model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    if path:
        teacher = _teacher_from_file(name, path, num_classes, args.input_size)
    else:
        teacher = _published_teacher(timm_name(name), num_classes)
    return teacher.to(device).eval().requires_grad_(False)


def _teacher_from_file(name: str, path: str, num_classes: int, img_size: int | None) -> nn.Module:
    """A model of ours by our loading, any other by timm's, which knows the older names of each family."""
    weights = unwrap_state_dict(load_checkpoint(path), ema=True, source=path)
    if name in NAMES:
        return _own_teacher(name, weights, path, num_classes, img_size)
    overlay: dict[str, Any] = {"state_dict": weights, "num_classes": num_classes, "custom_load": False}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)
    except (RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--teacher_path {path} does not fit {name} with {num_classes} classes: {reason}") from error


def _own_teacher(name: str, weights: dict[str, Tensor], path: str, num_classes: int, img_size: int | None) -> nn.Module:
    weights, _ = extract_state_dict(weights, source=path)
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else None
    teacher = create_model(name, num_registers=registers, num_classes=num_classes, img_size=img_size)
    load_weights(teacher, weights, num_classes_changed_ok=False, source=path, name=name)
    return teacher


def _published_teacher(name: str, num_classes: int) -> nn.Module:
    try:
        with quick_when_offline():
            teacher = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        reason = f"{type(error).__name__}; no network?"
        raise UserError(f"cannot get weights of teacher {name} ({reason}); give a file with --teacher_path") from error
    if teacher.num_classes != num_classes:
        raise UserError(
            f"teacher {name} has {teacher.num_classes} classes, the data {num_classes}; give one by --teacher_path"
        )
    return teacher


def build_mixup(args: Namespace, num_classes: int) -> Mixup | None:
    """timm's Mixup and CutMix on (images, labels), or None where both are off.

    Raises:
        UserError: an odd batch size (an image is mixed with its mirror position), or an unknown mode.
    """
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return None
    if args.batch_size % 2:
        raise UserError(f"mixup and cutmix need an even --batch_size, not {args.batch_size}; or --mixup 0 --cutmix 0")
    if args.mixup_mode not in ("batch", "pair", "elem"):
        raise UserError(f"--mixup_mode must be batch, pair or elem, not {args.mixup_mode!r}")
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
