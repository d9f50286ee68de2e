"""Every method on one set of weights and images, in one pass: GMACs, top-1, top-5, agreement and KL with dense.

    python run/methods_table.py --data_path DATA/imagenet_mini --weights deit_tiny_imagenet.safetensors --out table

Training-free, fp32 unless --amp says otherwise. The rows are those that the published code was measured on, LGTM, and
the published variants of every other method.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

import torch
from torch import Tensor, nn

import options
from checkpoint import load_checkpoint
from datasets import DataConfig, build_data, build_eval_loader
from distributed import Distributed
from engine import build_precision, evaluate
from models import MergeConfig, MergingViT, apply_merging, create_model
from models.gmacs import gmacs
from models.methods import variants
from models.registry import data_settings
from models.weights import extract_state_dict, load_weights
from utils import table, write_json

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
    parser.add_argument("--limit", type=options.positive_int)
    parser.add_argument("--batch_size", type=options.positive_int, default=64)
    parser.add_argument("--num_workers", type=options.non_negative_int, default=2)
    parser.add_argument("--device", default=None)
    parser.add_argument("--amp", choices=("bf16", "fp16", "none"), default="none")
    parser.add_argument("--out", help="file to write, with .json and .md")
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
    variants = Variants(model, configs).to(dist.device)
    loader = build_eval_loader(main_args, data.val, 0, 1)
    precision = build_precision(main_args, dist.device)
    scores = evaluate(variants, loader, list(configs), precision, dist, agreement=True, title="methods")
    assert scores is not None
    return [
        {
            "method": name,
            "gmacs": gmacs(variants.models[i]),  # type: ignore[arg-type]
            "n_images": score.n_images,
            "acc1": score.acc1,
            "acc5": score.acc5,
            "agree": score.agree,
            "kl": score.kl,
        }
        for i, (name, score) in enumerate(zip(configs, scores, strict=True))
    ]


def main_arguments(args: Namespace) -> Namespace:
    """Return main.py's options for data and precision."""
    flags = ["--eval", "--no_pretrained"]
    for name in ("dataset", "data_path", "limit", "batch_size", "num_workers", "device", "amp"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    return options.parse_args(flags)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table in markdown."""
    headers = ("method", "GMACs", "top-1", "top-5", "agree", "KL")
    forms = {"gmacs": ".3f", "acc1": ".2f", "acc5": ".2f", "agree": ".2f", "kl": ".4f"}
    texts = [[row["method"], *(format(row[key], form) for key, form in forms.items())] for row in rows]
    return table(headers, texts) + "\n"


def run(argv: Sequence[str]) -> None:
    """Measure, print and write the table."""
    args = build_parser().parse(argv)
    rows = measure(args)
    if args.out:
        write_json(Path(args.out).with_suffix(".json"), {"model": args.model, "rows": rows})
        Path(args.out).with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    return options.exit_status("methods_table.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
