"""Finetune and evaluate Vision Transformers with register tokens and token merging.

torchrun --nproc_per_node=8 -- main.py --model deit_small --r 16 --num_registers 4
python main.py --eval --model deit_tiny --merge tome --r_evals 0 8 16 --data_path data/IMNET
"""

import argparse
import difflib
import math
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from datasets import (
    RECIPES,
    SOURCES,
    Data,
    DataConfig,
    bad_image_limit,
    build_data,
    build_eval_loader,
    build_train_loader,
    unnormalise,
)
from engine import (
    BadImages,
    EpochLog,
    Precision,
    Scores,
    build_precision,
    build_scheduler,
    build_trainer,
    evaluate,
    load_scheduler_state,
    scheduler_state,
    throughput,
    train_one_epoch,
)
from losses import build_mixup, build_objective, build_teacher
from models import MergeConfig, MergingViT, UserError, create_model
from models.checkpoint import extract_state_dict, load_weights
from models.gmacs import gmacs
from models.parameters import TRAIN_ONLY, freeze, parameter_groups
from models.registry import OWN_SIZES, check_name, data_settings, native_model
from models.schedule import METHODS, ONE_STEP_AHEAD, POOLINGS, format_schedule, parse_schedule
from utils import (
    Distributed,
    RunError,
    StopSignal,
    append_json_line,
    barrier,
    check_resumable,
    clear_stop_marker,
    close_distributed,
    compile_model,
    git_revision,
    init_distributed,
    is_main_process,
    load_checkpoint,
    load_resume,
    log,
    nearest,
    rng_state,
    save_checkpoint,
    seed_all,
    set_rng_state,
    setup_output,
    tensorboard,
    to_plain,
    truncate_log,
    versions,
    write_json,
    write_stop_marker,
)

# The command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest flag for an unknown one."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")

    def parse(self, argv: Sequence[str]) -> Namespace:
        args, unknown = self.parse_known_args([underscored(token) for token in argv])
        for token in unknown:
            if not token.startswith("--"):
                raise UserError(f"unexpected argument {token!r}; see --help")
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            near = difflib.get_close_matches(token.split("=")[0], flags, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown flag {token.split('=')[0]}; {hint}see --help")
        return args


def underscored(token: str) -> str:
    """--batch-size=4 -> --batch_size=4; values keep their hyphens."""
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    if value == "--":  # argparse would take it for the end of the options and hand on an empty list
        raise UserError(f"{flag} needs a value, not '--'; see --help")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _bounded(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], Any]:
    """A number type for argparse with its range in the error."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high or value in (math.inf, -math.inf):
            wanted = f"{'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    parse.__name__ = {int: "integer", float: "number"}[kind]
    return parse


positive = _bounded(int, 1, 10**9)
count = _bounded(int, 0, 10**9)
amount = _bounded(float, 0)
above_zero = _bounded(float, 0, open_low=True)
share = _bounded(float, 0, 1)
below_one = _bounded(float, 0, 1 - 1e-9)


def _number(text: str) -> int | float:
    value = int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _layer_list(text: str) -> tuple[int, ...]:
    """1,2,11 or [1,2,11]."""
    return tuple(int(item) for item in text.strip("[]() ").split(",") if item.strip())


_number.__name__, _layer_list.__name__ = "number", "list of blocks"  # argparse shows them in its errors


def _boolean(group: Any, flag: str, default: bool | None, text: str, *aliases: str) -> None:
    """--flag / --no_flag."""
    group.add_argument(f"--{flag}", *aliases, dest=flag, action="store_true", default=default, help=text)
    group.add_argument(f"--no_{flag}", dest=flag, action="store_false", help=argparse.SUPPRESS)


def build_parser() -> Parser:
    """Every flag, grouped; underscores here, hyphens work too."""
    parser = Parser(
        prog="main.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Booleans are --flag / --no_flag; --config FILE.yaml sets defaults that flags override.",
    )
    parser.add_argument("--config", metavar="FILE", help="yaml file of defaults: flag names without the dashes")
    for add in (_data_flags, _augmentation_flags, _model_flags, _merging_flags, _objective_flags, _optimizer_flags):
        add(parser)
    _run_flags(parser)
    return parser


def _data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    names = ("IMNET", "IMAGENETTE", "CIFAR10", "CIFAR100", "FLOWERS102", "FOLDER", "WDS", "DIGITS")
    group.add_argument("--dataset", "--data_set", default="IMNET", metavar="NAME", help=", ".join(names))
    group.add_argument("--data_path", help="folder of the data (default: data/<dataset>); WDS: shard patterns")
    group.add_argument("--input_size", type=_bounded(int, 1, 4096), help="pixels (default: the model's)")
    group.add_argument("--batch_size", type=positive, default=64, help="per process and micro-step")
    group.add_argument("--num_workers", type=count, default=10, help="loader processes per process")
    group.add_argument("--max_bad_images", type=count, help="unreadable images a run survives (0.1 %%, at least 10)")
    group.add_argument(
        "--limit", type=positive, metavar="N", help="every ceil(len/N)-th image of each split, for trials"
    )
    _boolean(group, "pin_mem", True, "pinned memory for faster copies to a GPU")
    group.add_argument("--dist_eval", action="store_true", help="accepted for DeiT; evaluation is always distributed")


def _augmentation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation (as in DeiT)")
    group.add_argument("--color_jitter", type=amount, default=0.3)
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's AutoAugment, or none")
    group.add_argument("--train_interpolation", default="bicubic", choices=("bicubic", "bilinear", "random"))
    _boolean(group, "three_augment", False, "DeiT-III's 3-Augment", "--ThreeAugment")
    _boolean(group, "src", False, "simple random crop, with --three_augment")
    _boolean(group, "repeated_aug", True, "three augmented copies of an image in an epoch of the same length")
    group.add_argument("--hflip", type=share, default=0.5)
    group.add_argument("--reprob", type=share, default=0.25, help="random erasing")
    group.add_argument("--remode", default="pixel", choices=("pixel", "const", "rand"))
    group.add_argument("--recount", type=positive, default=1)
    group.add_argument("--mixup", type=amount, default=0.8)
    group.add_argument("--cutmix", type=amount, default=1.0)
    group.add_argument("--cutmix_minmax", type=share, nargs=2)
    group.add_argument("--mixup_prob", type=share, default=1.0)
    group.add_argument("--mixup_switch_prob", type=share, default=0.5)
    group.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"))
    group.add_argument("--smoothing", type=below_one, default=0.1, help="of labels")
    group.add_argument("--eval_crop_ratio", type=share, help="crop / resize in evaluation (default: the model's)")


def _model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="ours or a timm ViT name (default: deit_small)")
    group.add_argument("--num_registers", type=_bounded(int, 0, 1024), help="in all (default: what the model has)")
    group.add_argument("--register_layer", type=count, help="block before which registers enter (default: 0)")
    _boolean(group, "pretrained", None, "timm's weights (default: yes, unless --finetune or --resume is given)")
    group.add_argument("--finetune", metavar="FILE|URL", help="weights to start from, of DeiT, timm, MCTF or ours")
    group.add_argument("--drop", type=below_one, default=0.0, help="dropout")
    group.add_argument("--drop_path", type=below_one, default=0.1, help="stochastic depth")


def _merging_flags(parser: Parser) -> None:
    group = parser.add_argument_group("merging (None: the method's published default)")
    group.add_argument("--merge", choices=METHODS, help="default: tome if --r or --r_evals is given")
    group.add_argument("--r", metavar="R", help="tokens per block: 16, ratio 0.35, list 16,0,8 or '(16,-1)'")
    group.add_argument("--r_evals", nargs="+", metavar="R", help="with --eval: several schedules in one pass")
    group.add_argument("--activate_layer", type=_layer_list, metavar="1,2,11", help="blocks that merge")
    group.add_argument("--dense_layers", type=count, help="the first blocks that merge nothing (DFE)")
    group.add_argument("--r_warmup_epochs", type=count, default=0, help="epochs over which r grows from 0")
    _boolean(group, "prop_attn", None, "proportional attention")
    for name in ("sim", "info", "size"):
        group.add_argument(f"--tau_{name}", type=amount, help="mctf: inverse exponent, 0 switches it off")
    _boolean(group, "bidirectional", None, "match both ways")
    group.add_argument("--one_step_ahead", choices=ONE_STEP_AHEAD, help="mctf")
    group.add_argument("--pooling", choices=POOLINGS)
    group.add_argument("--min_tokens", type=count, help="smallest number of tokens a merge may leave")
    group.add_argument("--local_grid", type=positive, help="lgtm: windows per side")
    group.add_argument("--global_layer", type=count, help="lgtm: first block with a global merge")


def _objective_flags(parser: Parser) -> None:
    group = parser.add_argument_group("objective")
    group.add_argument("--distillation_type", default="none", choices=("none", "soft", "hard"))
    group.add_argument("--teacher_model", default="regnety_160.deit_in1k", metavar="NAME", help="any timm model")
    group.add_argument("--teacher_path", metavar="FILE|URL")
    group.add_argument("--distillation_alpha", type=share, default=0.5)
    group.add_argument("--distillation_tau", type=above_zero, default=1.0)
    group.add_argument("--merged_weight", type=amount, default=1.0, help="of the loss of the merged pass")
    group.add_argument("--full_weight", type=amount, default=0.0, help="> 0 adds a pass at a random r'")
    group.add_argument("--full_r_max", type=_number, default=8, help="r' in [0, this); below 1 a ratio")
    group.add_argument("--consistency_weight", type=amount, default=0.0)
    group.add_argument("--consistency_threshold", type=below_one, default=0.4, help="0: all images")
    _boolean(group, "bce_loss", False, "binary cross entropy (DeiT-III)")


def _optimizer_flags(parser: Parser) -> None:
    group = parser.add_argument_group("optimisation (DeiT's names and defaults)")
    group.add_argument("--epochs", type=positive, default=300)
    group.add_argument("--opt", default="adamw", metavar="NAME", help="timm's optimizers")
    group.add_argument("--opt_eps", type=above_zero, default=1e-8)
    group.add_argument("--opt_betas", type=below_one, nargs="+", metavar="BETA")
    group.add_argument("--momentum", type=below_one, default=0.9)
    group.add_argument("--weight_decay", type=amount, default=0.05)
    group.add_argument("--clip_grad", type=above_zero, metavar="NORM")
    group.add_argument("--sched", default="cosine", metavar="NAME", help="timm's schedulers")
    group.add_argument("--lr", type=amount, default=5e-4, help="times global batch / 512")
    _boolean(group, "unscale_lr", False, "do not scale lr by the global batch")
    group.add_argument("--lr_times", type=above_zero, default=1.0, help="factor on lr")
    group.add_argument("--min_lr_times", type=amount, default=1.0, help="factor on min_lr and warmup_lr")
    group.add_argument("--warmup_lr", type=amount, default=1e-6)
    group.add_argument("--min_lr", type=amount, default=1e-5)
    group.add_argument("--warmup_epochs", type=count, default=5)
    group.add_argument("--cooldown_epochs", type=count, default=0, help="epochs at min_lr after --epochs")
    group.add_argument("--decay_epochs", type=above_zero, default=30.0)
    group.add_argument("--decay_rate", type=above_zero, default=0.1)
    group.add_argument("--patience_epochs", type=positive, default=10)
    group.add_argument("--accumulation_steps", type=positive, default=1, help="micro-steps per update")
    group.add_argument("--amp", choices=("bf16", "fp16", "none"), help="default: bf16 on a GPU, none on a CPU")
    _boolean(group, "compile", False, "torch.compile")
    _boolean(group, "grad_checkpointing", False, "recompute blocks in the backward")
    group.add_argument("--sam_rho", type=amount, default=0.0, help="sharpness-aware minimisation, 0: off")
    _boolean(group, "sam_adaptive", False, "ASAM")
    group.add_argument("--register_lr_mult", type=above_zero, default=1.0)
    group.add_argument("--train_only", choices=TRAIN_ONLY, default="all")
    _boolean(group, "model_ema", True, "average the weights; evaluated beside the raw ones")
    group.add_argument("--model_ema_decay", type=share, default=0.99996)
    group.add_argument(
        "--max_nonfinite", type=count, default=10, help="non-finite steps that are skipped before a stop"
    )


def _run_flags(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="", metavar="DIR")
    group.add_argument(
        "--resume", metavar="FILE|auto", help="go on from a checkpoint; auto: the newest in --output_dir"
    )
    group.add_argument("--eval", action="store_true", help="evaluate only")
    group.add_argument("--throughput", action="store_true", help="with --eval: images/s against timm's dense model")
    group.add_argument("--agreement", action="store_true", help="with --eval: compare with r=0 of the same weights")
    group.add_argument("--seed", type=_bounded(int, 0, 2**63 - 1), default=0)
    group.add_argument("--device", help="cuda, cpu, ... (default: a GPU if there is one)")
    group.add_argument("--save_every", type=positive, default=1, metavar="EPOCHS")
    group.add_argument("--save_every_steps", type=count, default=0, metavar="UPDATES", help="0: at epoch ends only")
    group.add_argument("--log_every", type=positive, default=10, metavar="UPDATES")
    group.add_argument(
        "--log_images", type=count, default=0, metavar="EPOCHS", help="norms, attention, merged tokens to tensorboard"
    )


def parse_args(argv: Sequence[str]) -> Namespace:
    """argv -> args. Flags win over --config, which wins over the data set's recipe, which wins over DeiT's defaults.

    Raises:
        UserError: anything that argparse or the rules between flags refuse.
    """
    parser = build_parser()
    argv = from_mctf(argv)
    args = parser.parse(argv)
    defaults = _config_tokens(args.config, parser) if args.config else []
    args = parser.parse([*defaults, *argv])
    if args.dataset in RECIPES:
        parser.set_defaults(**RECIPES[args.dataset])
        args = parser.parse([*defaults, *argv])
    _check_rules(args)
    return args


def from_mctf(argv: Sequence[str]) -> list[str]:
    """MCTF's command lines in named flags, which are printed; any other command line as it is.

    mctf_type = r, full_r_max, trace (no effect), prop_attn, one_step_ahead, tau_sim, tau_info, tau_size, bidirectional,
    pooling, unused; task_type = merged on/off, full on/off, consistency threshold (0: off), unused; task_weight =
    merged_weight, full_weight, consistency_weight. Where MCTF's defaults differ from DeiT's, they are put in front.
    """
    old = Parser(add_help=False, allow_abbrev=False)
    for flag in ("--use_mctf", "--mctf_type", "--task_type", "--task_weight"):
        old.add_argument(flag)
    given, rest = old.parse_known_args([underscored(token) for token in argv])
    if given.use_mctf is None and given.mctf_type is None and given.task_type is None:
        return list(argv)
    task = _number_list("task_type", given.task_type or "[1,0,0]", 3, 4)
    named = [] if "--eval" in rest else list(_MCTF_RECIPE)
    named += _task_flags(task, _number_list("task_weight", given.task_weight or "[1,1,1]", 3, 3))
    if (given.use_mctf or "True") not in ("False", "false", "0"):
        named += _method_flags(_number_list("mctf_type", given.mctf_type or "", 10, 11), bool(task[1]))
    rest = _unpack_r_evals(rest)
    log("as named flags: main.py " + " ".join([*named, *rest]))
    return [*named, *rest]


# what MCTF's main.py does where its README's command lines say nothing: no mixing, no warm-up, ten epochs of cooldown
_MCTF_RECIPE = ("--mixup", "0", "--cutmix", "0", "--warmup_epochs", "0", "--cooldown_epochs", "10")


def _number_list(flag: str, text: str, least: int, most: int) -> list[int | float]:
    """[16,8,0.4] -> numbers."""
    try:
        values = [_number(item) for item in text.strip().strip("[]()").split(",") if item.strip()]
    except ValueError:
        values = []
    if not least <= len(values) <= most:
        raise UserError(f"--{flag} must be a list of {least} to {most} numbers such as [16,8,...], not {text!r}")
    return values


def _task_flags(task: list[int | float], weight: list[int | float]) -> list[str]:
    merged, full, threshold = task[:3]
    flags = ["--merged_weight", str(weight[0] if merged else 0), "--full_weight", str(weight[1] if full else 0)]
    if full and threshold:
        flags += ["--consistency_weight", str(weight[2]), "--consistency_threshold", str(threshold)]
    return flags if merged or full else []


def _method_flags(values: list[int | float], pairing: bool) -> list[str]:
    r, full_r_max, _, prop_attn, ahead, tau_sim, tau_info, tau_size, both_ways, pooling = values[:10]
    try:
        flags = ["--merge", "mctf", "--r", str(r), "--one_step_ahead", ONE_STEP_AHEAD[int(ahead)]]
        flags += ["--pooling", POOLINGS[int(pooling)]]
    except IndexError:
        raise UserError("--mctf_type: one_step_ahead (5th) is 0, 1 or 2 and pooling (10th) is 0, 1, 2 or 3") from None
    for name, tau in (("tau_sim", tau_sim), ("tau_info", tau_info), ("tau_size", tau_size)):
        flags += [f"--{name}", str(tau)]
    flags += [
        "--prop_attn" if prop_attn else "--no_prop_attn",
        "--bidirectional" if both_ways else "--no_bidirectional",
    ]
    # r' in [0, 0) and in [0, 1) are both always 0
    return flags + (["--full_r_max", str(full_r_max or 1)] if pairing else [])


def _unpack_r_evals(tokens: list[str]) -> list[str]:
    """--r_evals [8,16] -> --r_evals 8 16."""
    unpacked: list[str] = []
    for before, token in zip(["", *tokens], tokens, strict=False):
        is_list = before == "--r_evals" and token.startswith("[")
        unpacked += [item for item in token.strip("[]").split(",") if item.strip()] if is_list else [token]
    return unpacked


def _config_tokens(path: str, parser: Parser) -> list[str]:
    """A yaml file as command-line tokens, so that its values pass the same checks."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold lines such as 'batch_size: 128'")
    known = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("config", "help")}
    tokens: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"--config {path}: {nearest(name, sorted(known), 'key')}")
        if isinstance(value, bool) != (known[name].nargs == 0) and value is not None:
            wanted = "true or false" if known[name].nargs == 0 else "a value, not true or false"
            raise UserError(f"--config {path}: {name} takes {wanted}")
        tokens += _config_value(name, value, known[name].nargs is not None, parser)
    return tokens


def _config_value(name: str, value: Any, several: bool, parser: Parser) -> list[str]:
    """One line of the file as tokens; a list is joined by commas where the flag takes one value."""
    if value is None or (value is False and f"--no_{name}" not in parser._option_string_actions):
        return []  # a flag without a negative form is off anyway
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    if isinstance(value, list) and several:
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def _check_rules(args: Namespace) -> None:
    """Options that contradict each other or do nothing."""
    if args.dataset not in SOURCES:
        raise UserError(nearest(args.dataset, SOURCES, "--dataset"))
    only_eval = {"--throughput": args.throughput, "--agreement": args.agreement, "--r_evals": args.r_evals}
    for flag, given in only_eval.items():
        if given and not args.eval:
            raise UserError(f"{flag} has no effect without --eval; add it or leave {flag} out")
    if args.log_images and (args.eval or not args.output_dir):
        raise UserError("--log_images writes tensorboard events in training: it needs --output_dir and no --eval")
    if args.sam_adaptive and not args.sam_rho:
        raise UserError("--sam_adaptive has no effect without --sam_rho; give --sam_rho 2.0")
    if args.save_every_steps and not args.output_dir:
        raise UserError("--save_every_steps needs --output_dir to save into")
    if args.eval and args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto looks into --output_dir, which is not given; add it")
    if args.opt_betas and args.opt.startswith(("adam", "lamb", "nadam", "radam")) and len(args.opt_betas) != 2:
        raise UserError(f"--opt_betas needs two numbers for {args.opt}, not {len(args.opt_betas)}")


# Building


_MERGE_FIELDS = [field.name for field in fields(MergeConfig) if field.name not in ("method", "r", "activate_layers")]


def merge_config(args: Namespace, stored: dict[str, Any] | None = None) -> MergeConfig:
    """The merging that the command line asks for, or a checkpoint's where it asks for nothing."""
    given = {name: getattr(args, name) for name in _MERGE_FIELDS if getattr(args, name) is not None}
    if args.activate_layer is not None:
        given["activate_layers"] = args.activate_layer
    asks = args.merge is not None or args.r is not None or bool(given)
    if stored is not None and not asks and not (stored["method"] == "none" and args.r_evals):
        return MergeConfig.from_dict(stored)
    evaluated = [r for r in args.r_evals or () if parse_schedule(r) != 0]
    method = args.merge or ("tome" if args.r is not None or evaluated else "none")
    if method != "none" and args.r is None and not args.r_evals:
        raise UserError(f"--merge {method} merges nothing without an amount; give --r, for instance --r 16")
    r = args.r if args.r is not None else evaluated[0] if evaluated and method != "none" else 0
    return MergeConfig(method=method, r=r, **given)


class Weights:
    """Where weights come from: --resume wins over --finetune, which wins over published ones."""

    def __init__(self, args: Namespace, name: str | None) -> None:
        self.resumed = load_resume(args.resume, args.output_dir)
        if args.resume == "auto" and args.eval and self.resumed is None:
            raise UserError(f"--resume auto finds no checkpoint in {args.output_dir}; name a file")
        self.path = self.resumed[1] if self.resumed else args.finetune
        self.state = self.resumed[0] if self.resumed else (load_checkpoint(args.finetune) if args.finetune else None)
        state = self.state or {}
        ours = isinstance(state.get("args"), dict) and isinstance(state.get("merge"), dict)
        self.stored: dict[str, Any] | None = state["args"] if ours else None
        self.name = name or (self.stored or {}).get("model") or "deit_small"
        default = self.state is None and self.name not in OWN_SIZES
        self.pretrained = default if args.pretrained is None else args.pretrained and self.state is None
        if args.pretrained and self.state is not None:
            log(f"--pretrained gives way to {self.path}")

    @property
    def merge(self) -> dict[str, Any] | None:
        """The merging stored with our own checkpoint."""
        return self.state["merge"] if self.stored is not None and self.state is not None else None

    def tensors(self) -> dict[str, torch.Tensor] | None:
        """Weights in timm's names; None: published or random ones."""
        return None if self.state is None else extract_state_dict(self.state, source=str(self.path))[0]

    @property
    def source(self) -> str:
        return str(self.path or ("timm" if self.pretrained else "random"))


def build_model(args: Namespace, weights: Weights, num_classes: int, config: DataConfig) -> MergingViT:
    """The model with its weights; prints what was loaded."""
    tensors = weights.tensors()
    registers, register_layer = args.num_registers, args.register_layer
    if tensors is not None and registers is None and "reg_token" in tensors:
        registers = tensors["reg_token"].shape[1]
    if weights.stored is not None and register_layer is None and registers:
        register_layer = weights.stored.get("register_layer")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = create_model(
            weights.name,
            num_registers=registers,
            merge=merge_config(args, weights.merge),
            num_classes=num_classes,
            img_size=config.input_size,
            pretrained=weights.pretrained,
            register_layer=register_layer or 0,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
        )
    for message in caught:
        log(f"warning: {message.message}")
    if tensors is not None:
        strict = args.eval or weights.resumed is not None
        report = load_weights(
            model, tensors, num_classes_changed_ok=not strict, source=str(weights.path), name=weights.name
        )
        for line in report.lines():
            log(f"{weights.path}: {line}")
    elif weights.pretrained and model.num_classes != 1000 and not args.eval:
        log(f"{weights.name}: published weights; the head is fresh, for {num_classes} classes")
    return model


def build_config(args: Namespace, name: str) -> DataConfig:
    """Preprocessing of a model's published weights, as flags change it."""
    check_name(name)
    config = DataConfig(**data_settings(name))
    changes = {"input_size": args.input_size, "crop_pct": args.eval_crop_ratio}
    return replace(config, **{key: value for key, value in changes.items() if value is not None})


def prepare(args: Namespace, dist: Distributed) -> tuple[Data, Weights, MergingViT, Precision]:
    """Everything that training and evaluation share, in the order in which mistakes are cheapest to find."""
    setup_output(args.output_dir, dist.is_main)
    seed_all(args.seed)  # the same fresh parameters on all ranks
    merge_config(args)
    precision = build_precision(args, dist.device)
    weights = Weights(args, args.model)
    data = build_data(args, build_config(args, weights.name))
    for note in data.notes:
        log(f"note: {note}")
    model = build_model(args, weights, data.num_classes, data.config).to(dist.device)
    describe(model, weights, data)
    return data, weights, model, precision


def describe(model: MergingViT, weights: Weights, data: Data) -> None:
    """What is about to run: model, weights, tokens per block and GMACs."""
    params = sum(p.numel() for p in model.parameters())
    log(f"{weights.name}: {params / 1e6:.2f} M parameters, {model.num_registers} registers, weights: {weights.source}")
    method, r = model.merge.method, format_schedule(model.merge.r)
    log(f"merging: {method}, r={r}; tokens per block: {list(model.plan().counts)}; {gmacs(model):.3f} GMACs")
    train = f"{len(data.train)} train, " if data.train is not None else ""
    log(f"data: {data.name}, {train}{len(data.val)} val images, {data.num_classes} classes")


# Evaluation


def run_eval(args: Namespace, dist: Distributed) -> int:
    """--eval: every schedule of --r_evals in one pass; writes result.json."""
    data, weights, model, precision = prepare(args, dist)
    schedules = list(args.r_evals or [format_schedule(model.merge.r)])
    plans = {text: model.plan(text) for text in schedules}  # mistakes before the pass over the data
    forward: nn.Module = compile_model(model) if args.compile else model
    scores = evaluate(
        forward,
        build_eval_loader(args, data.val, dist.rank, dist.world),
        [parse_schedule(text) for text in schedules],
        precision,
        dist,
        agreement=args.agreement,
        bad=BadImages(bad_image_limit(args, data)),
        log=log,
        log_every=args.log_every,
    )
    assert scores is not None  # only a stop signal, which is not listened to here, leaves none
    rows = [_row(model, text, plans[text], score) for text, score in zip(schedules, scores, strict=True)]
    if args.throughput:
        _add_throughput(rows, args, weights.name, model, forward, precision, dist)
    result = {
        "model": weights.name,
        "weights": weights.source,
        "dataset": data.name,
        "num_registers": model.num_registers,
        "merge": model.merge.as_dict(),
        "n_images": scores[0].n_images,
        "device": device_name(dist.device),
        "versions": versions(),
        "git": git_revision(),
        "rows": rows,
    }
    for row in rows:
        log("  ".join(_row_text(row)))
    if args.output_dir and dist.is_main:
        write_json(Path(args.output_dir) / "args.json", to_plain(args))
        write_json(Path(args.output_dir) / "result.json", result)
        log(f"wrote {Path(args.output_dir) / 'result.json'}")
    barrier()
    return 0


def _row(model: MergingViT, text: str, plan: Any, score: Scores) -> dict[str, Any]:
    row: dict[str, Any] = {"r": format_schedule(parse_schedule(text)), "schedule": list(plan.merges)}
    row |= {"tokens": list(plan.counts), "gmacs": round(gmacs(model, text), 4)}
    row["params"] = sum(p.numel() for p in model.parameters())
    row |= {"acc1": score.acc1, "acc5": score.acc5, "loss": score.loss}
    if score.agree is not None:
        row |= {"agree": score.agree, "kl": score.kl}
    return row


def _row_text(row: dict[str, Any]) -> list[str]:
    text = [f"r={row['r']}", f"acc1 {row['acc1']:.3f}", f"acc5 {row['acc5']:.3f}", f"loss {row['loss']:.4f}"]
    text += [f"gmacs {row['gmacs']:.3f}", f"tokens left {row['tokens'][-1]}"]
    if "agree" in row:
        text += [f"agree {row['agree']:.2f}", f"kl {row['kl']:.4f}"]
    if "images_per_s" in row:
        text += [f"{row['images_per_s']['median']:.1f} images/s", f"{row['speedup']:.2f}x native"]
    return text


def _add_throughput(
    rows: list[dict[str, Any]],
    args: Namespace,
    name: str,
    model: MergingViT,
    forward: nn.Module,
    precision: Precision,
    dist: Distributed,
) -> None:
    """images/s of every row and of timm's dense model, in interleaved rounds on random images."""
    size = model.patch_embed.img_size
    native = native_model(name, num_classes=model.num_classes, img_size=size[0]).to(dist.device).eval()
    images = torch.randn(args.batch_size, 3, *size, device=dist.device)
    runs: dict[str, Callable[[torch.Tensor], Any]] = {"native": compile_model(native) if args.compile else native}
    runs |= {f"row {i}": partial(forward.eval(), r=parse_schedule(row["r"])) for i, row in enumerate(rows)}
    speeds = throughput(runs, images, precision)
    for i, row in enumerate(rows):
        speed = speeds[f"row {i}"]
        row |= {"images_per_s": speed, "native_images_per_s": speeds["native"], "batch_size": args.batch_size}
        row["speedup"] = speed["median"] / speeds["native"]["median"]


def device_name(device: torch.device) -> str:
    """What a measurement ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


# Training

_OF_SCHEDULE: tuple[str, ...] = (
    "lr",
    "lr_times",
    "min_lr",
    "min_lr_times",
    "warmup_lr",
    "warmup_epochs",
    "epochs",
    "decay_epochs",
)
_OF_SCHEDULE += ("decay_rate", "patience_epochs", "weight_decay")


class Run:
    """A training run: what is saved, logged and resumed."""

    def __init__(self, args: Namespace, dist: Distributed) -> None:
        self.args, self.dist = args, dist
        self.folder = Path(args.output_dir).expanduser() if args.output_dir else None
        self.data, weights, self.module, precision = prepare(args, dist)
        self.name = weights.name
        freeze(self.module, args.train_only)
        self.train_loader = build_train_loader(args, self.data, dist.rank, dist.world)
        self.val_loader = build_eval_loader(args, self.data.val, dist.rank, dist.world)
        teacher = build_teacher(args, self.data.num_classes, dist.device)
        objective = build_objective(args, teacher, self.module)
        groups = parameter_groups(self.module, args.weight_decay, args.register_lr_mult)
        mixup = build_mixup(args, self.data.num_classes)
        self.trainer = build_trainer(args, dist, self.module, groups, objective, precision, mixup)
        self.scheduler, self.epochs = build_scheduler(args, self.trainer.optimizer)
        self.bad = BadImages(bad_image_limit(args, self.data))
        self.epoch, self.step, self.best = 0, 0, -1.0
        self.epoch_log, self.seconds, self.saved = EpochLog(), 0.0, ""
        if weights.resumed is not None:
            self._resume(*weights.resumed)
        self.writer = tensorboard(args.output_dir, dist.is_main, self.epoch or None)

    @property
    def checkpoint(self) -> Path | None:
        return self.folder / "checkpoint.pth" if self.folder else None

    def state(self) -> dict[str, Any]:
        """A checkpoint: tensors and plain values only."""
        trainer = self.trainer
        return {
            "model": self.module.state_dict(),
            "model_ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
            "optimizer": trainer.optimizer.state_dict(),
            "lr_scheduler": scheduler_state(self.scheduler),
            "scaler": trainer.precision.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "rng": rng_state() | {"objective": trainer.objective.state_dict()},
            "sampler": self._position(),
            "epoch_log": asdict(self.epoch_log) | {"seconds": self.seconds},
            "merge": self.module.merge.as_dict(),
            "args": to_plain(self.args) | {"model": self.name},
            "best": self.best,
        }

    def _position(self) -> dict[str, int]:
        """What the meaning of `step` depends on."""
        args = self.args
        shape = {"seed": args.seed, "batch_size": args.batch_size, "accumulation_steps": args.accumulation_steps}
        return shape | {"world": self.dist.world, "micro_batches": len(self.train_loader)}

    def _resume(self, state: dict[str, Any], path: str) -> None:
        check_resumable(state, path)
        trainer = self.trainer
        try:
            trainer.optimizer.load_state_dict(state["optimizer"])
            load_scheduler_state(self.scheduler, state["lr_scheduler"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} does not fit these optimizer options ({error}); use --finetune {path}") from error
        if trainer.ema is not None:
            ema = state.get("model_ema")
            trainer.ema.module.load_state_dict(state["model"] if ema is None else ema)
        if state.get("scaler"):  # a run that used no fp16 has left none
            trainer.precision.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = int(state["epoch"]), int(state.get("step", 0))
        self.best = float(state.get("best", -1.0))
        if "epoch_log" in state:
            saved = dict(state["epoch_log"])
            self.seconds = saved.pop("seconds")
            self.epoch_log = EpochLog(**saved)
        if "rng" in state:
            set_rng_state(state["rng"])
            trainer.objective.load_state_dict(state["rng"]["objective"])
        self._check_position(state.get("sampler"), path)
        self._tell_ignored(state.get("args"))
        self.saved = path
        log(f"resumed {path} at epoch {self.epoch}, micro-batch {self.step}")

    def _check_position(self, saved: dict[str, int] | None, path: str) -> None:
        if saved is None or saved == self._position():
            return
        changed = ", ".join(
            f"{key} {saved[key]} -> {now}" for key, now in self._position().items() if saved[key] != now
        )
        if self.step:
            raise UserError(
                f"{path} stopped inside an epoch, which cannot go on with {changed}; keep them as they were"
            )
        log(f"warning: resumed with {changed}: the run goes on, but not as the unbroken one would")

    def _tell_ignored(self, saved: Any) -> None:
        """Flags of the schedule do nothing on a resumed run, whose schedule is the checkpoint's."""
        now, before = to_plain(self.args), saved if isinstance(saved, dict) else {}
        changed = [f"--{name}" for name in _OF_SCHEDULE if name in before and before[name] != now[name]]
        if changed:
            log(f"warning: the checkpoint's optimizer and schedule go on, whatever {', '.join(changed)} says now")

    def save(self) -> None:
        """Write checkpoint.pth on rank 0; the others wait, so that none runs ahead of what is safe."""
        if self.checkpoint is not None and self.dist.is_main:
            save_checkpoint(self.checkpoint, self.state())
        barrier()
        if self.checkpoint is not None:
            self.saved = f"{self.checkpoint} (epoch {self.epoch}, micro-batch {self.step})"

    def fit(self, stop: StopSignal) -> int:
        """Train to the end or to a stop; returns the exit status.

        Raises:
            RunError: the run cannot go on; names the checkpoint to go on from.
        """
        try:
            return self._fit(stop)
        except RunError as error:
            saved = self.saved or "none"
            raise RunError(f"{error}; last good checkpoint: {saved}") from error

    def _fit(self, stop: StopSignal) -> int:
        if self.folder is not None and self.dist.is_main:
            write_json(self.folder / "args.json", to_plain(self.args))
            clear_stop_marker(self.folder)
            truncate_log(self.folder / "log.txt", self.epoch)
        while self.epoch < self.epochs:
            if not (self._train_epoch(stop) and self._finish_epoch(stop)):
                return self._stopped(stop)
        log(f"done: {self.epochs} epochs, best accuracy {self.best:.3f} %")
        self.writer.close()
        return 0

    def _train_epoch(self, stop: StopSignal) -> bool:
        """Train the rest of an epoch; False after a stop."""
        began, before = time.monotonic(), self.seconds
        self.trainer.objective.start_epoch(self.epoch)

        def after_step(done: int) -> None:
            self.step, self.seconds = done, before + time.monotonic() - began
            every = self.args.save_every_steps * self.args.accumulation_steps
            if every and done % every == 0 and done < len(self.train_loader):
                self.save()

        return train_one_epoch(
            self.trainer,
            self.train_loader,
            self.epoch,
            self.step,
            epoch_log=self.epoch_log,
            set_lr=self._set_lr,
            stop=stop,
            bad=self.bad,
            max_nonfinite=self.args.max_nonfinite,
            log=log,
            log_every=self.args.log_every,
            after_step=after_step,
        )

    def _set_lr(self, epoch: float) -> float:
        if self.args.sched != "plateau":
            self.scheduler.step(epoch)  # type: ignore[arg-type]  # timm's schedules are smooth in the epoch
        return max(group["lr"] / group.get("lr_scale", 1.0) for group in self.trainer.optimizer.param_groups)

    def _stopped(self, stop: StopSignal) -> int:
        self.save()
        where = (
            f"{self.checkpoint}; go on with --resume auto" if self.checkpoint else "nothing: there is no --output_dir"
        )
        if self.dist.is_main:
            write_stop_marker(self.folder, str(stop.requested), self.epoch, self.step)
        log(f"stopped by {stop.requested} in epoch {self.epoch} after micro-batch {self.step}; saved {where}")
        self.writer.close()
        return stop.status

    def _finish_epoch(self, stop: StopSignal) -> bool:
        """Evaluate, log, save; False after a stop, and then a resumed run evaluates first."""
        raw = self._evaluate(self.trainer.model, "test", stop)
        average = self.trainer.ema
        ema = self._evaluate(average.module, "test EMA", stop) if raw is not None and average is not None else None
        if raw is None or (average is not None and ema is None):
            return False
        chosen = raw if ema is None else ema
        lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in self.trainer.optimizer.param_groups)
        line = {"epoch": self.epoch, **{f"train_{name}": value for name, value in self.epoch_log.means().items()}}
        line |= {"lr": lr, "test_loss": raw.loss, "test_acc1": raw.acc1, "test_acc5": raw.acc5}
        line |= {} if ema is None else {"ema_acc1": ema.acc1}
        line |= {"images_per_s": self.epoch_log.samples / max(self.seconds, 1e-9), "seconds": self.seconds}
        if self.args.sched == "plateau":
            self.scheduler.step(self.epoch + 1, raw.acc1)
        if self.dist.is_main:
            self._log_epoch(line)
        if self.dist.is_main and self.args.log_images and (self.epoch + 1) % self.args.log_images == 0:
            self._log_images()
        better = chosen.acc1 > self.best
        self.best = max(self.best, chosen.acc1)
        self.epoch, self.step, self.epoch_log, self.seconds = (
            self.epoch + 1,
            0,
            EpochLog(nonfinite=self.epoch_log.nonfinite),
            0.0,
        )
        if better:
            self._save_best()
        if self.epoch % self.args.save_every == 0 or self.epoch == self.epochs:
            self.save()
        return True

    def _evaluate(self, model: nn.Module, title: str, stop: StopSignal) -> Scores | None:
        module = getattr(model, "module", model)  # DDP would wait for ranks that have fewer batches
        precision, every = self.trainer.precision, self.args.log_every
        options = {"bad": self.bad, "log": log, "title": title, "log_every": every, "stop": stop}
        scores = evaluate(module, self.val_loader, [None], precision, self.dist, **options)
        return scores[0] if scores else None

    def _log_epoch(self, line: dict[str, Any]) -> None:
        log("  ".join(f"{key} {value:.5g}" for key, value in line.items()))
        for key, value in line.items():
            if key != "epoch":
                self.writer.add_scalar(key.replace("_", "/", 1), value, self.epoch)
        self.writer.flush()
        if self.folder is not None:
            append_json_line(self.folder / "log.txt", line)

    def _log_images(self) -> None:
        """Norms, attention and merged tokens of a few validation images."""
        from models.log_images import log_images  # an instrument: who does not ask for it does not load it

        val = self.data.val
        images = torch.stack([val[i].image for i in range(0, len(val), math.ceil(len(val) / 4))])
        looks = unnormalise(images, self.data.config)
        log_images(self.module, images.to(self.dist.device), looks, self.writer, self.epoch)
        self.writer.flush()

    def _save_best(self) -> None:
        """best.pth holds the weights that were judged: the average where there is one."""
        if self.folder is None or not self.dist.is_main:
            return
        state = self.state()
        judged = state["model"] if state["model_ema"] is None else state["model_ema"]
        kept = {"model": judged, "epoch": self.epoch, "best": self.best, "merge": state["merge"], "args": state["args"]}
        save_checkpoint(self.folder / "best.pth", kept, keep_previous=False)


def run_training(args: Namespace, dist: Distributed) -> int:
    """Train, evaluating the merged model after every epoch."""
    with StopSignal() as stop:
        run = Run(args, dist)
        return run.fit(stop)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0 done, 1 stopped by an error of the run, 2 the user's mistake,
    75 stopped by a signal and resumable, 130 interrupted."""
    try:
        args = parse_args(sys.argv[1:] if argv is None else list(argv))
        dist = init_distributed(args.device)
        return run_eval(args, dist) if args.eval else run_training(args, dist)
    except UserError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)
    finally:
        close_distributed()


def _fail(error: object, status: int) -> int:
    who = "main.py: error" if is_main_process() else "main.py: error on another rank"
    print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
