"""analyze.py dynamics: do protected registers matter?"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from models import MergingViT, UserError, apply_merging
from models.schedule import MergeConfig, format_schedule, parse_schedule
from utils import log, seed_all

from . import charts
from .command import Images, Loaded, Output, add_command, labels_fit, load_models
from .register_dynamics import RULES, Simulation, Tally, check_model, forward_under, simulate

STYLES = {"protected": "-", "published": "--", "unprotected": ":"}


def add_parser(subparsers: Any) -> None:
    text = "merging with registers protected, masked as the published code does, and unprotected, over R and r"
    parser = add_command(subparsers, "dynamics", run, text)
    parser.add_argument("--R", type=int, nargs="+", metavar="R", help="registers (default: what the model has)")
    parser.add_argument("--r_values", nargs="+", default=["8", "13", "16"], metavar="r", help="schedules, as --r")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--keys", type=int, default=256, metavar="N", help="draws of random keys beside it (0: none)")
    parser.add_argument("--correlation", type=float, default=0.0, help="of random keys of neighbouring patches")


def run(own: Namespace, rest: Sequence[str]) -> None:
    schedules = [format_schedule(parse_schedule(text)) for text in own.r_values]
    if "protected" not in own.rules:
        raise UserError("--rules must contain protected, which the others are compared with")
    if not 0 <= own.correlation < 1 or own.keys < 0 or min(own.R or [0]) < 0:
        raise UserError("--correlation must lie in [0, 1), --keys and --R must be at least 0")
    models = load_models(own, rest)
    cells = [(loaded, _with_registers(loaded, count), count) for loaded in models for count in _counts(own, loaded)]
    for _, model, _ in cells:
        check_model(model)
        [model.plan(text) for text in schedules]
    out = Output(own, rest, models)
    rows: list[dict[str, Any]] = []
    for loaded, model, count in cells:
        rows += ablate(own, loaded, model, schedules, f"{loaded.label}, R={count}")
    simulated = _simulate(own, cells[0][1], schedules) if own.keys else []
    out.json("dynamics", {"rules": own.rules, "rows": rows, "random_keys": simulated})
    keys = {f"{row['label']}/r={row['r']}/{row['rule']}": np.asarray(row["registers_alone"]) for row in rows}
    out.npz("dynamics", keys)
    out.png("dynamics", draw_ablation(rows, own.rules))
    if simulated:
        out.png("dynamics_random_keys", draw_simulation(simulated))
    (out.folder / "dynamics.md").write_text(table(rows))
    log(table(rows))


def _counts(own: Namespace, loaded: Loaded) -> list[int]:
    return list(dict.fromkeys(own.R or [loaded.model.num_registers]))


def _with_registers(loaded: Loaded, count: int) -> MergingViT:
    """The model with R registers: its own first, fresh ones (trunc-normal .02, untrained) for the rest."""
    merge = loaded.model.merge
    if merge.method == "none":
        merge = MergeConfig(method="tome", prop_attn=merge.prop_attn)
    have = loaded.model.num_registers
    if count > have:
        log(f"note: {loaded.label} has {have} registers; {count - have} of {count} are fresh, not trained")
    seed_all(loaded.args.seed)
    return apply_merging(loaded.model, merge, count).to(loaded.device).eval()


@torch.no_grad()
def ablate(
    own: Namespace, loaded: Loaded, model: MergingViT, schedules: Sequence[str], label: str
) -> list[dict[str, Any]]:
    """One pass over the images: the unmerged model, and every rule under every schedule."""
    labelled = labels_fit(own, loaded)
    tallies = {(r, rule): Tally() for r in schedules for rule in own.rules}
    dense_correct: list[torch.Tensor] = []
    for batch in Images(own, loaded, title=label):
        dense = model(batch.images, r=0)
        targets = batch.targets.to(dense.device) if labelled else None
        if targets is not None:
            dense_correct.append((dense.argmax(dim=1) == targets).cpu())
        for (r, rule), tally in tallies.items():
            tally.add(forward_under(model, batch.images, rule, r), dense, targets)
    found = []
    for (r, rule), tally in tallies.items():
        row = {"label": loaded.label, "R": model.num_registers, "r": r, "rule": rule}
        row |= {"tokens_left": model.plan(r).counts[-1], **tally.row(tallies[r, "protected"])}
        if dense_correct:
            row["acc1_unmerged"] = 100 * float(torch.cat(dense_correct).double().mean())
        found.append(row)
    return found


def _simulate(own: Namespace, model: MergingViT, schedules: Sequence[str]) -> list[dict[str, Any]]:
    """The same rules on random keys in place of a model, with R = 4 where the model has none."""
    registers = model.num_registers or 4
    keys = Simulation(own.keys, model.patch_embed.num_patches, correlation=own.correlation)
    whole = apply_merging(model, replace(model.merge, r=0), registers)
    rows = []
    for r in schedules:
        for rule in own.rules:
            alone = simulate(rule, whole.plan(r).merges, registers, keys)
            rows.append(
                {"R": registers, "r": r, "rule": rule, "correlation": own.correlation, "registers_alone": alone}
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The ablation as a markdown table."""
    labelled = "acc1" in rows[0]
    names = ["model", "R", "r", "rule", "tokens left", "agree %", "minus protected", "KL", "registers alone at the end"]
    names += ["top-1 %"] if labelled else []
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [row["label"], row["R"], row["r"], row["rule"], row["tokens_left"]]
        cells += [f"{row['agree']:.2f} ± {row['agree_se']:.2f}"]
        cells += [f"{row['agree_minus_protected']:+.2f} ± {row['agree_minus_protected_se']:.2f}"]
        cells += [f"{row['kl']:.4f}", f"{row['registers_alone_last']:.2f}"]
        cells += [f"{row['acc1']:.2f} (unmerged {row['acc1_unmerged']:.2f})"] if labelled else []
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    note = f"n = {rows[0]['n_images']} images; ± one standard error over images, of the differences paired by image.\n"
    return "\n".join([*lines, "", note])


@charts.styled
def draw_ablation(rows: Sequence[dict[str, Any]], rules: Sequence[str]) -> Figure:
    """Left: agreement with the unmerged model. Right: registers that stand alone, block by block. A row per R."""
    groups = list(dict.fromkeys((row["label"], row["R"]) for row in rows))
    schedules = list(dict.fromkeys(row["r"] for row in rows))
    figure, axes = charts.new_figure(len(groups), 2, 4.4, 2.5, "Do protected registers matter?")
    for line, (label, count) in enumerate(groups):
        own = [row for row in rows if (row["label"], row["R"]) == (label, count)]
        ax, width = axes[line, 0], 0.8 / len(rules)
        for index, rule in enumerate(rules):
            chosen = [row for row in own if row["rule"] == rule]
            x = np.arange(len(chosen)) + (index - (len(rules) - 1) / 2) * width
            y, error = ([row[key] for row in chosen] for key in ("agree", "agree_se"))
            ax.bar(x, y, width * 0.92, yerr=error, color=charts.colour_of(index), alpha=0.85, label=rule)
        low = min(row["agree"] - row["agree_se"] for row in own)
        ax.set_ylim(max(0.0, low - 0.35 * (100 - low) - 1), 100)
        ax.set_xticks(range(len(schedules)), [f"r={r}" for r in schedules])
        ax.set_title(f"{label}, R={count}: same top-1 as unmerged (%)", fontsize=9)
        ax.grid(False, axis="x")
        _draw_alone(axes[line, 1], own, rules, count)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    note = f"n = {rows[0]['n_images']}; whiskers: one standard error over images; lines darken with r"
    figure.supxlabel(note, fontsize=7.5, color=charts.FAINT, x=0.01, ha="left")
    return figure


def _draw_alone(ax: Any, rows: Sequence[dict[str, Any]], rules: Sequence[str], count: int) -> None:
    schedules = list(dict.fromkeys(row["r"] for row in rows))
    if not count:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no registers", transform=ax.transAxes, ha="center", color=charts.FAINT)
        return
    for row in rows:
        strength = 0.35 + 0.65 * (schedules.index(row["r"]) + 1) / len(schedules)
        colour, style = charts.colour_of(rules.index(row["rule"])), STYLES[row["rule"]]
        values = [row["R"], *row["registers_alone"]]
        ax.plot(range(-1, len(values) - 1), values, color=colour, ls=style, alpha=strength)
    ax.set_ylim(-0.05 * max(count, 1), max(count, 1) * 1.08)
    ax.set_title(f"registers still alone, of {count}", fontsize=9)
    ax.set_xlabel("after block")


@charts.styled
def draw_simulation(rows: Sequence[dict[str, Any]]) -> Figure:
    """Registers that stand alone, block by block, on random keys."""
    schedules = list(dict.fromkeys(row["r"] for row in rows))
    figure, axes = charts.new_figure(1, len(schedules), 3.2, 2.6, "Registers still alone, random keys", sharey=True)
    for ax, r in zip(axes[0], schedules, strict=True):
        for index, row in enumerate([row for row in rows if row["r"] == r]):
            values = [row["R"], *row["registers_alone"]]
            ax.plot(range(-1, len(values) - 1), values, color=charts.colour_of(index), label=row["rule"])
        ax.set_title(f"r={r}")
        ax.set_xlabel("after block")
    axes[0, 0].legend(loc="lower left")
    return figure
