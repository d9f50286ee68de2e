"""Do protected registers matter? Token merging (ToMe's place) under the right rule and under two wrong ones.

The two wrong rules exist here only, to be measured; the core knows neither.

- protected: prefix tokens are set aside, as everywhere in RegToMe.
- published: what the published Registers-Merging code does. The sequence is [class, patches, registers], sources are
  the even places and destinations the odd ones of the *whole* sequence; the class token is no source, and the last
  four destinations (whatever they are, however many registers there are) receive nothing.
- unprotected: plain ToMe on [class, registers, patches]: only the class token is safe.

All rules merge the same number of tokens in every block. Shapes: B batch, N tokens, P prefix tokens, R registers,
n patches, D key channels, S sources, T destinations.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.blocks import Candidates
from models.errors import UserError
from models.merging import Merge, cosine_scores, group_map, match_bipartite, match_scores, merge_sizes, merge_tokens
from models.methods.tome import ToMe, patch_keys
from models.tokens import Tokens
from models.vit import MergingViT

RULES = ("protected", "published", "unprotected")
_MASKED = 4  # destinations that the published code takes for its registers


@dataclass(frozen=True)
class RuleOutput:
    """Logits (B,classes), and per block the registers (B,depth) that still stand alone in a token."""

    logits: Tensor
    alone: Tensor
    counts: tuple[int, ...]  # tokens after every block


def match_rule(rule: str, metric: Tensor, r: int, prefix: int) -> Merge:
    """The r pairs that a rule merges; metric (B,N,D) of the whole sequence in the rule's order, prefix = 1 + R."""
    if rule == "protected":
        return match_bipartite(metric[:, prefix:], r, prefix)
    scores = cosine_scores(metric, 0)
    scores[:, 0] = -torch.inf  # the class token is the first source
    if rule == "published":
        scores[:, :, -_MASKED:] = -torch.inf
    return match_scores(scores, r, 0)


def arrange(rule: str, x: Tensor, registers: int) -> tuple[Tensor, Tensor]:
    """Tokens [class, registers, patches] in a rule's order, and the places (R,) of the registers in it."""
    places = torch.arange(1, 1 + registers, device=x.device)
    if rule != "published":
        return x, places
    ordered = torch.cat((x[:, :1], x[:, 1 + registers :], x[:, 1 : 1 + registers]), dim=1)
    return ordered, places + (x.shape[1] - 1 - registers)


@torch.no_grad()
def forward_under(model: MergingViT, images: Tensor, rule: str, r: Any = None) -> RuleOutput:
    """The model's forward with another rule of who may merge.

    Args:
        images: (B,3,H,W).
        rule: one of `RULES`; "protected" gives the model's own logits.
        r: another schedule than the model's.

    Raises:
        UserError: a model that the published rule makes no sense for.
    """
    check_model(model)
    tokens = model.embed(images)
    plan, enter = model.plan(r, tokens.x.shape[1]), _Entrance(model, rule)
    alone, counts = [], []
    for layer in model.layers(tokens, plan, _MergingRule(rule, model), enter):
        tokens = layer.after
        alone.append(standing_alone(tokens.group, enter.positions, tokens.x.shape[1]))
        counts.append(tokens.x.shape[1])
    logits = model.head(model.head_drop(model.fc_norm(model.norm(tokens.x)[:, 0])))
    return RuleOutput(logits, torch.stack(alone, dim=1), tuple(counts))


class _MergingRule(ToMe):
    """A rule of who may merge, in ToMe's place; tokens carry no prefix, for two of the rules do not set one aside."""

    def __init__(self, rule: str, model: MergingViT) -> None:
        values = {"rule": rule, "protected": model.num_prefix_tokens, "prop_attn": model.merge.prop_attn}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # methods are frozen

    def match(self, candidates: Candidates) -> Merge:
        """The rule's pairs, by the keys of all tokens."""
        return match_rule(self.rule, patch_keys(candidates), candidates.plan.r, self.protected)  # type: ignore[attr-defined]


class _Entrance:
    """Prefix tokens enter and are arranged in a rule's order; from there on all tokens count as patches."""

    def __init__(self, model: MergingViT, rule: str) -> None:
        self.model, self.rule = model, rule
        self.positions = torch.empty(0)  # of the registers, once they have entered

    def __call__(self, layer: int, tokens: Tokens) -> Tokens:
        if layer:
            return tokens
        tokens = self.model.enter(0, tokens)
        x, self.positions = arrange(self.rule, tokens.x, self.model.num_registers)
        everything = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return tokens._replace(x=x, num_prefix_tokens=0, followed=everything)


def standing_alone(group: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Registers that share their token with nothing: group (B,N) of all first tokens, places (R,) -> (B,)."""
    members = torch.zeros(len(group), tokens, dtype=torch.long, device=group.device)
    members.scatter_add_(1, group, torch.ones_like(group))
    return (members.gather(1, group[:, places]) == 1).sum(dim=1)


def check_model(model: MergingViT) -> None:
    """Raise a UserError where the rules are not defined."""
    problem = None
    if model.num_class_tokens != 1 or model.global_pool != "token":
        problem = "it does not classify by one class token"
    elif model.register_layer or model.class_layer:
        problem = "its prefix tokens enter late"
    elif model.merge.method not in ("none", "tome"):
        problem = f"it merges by {model.merge.method}; the published rule is one for tome"
    elif model.merge.bidirectional or model.merge.pooling != "size":
        problem = "it merges both ways or pools other than by size"
    if problem:
        raise UserError(f"dynamics cannot compare the rules on this model: {problem}")


@dataclass(frozen=True)
class Simulation:
    """Random keys instead of a model: iid normal, or of neighbouring patches with a correlation."""

    images: int = 256
    patches: int = 196
    channels: int = 64
    correlation: float = 0.0

    def draw(self, registers: int, generator: torch.Generator) -> Tensor:
        """Keys (images, 1 + R + n, D) of [class, registers, patches]; a patch correlates with the one before."""
        x = torch.randn(self.images, 1 + registers + self.patches, self.channels, generator=generator)
        fresh = (1 - self.correlation**2) ** 0.5
        for i in range(2 + registers, x.shape[1]):
            x[:, i] = self.correlation * x[:, i - 1] + fresh * x[:, i]
        return x


def simulate(
    rule: str, merges: tuple[int, ...], registers: int = 4, keys: Simulation | None = None, seed: int = 0
) -> list[float]:
    """Mean number of registers that stand alone after every block, with keys that are drawn once and merged by size."""
    keys = keys or Simulation()
    x, places = arrange(rule, keys.draw(registers, torch.Generator().manual_seed(seed)), registers)
    size, alone = torch.ones(x.shape[:2]), []
    group = torch.arange(x.shape[1]).expand(len(x), -1)
    for merge in merges:
        if merge:
            step = match_rule(rule, x, merge, 1 + registers)
            x, size = merge_tokens(x, step, size), merge_sizes(size, step)
            group = group_map(step).gather(1, group)
        alone.append(float(standing_alone(group, places, x.shape[1]).float().mean()))
    return alone


@dataclass
class Tally:
    """Sums over images for one cell of the ablation (a rule, R and r)."""

    kl: float = 0.0
    alone: Tensor | float = 0.0  # (depth,)
    agreed: tuple[Tensor, ...] = ()  # (B,) per batch: same top-1 as the unmerged model
    correct: tuple[Tensor, ...] = ()  # (B,) per batch, empty without labels

    def add(self, out: RuleOutput, dense: Tensor, targets: Tensor | None) -> None:
        """Count a batch; dense (B,classes) are logits of the same model without merging."""
        top = out.logits.argmax(dim=1)
        self.agreed += ((top == dense.argmax(dim=1)).cpu(),)
        self.correct += ((top == targets.to(top.device)).cpu(),) if targets is not None else ()
        log_p, log_q = dense.double().log_softmax(dim=1), out.logits.double().log_softmax(dim=1)
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())
        self.alone = self.alone + out.alone.double().sum(dim=0).cpu()

    def row(self, reference: "Tally") -> dict[str, Any]:
        """Means (% and nats) with standard errors; agreement also as a difference to a reference on the same images."""
        agreed = torch.cat(self.agreed)
        row: dict[str, Any] = {"n_images": len(agreed), "agree": mean_percent(agreed), "kl": self.kl / len(agreed)}
        row["agree_se"] = error_percent(agreed)
        paired = agreed.double() - torch.cat(reference.agreed).double()
        row |= {"agree_minus_protected": mean_percent(paired), "agree_minus_protected_se": error_percent(paired)}
        if self.correct:
            correct = torch.cat(self.correct)
            row |= {"acc1": mean_percent(correct), "acc1_se": error_percent(correct)}
        alone = torch.as_tensor(self.alone) / len(agreed)
        return row | {"registers_alone": alone.tolist(), "registers_alone_last": float(alone[-1])}


def mean_percent(values: Tensor) -> float:
    """100 times the mean."""
    return 100 * float(values.double().mean())


def error_percent(values: Tensor) -> float:
    """100 times the standard error of the mean."""
    return 100 * float(values.double().std(correction=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
