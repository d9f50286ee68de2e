"""Every method on one set of weights and images, in one pass: GMACs, top-1, top-5, agreement and KL with dense.

    python run/methods_table.py --data_path DATA/imagenet_mini --weights deit_tiny_imagenet.safetensors --out table
    python run/methods_table.py --data_path ... --weights ... --gmacs 0.622 0.704 --halves --throughput --out compare

Training-free, fp32 unless --amp says otherwise. The rows are those that the published code was measured on, LGTM, and
the published variants of every other method. --gmacs adds every method with a schedule that is searched for each budget
on unlabelled images; with --halves these are every second image, and the others are reported. --throughput adds
images/s against timm's dense model, in interleaved rounds. --out also gets a plot with the Pareto fronts.
"""

import itertools
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import options
from analysis import charts
from calibration import DEFAULT_IMAGES, Calibration, draw_calibration, gmacs_goal, search_schedules
from checkpoint import load_checkpoint
from datasets import DataConfig, ImageSet, build_data, build_eval_loader
from distributed import Distributed
from engine import Precision, build_precision, evaluate, throughput
from latency import native_of
from models import MergeConfig, MergingViT, UserError, apply_merging, create_model
from models.gmacs import gmacs
from models.methods import METHODS, variants
from models.registry import data_settings
from models.schedule import format_schedule
from models.weights import extract_state_dict, load_weights
from run.results import pareto, save
from utils import table, write_table

# The rows that the published code was measured on, and what is published of later methods
MEASURED: dict[str, MergeConfig] = {
    "dense": MergeConfig(r=0),
    "ToMe r=8": MergeConfig(r=8),
    "ToMe r=13": MergeConfig(r=13),
    "ToMe r=16": MergeConfig(r=16),
    "ToMe r=13, no proportional attention": MergeConfig(r=13, prop_attn=False),
    "ToMe r=16, no proportional attention": MergeConfig(r=16, prop_attn=False),
    "ToMe, 3 dense layers then r=16": MergeConfig(r=16, dense_layers=3),
    "ToMe, 3 dense layers then r=20": MergeConfig(r=20, dense_layers=3),
    "ToMe (8,-1)": MergeConfig(r="(8,-1)"),
    "MCTF r=8, blocks 1-11": MergeConfig("mctf", 8),
    "MCTF r=13, blocks 1-11": MergeConfig("mctf", 13),
    "MCTF r=16, blocks 1-11": MergeConfig("mctf", 16),
    "MCTF-Fast, 0.35 at blocks 3,6,9": MergeConfig("mctf", 0.35, (3, 6, 9)),
    "LGTM r=4 (ours)": MergeConfig("lgtm", 4),
    "LGTM r=8 (ours)": MergeConfig("lgtm", 8),
    "LGTM r=12 (ours)": MergeConfig("lgtm", 12),
}
PUBLISHED = {f"{name} r={keywords['r']}": MergeConfig(**keywords) for name, keywords in variants().items()}
ROWS = MEASURED | {name: config for name, config in PUBLISHED.items() if config not in MEASURED.values()}


class Variants(nn.Module):
    """Runs one set of weights under many configs: `variants(images, r=name)`; r = 0 is the dense one."""

    def __init__(self, model: MergingViT, rows: dict[str, MergeConfig]) -> None:
        super().__init__()
        self.models = nn.ModuleList(apply_merging(model, config) for config in rows.values())
        self.index: dict[Any, int] = {name: i for i, name in enumerate(rows)} | {0: 0}

    def forward(self, images: Tensor, r: Any) -> Tensor:
        return self.models[self.index[r]](images)


def build_parser() -> options.Parser:
    parser = options.Parser(prog="methods_table.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--data_path", required=True, help="folder with val/CLASS/*")
    parser.add_argument("--dataset", default="IMNET")
    parser.add_argument("--model", default="deit_tiny")
    parser.add_argument("--weights", required=True, help="checkpoint of the dense model")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose name starts with one of these")
    text = "budgets for which a schedule of every method is searched: 0.70, 55%%"
    parser.add_argument("--gmacs", nargs="+", type=options.gmacs_budget, default=[], metavar="G", help=text)
    parser.add_argument("--methods", nargs="+", choices=[name for name in METHODS if name != "none"], metavar="NAME")
    parser.add_argument("--calibration_images", type=options.positive_int, default=DEFAULT_IMAGES, metavar="N")
    text = "search on every second image, and report on the others"
    parser.add_argument("--halves", action="store_true", help=text)
    parser.add_argument("--throughput", action="store_true", help="images/s at --batch_size")
    parser.add_argument("--limit", type=options.positive_int)
    parser.add_argument("--batch_size", type=options.positive_int, default=64)
    parser.add_argument("--num_workers", type=options.non_negative_int, default=2)
    parser.add_argument("--device", default=None)
    parser.add_argument("--amp", choices=("bf16", "fp16", "none"), default="none")
    parser.add_argument("--out", help="file to write, with .json, .md and .png")
    return parser


def measure(args: Namespace) -> list[dict[str, Any]]:
    """Evaluate every row of the table in one pass over the images; returns what it shows."""
    configs = {k: v for k, v in ROWS.items() if not args.rows or k == "dense" or k.startswith(tuple(args.rows))}
    main_args = main_arguments(args)
    dist = Distributed(torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    data = build_data(main_args, DataConfig(**data_settings(args.model)))
    model = create_model(args.model, num_classes=data.num_classes)
    weights = extract_state_dict(load_checkpoint(args.weights), source=args.weights)[0]
    load_weights(model, weights, num_classes_changed_ok=False, source=args.weights, name=args.model)
    reported, others = halves(data.val) if args.halves else (data.val, data.val)
    searched: dict[str, MergeConfig] = {}
    if args.gmacs:
        source = "every second image" if args.halves else "the reported images"
        calibration = draw_calibration(others, args.calibration_images, main_args.seed, source, dist)
        searched = search_all(model.to(dist.device), calibration, args)
    configs |= searched
    rows_of = Variants(model, configs).to(dist.device)
    loader = build_eval_loader(main_args, reported, 0, 1)
    precision = build_precision(main_args, dist.device)
    scores = evaluate(rows_of, loader, list(configs), precision, dist, agreement=True, title="methods")
    assert scores is not None
    speeds = measure_speed(rows_of, args, precision) if args.throughput else {}
    return [
        {
            "method": name,
            "family": config.method,
            "searched": name in searched,
            "r": format_schedule(config.r),
            "gmacs": gmacs(rows_of.models[i]),  # type: ignore[arg-type]
            "n_images": score.n_images,
            "acc1": score.acc1,
            "acc5": score.acc5,
            "agree": score.agree,
            "kl": score.kl,
            "images_per_s": speeds.get(name),
            "speedup": speeds[name] / speeds["native"] if speeds else None,
        }
        for i, ((name, config), score) in enumerate(zip(configs.items(), scores, strict=True))
    ]


def halves(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Every second image from the second on, and the others."""
    found = []
    for start in (1, 0):
        half = copy(images)
        half.indices, half.targets = images.indices[start::2], images.targets[start::2]
        found.append(half)
    return found[0], found[1]


def search_all(model: MergingViT, calibration: Calibration, args: Namespace) -> dict[str, MergeConfig]:
    """Search a schedule of every method for every budget."""
    configs: dict[str, MergeConfig] = {}
    for method in args.methods or [name for name in METHODS if name != "none"]:
        merging = apply_merging(model, MergeConfig(method)).eval()
        goals = [gmacs_goal(text, merging) for text in args.gmacs]
        result = search_schedules(goals, merging, calibration, args.model, seed=0)
        for text, found in zip(args.gmacs, result.found, strict=True):
            configs[f"{method}, searched for {text} GMACs"] = merging.merge.with_r(found.best.r)
    return configs


def measure_speed(variants: Variants, args: Namespace, precision: Precision) -> dict[str, float]:
    """Images/s of every row and of timm's dense model, medians of rounds in which all take turns."""
    device = next(variants.parameters()).device
    first: Any = variants.models[0]
    size = first.patch_embed.img_size
    runs: dict[str, Callable[[Tensor], Any]] = {"native": native_of(first, args.model)}
    runs |= {name: partial(variants, r=name) for name in variants.index if name != 0}
    with torch.no_grad():
        speeds = throughput(runs, torch.randn(args.batch_size, 3, *size, device=device), precision, seconds=120)
    return {name: speed["median"] for name, speed in speeds.items()}


def main_arguments(args: Namespace) -> Namespace:
    """Return main.py's options for data and precision."""
    flags = ["--eval", "--no_pretrained"]
    for name in ("dataset", "data_path", "limit", "batch_size", "num_workers", "device", "amp"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    return options.parse_args(flags)


COLUMNS = {
    "GMACs": ("gmacs", ".3f"),
    "top-1": ("acc1", ".2f"),
    "top-5": ("acc5", ".2f"),
    "agree": ("agree", ".2f"),
    "KL": ("kl", ".4f"),
    "x native": ("speedup", ".2f"),
}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in markdown; what a schedule is, is told where it was searched."""
    texts = []
    for row in rows:
        values = ["" if row[key] is None else format(row[key], form) for key, form in COLUMNS.values()]
        texts.append([row["method"], *values, row["r"] if row["searched"] else ""])
    return table(("method", *COLUMNS, "r"), texts) + "\n"


@charts.styled
def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw KL and agreement over GMACs, and over the speed where it was measured, with the fronts of all rows."""
    rows = [row for row in rows if row["kl"] > 0]
    costs = ["gmacs"] + (["speedup"] if rows and rows[0]["speedup"] else [])
    figure, axes = charts.new_figure(len(costs), 2, width=5.2, height=3.8)
    for (row, cost), (column, (key, sign)) in itertools.product(
        enumerate(costs), enumerate({"kl": -1, "agree": 1}.items())
    ):
        ax = axes[row, column]
        front = pareto([(point[cost], sign * point[key]) for point in rows], smaller_x=cost == "gmacs")
        places = [(x, sign * y) for x, y in front]
        ax.plot(*zip(*places, strict=True), color=charts.RULE, linewidth=5, zorder=1, label="Pareto front")
        for i, family in enumerate(dict.fromkeys(point["family"] for point in rows)):
            for searched, style in ((False, "x"), (True, "o-")):
                some = sorted((p[cost], p[key]) for p in rows if p["family"] == family and p["searched"] == searched)
                label = f"{family}, searched" if searched else family
                if some:
                    ax.plot(*zip(*some, strict=True), style, color=charts.colour_of(i), label=label, zorder=2)
        ax.set_xlabel("GMACs per image" if cost == "gmacs" else "images/s, as a multiple of timm's dense model")
        ax.set_ylabel("KL to dense" if key == "kl" else "same top-1 as dense (%)")
        if key == "kl":
            ax.set_yscale("log")
            charts.plain_log(ax)
    axes[0, 0].legend()
    return figure


def run(argv: Sequence[str]) -> None:
    """Measure, print and write the table."""
    args = build_parser().parse(argv)
    if args.halves and not args.gmacs:
        raise UserError("--halves is for a search; add --gmacs or leave it out")
    rows = measure(args)
    if args.out:
        write_table(args.out, {"model": args.model, "rows": rows}, markdown(rows))
        if len(rows) > 1:
            save(draw(rows), Path(args.out).with_suffix(".png"), "--out")
    print(markdown(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    return options.exit_status("methods_table.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
