"""Memory and images per second of every way to finetune: all weights, layer-wise rates, adapters, some parts, head.

python run/finetuning.py --model deit_tiny --batch_size 16 --num_registers 4 --r 16 --rounds 10
torchrun --nproc_per_node=2 run/finetuning.py --model deit_small --batch_size 2 --device cpu

Every way trains the same model with random weights on random images, in the updates of main.py; the ways take turns in
one process. *held* is weights, gradients, optimizer and average, *peak* what an update takes beyond that at most. In
several processes there is no timing: the table compares what each holds of whole weights and of slices (--fsdp).
All other options are main.py's (model, merging, optimizer, precision).
"""

import argparse
import copy
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

import torch

from build import device_name, lora_settings, trained_parts
from datasets import Batch
from distributed import Distributed, init_distributed, max_over_ranks
from engine import Learner, build_learner, build_precision
from losses import build_objective
from memory import held
from models import MergingViT, create_model
from models.adapters import add_lora
from models.parameters import freeze, parameter_groups
from options import Parser, check_heeded, exit_status, flags_of, merge_config, parse_args, positive_int
from run.benchmark import CLOCKS, TimedCall, interleave, peak_memory, ratio
from sharding import shard
from utils import log, seed_all, table

WAYS = {
    "all": "",
    "all, layer decay": "--layer_decay 0.75",
    "lora": "--lora 8",
    "registers, norms, head": "--train_only registers,norms,head",
    "norms, head": "--train_only norms,head",
    "head": "--train_only head",
}
HEEDED = {"device", "seed", "model", "num_registers", "register_layer", "input_size", "batch_size", "drop_path", "amp"}
HEEDED |= {"opt", "momentum", "model_ema", "grad_checkpointing", "compile", "full_weight", "full_r_max"}


@dataclass(frozen=True)
class Way:
    """A way to finetune, ready to train."""

    name: str
    learner: Learner
    trained: int  # parameters

    def call(self, images: torch.Tensor) -> TimedCall:
        """An update on these images."""
        targets = torch.arange(len(images), device=images.device) % 10
        batch = Batch(images, targets, torch.ones_like(targets, dtype=torch.bool), ())

        def run() -> None:
            self.learner.step_gradients([batch], 0, 0)
            self.learner.update()

        return TimedCall(run, len(images))


def prepare_way(name: str, argv: Sequence[str], model: MergingViT, dist: Distributed, spread: bool) -> Way:
    """Build a learner of a copy of the model, as a training run does."""
    args = parse_args([*argv, *WAYS[name].split(), "--lr", "0"])
    module = copy.deepcopy(model)
    if settings := lora_settings(args):
        add_lora(module, settings)
    trained = sum(freeze(module, trained_parts(args, module)).values())
    precision = build_precision(args, dist.device)
    averaged = shard(module, dist, precision.dtype) if spread else None
    groups = parameter_groups(module.to(dist.device), args.weight_decay, layer_decay=args.layer_decay)
    objective = build_objective(args, None, module)
    return Way(name, build_learner(args, dist, module, groups, objective, precision, None, averaged), trained)


def new_model(args: Namespace) -> MergingViT:
    """The model that all ways train, with random weights."""
    seed_all(args.seed)
    return create_model(
        args.model or "deit_tiny",
        num_registers=args.num_registers,
        register_layer=args.register_layer,
        merge=merge_config(args),
        img_size=args.input_size,
        drop_path_rate=args.drop_path,
    )


def timed_table(ways: Sequence[Way], images: torch.Tensor, rounds: int, clock: str) -> str:
    """All ways, timed in turns."""
    calls = {way.name: way.call(images) for way in ways}
    times = interleave(calls, rounds, images.device, clock=CLOCKS[clock])
    rows = []
    for way in ways:
        factor = ratio(times, way.name, ways[0].name)
        assert factor is not None
        rows.append(
            [
                way.name,
                f"{way.trained / 1e6:.3f}",
                f"{held(way.learner) / 2**20:.0f}",
                f"{peak_memory(calls[way.name], images.device) / 2**20:.0f}",
                f"{len(images) / sorted(times[way.name])[rounds // 2]:.1f}",
                "{median:.2f} [{q25:.2f}, {q75:.2f}]".format_map(factor),
            ]
        )
    return table(("trains", "M parameters", "held MiB", "peak MiB", "images/s", f"x {ways[0].name}"), rows)


def spread_table(argv: Sequence[str], model: MergingViT, images: torch.Tensor, dist: Distributed) -> str:
    """What the fullest process holds of whole weights and of slices, after an update."""
    rows = []
    for name in (name for name in WAYS if usable(name, model)):
        sizes = []
        for spread in (False, True):
            way = prepare_way(name, argv, model, dist, spread)
            way.call(images).run()
            sizes.append(max_over_ranks(held(way.learner), dist))
        texts = [f"{size / 2**20:.1f}" for size in sizes]
        rows.append([name, f"{way.trained / 1e6:.3f}", *texts, f"{sizes[1] / sizes[0]:.2f}"])
    return table(("trains", "M parameters", "whole MiB", "slices MiB", "of whole"), rows)


def run(argv: Sequence[str]) -> None:
    """Measure and print."""
    own, main_argv = build_parser().parse_known_args(argv)
    check_heeded(main_argv, flags_of("merging") | HEEDED, "this table")
    main_argv += ["--mixup", "0", "--cutmix", "0"]  # any batch size
    args = parse_args(main_argv)
    dist = init_distributed(args.device)
    model = new_model(args)
    images = torch.randn(args.batch_size, 3, *model.patch_embed.img_size, device=dist.device)
    log(
        f"{args.model or 'deit_tiny'}, batches of {args.batch_size}, {device_name(dist.device)}, {dist.world} processes"
    )
    if dist.distributed:
        log(spread_table(main_argv, model, images, dist))
        return
    ways = [prepare_way(name, main_argv, model, dist, spread=False) for name in WAYS if usable(name, model)]
    log(timed_table(ways, images, own.rounds, own.clock))


def usable(name: str, model: MergingViT) -> bool:
    """Whether the model has what a way trains."""
    return "registers" not in name or model.reg_token is not None


def build_parser() -> Parser:
    parser = Parser(
        prog="finetuning.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=positive_int, default=10, metavar="N", help="updates of each (default: 10)")
    text = "cpu: time of this process alone, for a shared machine"
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    return exit_status("finetuning.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
