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

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.blocks import Candidates
from models.config import MergeConfig
from models.errors import UserError
from models.merging import Merge, cosine_scores, group_map, match_bipartite, match_scores, merge_sizes, merge_tokens
from models.methods.tome import ToMe, patch_keys
from models.schedule import format_schedule, parse_schedule
from models.tokens import Tokens
from models.vit import MergingViT, apply_merging

from . import charts
from .inputs import ImageBatches, as_list, batches, evaluation, labelled_batches
from .intervals import LEAST

if TYPE_CHECKING:
    from .command import Loaded

RULES = ("protected", "published", "unprotected")
STYLES = {"protected": "-", "published": "--", "unprotected": ":"}
SCHEDULES = ("8", "13", "16")
_MASKED = 4  # destinations that the published code takes for its registers


@dataclass(frozen=True)
class RuleOutput:
    """The predictions of a model under a rule, and the fate of its registers."""

    logits: Tensor  # (B,classes)
    alone: Tensor  # (B,depth) registers that still stand alone in a token after every block
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


def arrange(rule: str, tokens: int, registers: int) -> tuple[Tensor | slice, Tensor]:
    """The order of the tokens [class, registers, patches] by a rule, and the places (R,) of the registers in it."""
    places = torch.arange(1, 1 + registers)
    if rule != "published":
        return slice(None), places
    every = torch.arange(tokens)
    order = torch.cat((every[:1], every[1 + registers :], every[1 : 1 + registers]))
    return order, places + (tokens - 1 - registers)


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
        order, places = arrange(self.rule, tokens.x.shape[1], self.model.num_registers)
        x, self.positions = tokens.x[:, order], places.to(tokens.x.device)
        everything = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        positions = None if tokens.positions is None else tokens.positions.take(order)
        return tokens._replace(x=x, num_prefix_tokens=0, followed=everything, positions=positions)


def standing_alone(group: Tensor, positions: Tensor, tokens: int) -> Tensor:
    """Count the registers that share their token with nothing.

    Args:
        group: (B,N) the token, of `tokens` ones, that each of the N first tokens is in.
        positions: (R,) of the registers among the first tokens.

    Returns:
        (B,) of R at most.
    """
    members = torch.zeros(len(group), tokens, dtype=torch.long, device=group.device)
    members.scatter_add_(1, group, torch.ones_like(group))
    return (members.gather(1, group[:, positions]) == 1).sum(dim=1)


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
    """Random keys in place of a model's: normal and independent, or correlated between neighbouring patches."""

    images: int = 256
    patches: int = 196
    channels: int = 64
    correlation: float = 0.0  # of a patch with the one before

    def draw(self, registers: int, generator: torch.Generator) -> Tensor:
        """Draw keys (images, 1 + R + n, D) of [class, registers, patches]."""
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
    drawn = keys.draw(registers, torch.Generator().manual_seed(seed))
    order, positions = arrange(rule, drawn.shape[1], registers)
    x = drawn[:, order]
    size, alone = torch.ones(x.shape[:2]), []
    group = torch.arange(x.shape[1]).expand(len(x), -1)
    for r in merges:
        if r:
            merge = match_rule(rule, x, r, 1 + registers)
            x, size = merge_tokens(x, merge, size), merge_sizes(size, merge)
            group = group_map(merge).gather(1, group)
        alone.append(float(standing_alone(group, positions, x.shape[1]).float().mean()))
    return alone


# Measurement


@dataclass
class RuleResult:
    """Per-image facts of one model under one rule and schedule; `summary` turns them into means."""

    kl: float = 0.0  # sum over images, nats
    alone: Tensor | float = 0.0  # (depth,) sum over images
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

    def summary(self, reference: "RuleResult") -> dict[str, Any]:
        """Means (fractions, nats) with standard errors; agreement also less a reference's, on the same images."""
        agreed = torch.cat(self.agreed)
        # both rules saw the same images: the error of the paired difference is smaller than that of either
        paired = agreed.double() - torch.cat(reference.agreed).double()
        row: dict[str, Any] = {
            "n_images": len(agreed),
            "agree": share(agreed),
            "kl": self.kl / len(agreed),
            "agree_se": share_error(agreed),
            "agree_minus_protected": share(paired),
            "agree_minus_protected_se": share_error(paired),
        }
        if self.correct:
            correct = torch.cat(self.correct)
            row |= {"acc1": share(correct), "acc1_se": share_error(correct)}
        alone = torch.as_tensor(self.alone) / len(agreed)
        return {**row, "registers_alone": alone.tolist(), "registers_alone_last": float(alone[-1])}


def share(values: Tensor) -> float:
    """The mean."""
    return float(values.double().mean())


def share_error(values: Tensor) -> float:
    """The standard error of the mean; NaN below five values."""
    return float(values.double().std(correction=1) / len(values) ** 0.5) if len(values) >= LEAST else float("nan")


@dataclass
class DynamicsResult:
    """A model under all rules and schedules.

    Attributes:
        registers: R.
        tokens_left: after the last block, by schedule.
        cells: by schedule and rule.
        unmerged_correct: (B,) per batch: top-1 of the model without merging, empty without labels.
    """

    label: str
    registers: int
    tokens_left: dict[str, int]
    cells: dict[tuple[str, str], RuleResult]
    unmerged_correct: list[Tensor] = field(default_factory=list)


def with_registers(model: MergingViT, count: int) -> MergingViT:
    """The model with R registers that can merge by tome: its own registers first, fresh ones for the rest.

    Fresh ones are untrained (trunc-normal .02, from torch's global generator).
    """
    return apply_merging(model, _by_tome(model), count).to(next(model.parameters()).device).eval()


def _by_tome(model: MergingViT) -> MergeConfig:
    """The model's merging; where it merges nothing, tome's, so that the rules have an order to change."""
    merge = model.merge
    return MergeConfig(method="tome", prop_attn=merge.prop_attn) if merge.method == "none" else merge


@torch.no_grad()
def measure(
    model: VisionTransformer,
    images: ImageBatches,
    *,
    registers: int | None = None,
    schedules: Sequence[str] = SCHEDULES,
    rules: Sequence[str] = RULES,
    labelled: bool = False,
    label: str = "model",
) -> DynamicsResult:
    """Run the unmerged model, and every rule under every schedule, in one pass over the images.

    Args:
        images: see `inputs.ImageBatches`; with `labelled`, batches that begin with images and labels.
        registers: R; None: those of the model. See `with_registers`.
        schedules: in any form of `MergeConfig.r`.
        rules: of `RULES`; "protected" is one of them.

    Raises:
        UserError: a model on which the rules are not defined.
    """
    with evaluation(model) as vit:
        tested = with_registers(vit, vit.num_registers if registers is None else registers)
        check_model(tested)
        left = {r: tested.plan(r).counts[-1] for r in schedules}
        result = DynamicsResult(label, tested.num_registers, left, {})
        result.cells = {(r, rule): RuleResult() for r in schedules for rule in rules}
        pairs = labelled_batches(images, tested) if labelled else ((batch, None) for batch in batches(images, tested))
        for batch, targets in pairs:
            dense = tested(batch, r=0)
            if targets is not None:
                result.unmerged_correct.append((dense.argmax(dim=1) == targets).cpu())
            for (r, rule), cell in result.cells.items():
                cell.add(forward_under(tested, batch, rule, r), dense, targets)
    return result


def summarise(result: DynamicsResult) -> list[dict[str, Any]]:
    """A row per schedule and rule, for json."""
    rows = []
    for (r, rule), cell in result.cells.items():
        row = {"label": result.label, "R": result.registers, "r": r, "rule": rule}
        row |= {"tokens_left": result.tokens_left[r], **cell.summary(result.cells[r, "protected"])}
        if result.unmerged_correct:
            row["acc1_unmerged"] = share(torch.cat(result.unmerged_correct))
        rows.append(row)
    return rows


def simulate_all(
    model: MergingViT, schedules: Sequence[str], rules: Sequence[str], images: int = 256, correlation: float = 0.0
) -> list[dict[str, Any]]:
    """The same rules on random keys in place of a model's, with R = 4 where the model has no registers; see `simulate`.

    Args:
        images: draws of keys.
        correlation: see `Simulation`.
    """
    registers = model.num_registers or 4
    keys = Simulation(images, model.patch_embed.num_patches, correlation=correlation)
    whole = apply_merging(model, replace(_by_tome(model), r=0), registers)
    rows = []
    for r in schedules:
        for rule in rules:
            alone = simulate(rule, whole.plan(r).merges, registers, keys)
            row = {"R": registers, "r": r, "rule": rule, "correlation": correlation, "n_draws": images}
            rows.append({**row, "registers_alone": alone})
    return rows


# Figures


@charts.styled
def draw(results: DynamicsResult | Sequence[DynamicsResult]) -> Figure:
    """Left: agreement with the unmerged model. Right: registers that stand alone, block by block. A row per model."""
    results = as_list(results)
    rules = list(dict.fromkeys(rule for result in results for _, rule in result.cells))
    figure, axes = charts.new_figure(len(results), 2, 4.6, 2.6, "Do protected registers matter?")
    tables = [summarise(result) for result in results]
    everything = [row for rows in tables for row in rows]
    low = min(row["agree"] - 2 * np.nan_to_num(row["agree_se"]) for row in everything)
    for (left, right), result, rows in zip(axes, results, tables, strict=True):
        _draw_agreement(left, rows, rules, max(0.0, 100 * low - 2))
        left.set_title(f"{result.label}, R={result.registers}: same top-1 as unmerged", fontsize=9)
        _draw_alone(right, rows, rules, result.registers)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    note = (
        f"n = {everything[0]['n_images']} images; lines: 95 % over images (1.96 standard errors). The left axes do not "
    )
    note += (
        "start at 0; all rows have the same. The rules saw the same images: their paired differences, in the table, "
    )
    charts.footer(figure, note + "are surer than these lines. Right: lines darken with r.")
    return figure


def _draw_agreement(ax: Axes, rows: Sequence[dict[str, Any]], rules: Sequence[str], low: float) -> None:
    width = 0.6 / len(rules)
    for index, rule in enumerate(rules):
        for x, row in enumerate(row for row in rows if row["rule"] == rule):
            at, value, half = x + (index - (len(rules) - 1) / 2) * width, 100 * row["agree"], 196 * row["agree_se"]
            span = None if np.isnan(half) else (value - half, min(100.0, value + half))
            charts.dots(ax, at, value, span, charts.colour_of(index))
        ax.plot([], [], color=charts.colour_of(index), marker="o", ls="", label=rule)
    ax.set_ylim(low, 101)
    ax.set_ylabel("% (cut axis)")
    schedules = list(dict.fromkeys(row["r"] for row in rows))
    ax.set_xticks(range(len(schedules)), [f"r={r}" for r in schedules])
    ax.set_xlim(-0.5, len(schedules) - 0.5)
    ax.grid(False, axis="x")


def _draw_alone(ax: Axes, rows: Sequence[dict[str, Any]], rules: Sequence[str], registers: int) -> None:
    schedules = list(dict.fromkeys(row["r"] for row in rows))
    if not registers:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no registers", transform=ax.transAxes, ha="center", color=charts.FAINT)
        return
    for row in rows:
        strength = 0.35 + 0.65 * (schedules.index(row["r"]) + 1) / len(schedules)
        colour, style = charts.colour_of(rules.index(row["rule"])), STYLES[row["rule"]]
        values = [row["R"], *row["registers_alone"]]
        ax.plot(range(-1, len(values) - 1), values, color=colour, ls=style, alpha=strength)
    ax.set_ylim(-0.05 * registers, registers * 1.08)
    ax.set_title(f"registers still alone, of {registers}", fontsize=9)
    ax.set_xlabel("after block")
    ax.set_ylabel("registers")


@charts.styled
def draw_simulation(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the rows of `simulate_all`: registers that stand alone, block by block, a panel per schedule."""
    schedules = list(dict.fromkeys(row["r"] for row in rows))
    figure, axes = charts.new_figure(1, len(schedules), 3.2, 2.6, "Registers still alone, random keys", sharey=True)
    for ax, r in zip(axes[0], schedules, strict=True):
        for index, row in enumerate([row for row in rows if row["r"] == r]):
            values = [row["R"], *row["registers_alone"]]
            ax.plot(range(-1, len(values) - 1), values, color=charts.colour_of(index), label=row["rule"])
        ax.set_title(f"r={r}")
        ax.set_xlabel("after block")
        ax.set_ylim(0, None)
    axes[0, 0].legend(loc="lower left")
    axes[0, 0].set_ylabel("registers")
    charts.footer(figure, f"Means over n = {rows[0]['n_draws']} draws of random keys; no model is in this picture.")
    return figure


# Command


def add_parser(subparsers: Any) -> None:
    from .command import add_command

    text = "merging with registers protected, masked as the published code does, and unprotected, over R and r"
    parser = add_command(subparsers, "dynamics", run, text)
    parser.add_argument("--R", type=int, nargs="+", metavar="R", help="registers (default: what the model has)")
    parser.add_argument("--r_values", nargs="+", default=list(SCHEDULES), metavar="r", help="schedules, as --r")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--keys", type=int, default=256, metavar="N", help="draws of random keys beside it (0: none)")
    parser.add_argument("--correlation", type=float, default=0.0, help="of random keys of neighbouring patches")


def run(args: Namespace, main_argv: Sequence[str]) -> None:
    from utils import log

    from . import command

    schedules = [format_schedule(parse_schedule(text)) for text in args.r_values]
    if "protected" not in args.rules:
        raise UserError("--rules must contain protected, which the others are compared with")
    if not 0 <= args.correlation < 1 or args.keys < 0 or min(args.R or [0]) < 0:
        raise UserError("--correlation must lie in [0, 1), --keys and --R must be at least 0")
    models = command.load_models(args, main_argv)
    tested = [(loaded, _prepared(loaded, count)) for loaded in models for count in _register_counts(args, loaded)]
    for _, model in tested:
        check_model(model)
        for r in schedules:
            model.plan(r)
    out = command.Output(args, main_argv, models)
    results = []
    for loaded, model in tested:
        images = command.Images(args, loaded, title=f"{loaded.label}, R={model.num_registers}")
        labelled = command.labels_fit(args, loaded)
        out.about(images.note)
        options = {"schedules": schedules, "rules": args.rules, "labelled": labelled, "label": loaded.label}
        results.append(measure(model, images, **options))
    rows = [row for result in results for row in summarise(result)]
    simulated = simulate_all(tested[0][1], schedules, args.rules, args.keys, args.correlation) if args.keys else []
    out.json("dynamics", {"rules": args.rules, "rows": rows, "random_keys": simulated})
    alone = {f"{row['label']}/r={row['r']}/{row['rule']}": np.asarray(row["registers_alone"]) for row in rows}
    out.npz("dynamics", alone)
    out.figure("dynamics", draw(results))
    if simulated:
        out.figure("dynamics_random_keys", draw_simulation(simulated))
    (out.folder / "dynamics.md").write_text(_table(rows))
    log(_table(rows))


def _register_counts(args: Namespace, loaded: "Loaded") -> list[int]:
    return list(dict.fromkeys(args.R or [loaded.model.num_registers]))


def _prepared(loaded: "Loaded", count: int) -> MergingViT:
    """The model with R registers; fresh ones depend on --seed alone."""
    from utils import log, seed_all

    present = loaded.model.num_registers
    if count > present:
        log(f"note: {loaded.label} has {present} registers; {count - present} of {count} are fresh, not trained")
    seed_all(loaded.args.seed)
    return with_registers(loaded.model, count)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """The ablation as a markdown table."""
    from utils import table

    labelled = "acc1" in rows[0]
    headers = [
        "model",
        "R",
        "r",
        "rule",
        "tokens left",
        "agree %",
        "minus protected",
        "KL",
        "registers alone at the end",
    ]
    cells = [
        [
            row["label"],
            str(row["R"]),
            row["r"],
            row["rule"],
            str(row["tokens_left"]),
            f"{100 * row['agree']:.2f} ± {100 * row['agree_se']:.2f}",
            f"{100 * row['agree_minus_protected']:+.2f} ± {100 * row['agree_minus_protected_se']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['registers_alone_last']:.2f}",
            f"{100 * row['acc1']:.2f} (unmerged {100 * row['acc1_unmerged']:.2f})" if labelled else "",
        ]
        for row in rows
    ]
    note = f"n = {rows[0]['n_images']} images; ± one standard error over images, of the differences paired by image."
    return f"{table([*headers, 'top-1 %'], cells, left=4)}\n\n{note}\n"
