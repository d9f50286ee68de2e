"""The command line of main.py: every flag, the yaml file, MCTF's old flags, and all rules between flags.

A value is taken from the command line, else from the --config file, else from the recipe of the data set, else from
the defaults here, which are DeiT's. None stands for the default of the model or of the merging method.
"""

import argparse
import difflib
import itertools
import math
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.optim import get_optimizer_info, list_optimizers

import interrupts
from budget import is_schedule_file, read_schedule
from distributed import close_distributed
from losses import mixes_images
from models import MergeConfig, UserError
from models.adapters import TARGETS
from models.methods import AUTO, METHODS, POOLINGS, all_knobs, methods_with
from models.methods.mctf import ONE_STEP_AHEAD
from models.parameters import PARTS, parse_train_only
from models.registry import NAMES
from models.schedule import format_schedule, parse_schedule
from sources import DATASET_ALIASES, DATASETS, RECIPES, RECOVERY
from utils import INTERRUPTED_STATUS, RunError, is_main_process, log, nearest, without_credentials

DESCRIPTION = """\
Finetune and evaluate Vision Transformers with register tokens and token merging.

torchrun --nproc_per_node=8 main.py --model deit_small --r 16 --num_registers 4
python main.py --eval --model deit_tiny --merge tome --r_evals 0 8 16 --data_path data/IMNET
"""
LORA_TRAINS = "lora,registers,head"  # what --lora trains unless --train_only says more; registers if there are any
# whose steps on slices of the weights (--fsdp) were found equal to those on whole ones
OPTIMIZERS_OF_SLICES = ("adamw", "adam", "nadamw", "nadam", "radamw", "sgd", "momentum", "rmsprop", "lion", "lamb")
RECOVERED_PLAINLY = ("three_augment", "aa", "color_jitter", "train_interpolation", "reprob", "remode", "recount")
WARMUP_EPOCHS = 5  # DeiT's, for its 300 epochs
SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly")  # timm's, of which DeiT's flags describe these


# flags of DeiT and its relatives that are no flags here, and what takes their place
NO_FLAGS = {
    "--world_size": "the launcher sets the number of processes: torchrun --nproc_per_node=N, or srun",
    "--dist_url": "the launcher sets the meeting point: torchrun --rdzv_endpoint, or MASTER_ADDR and MASTER_PORT",
    "--distributed": "a run with several processes is one that a launcher starts: torchrun --nproc_per_node=N, or srun",
    "--start_epoch": "a resumed run goes on where its checkpoint stands; leave it out, or use --finetune to start anew",
    "--train_mode": "the model trains in training mode; leave it out",
    "--no_train_mode": "the model trains in training mode; for a frozen backbone give --train_only head",
    "--attn_only": "to train a part of the model give --train_only or --lora",
    "--inat_category": "iNaturalist's levels are named by the data set; see --dataset in --help",
    "--cosub": "DeiT-III's co-training of submodels is not built; leave it out",
    "--resplit": "it belongs to timm's AugMix splits, which are not built; leave it out",
    **{
        f"--lr_noise{part}": "the rate follows from the update alone, so that a run resumes to the bit; leave it out"
        for part in ("", "_pct", "_std")
    },
    "--unscale_min_lr": "min_lr is never scaled; give --min_lr",
    "--no_model_ema_force_cpu": "the average lies on the model's device; leave it out",
    "--model_ema_force_cpu": "the average lies on the model's device; leave it out",
}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with the nearest flag for an unknown one."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see --help")

    def parse(self, argv: Sequence[str], args: Namespace | None = None) -> Namespace:
        """Parse a command line whose flags may be spelled with hyphens.

        Args:
            args: values that take the place of the defaults.

        Raises:
            UserError: anything that argparse refuses, or a flag or word that it does not know.
        """
        tokens = [normalise_flag(token) for token in argv]
        self._refuse_contradictions(tokens)
        parsed, unknown = self.parse_known_args(tokens, args or Namespace())
        for token in unknown:
            if not token.startswith("--"):
                raise UserError(f"unexpected argument {token!r}; see --help")
            if token.split("=")[0] in NO_FLAGS:
                raise UserError(f"{token.split('=')[0]}: {NO_FLAGS[token.split('=')[0]]}")
            near = difflib.get_close_matches(token.split("=")[0], self.spellings(), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown flag {token.split('=')[0]}; {hint}see --help")
        return parsed

    def _refuse_contradictions(self, tokens: Sequence[str]) -> None:
        """Refuse --flag beside --no_flag, and a second --config, of which argparse would heed the last one only."""
        flags = {token.split("=")[0] for token in tokens if token.startswith("--")}
        for action in self.spellings().values():
            named = sorted(flags.intersection(action.option_strings))
            for other in sorted(flags):
                if named and other == f"--no_{action.dest}" and action.const is True:
                    raise UserError(f"{named[0]} and {other} contradict each other; give one of them")
        if sum(token.split("=")[0] == "--config" for token in tokens) > 1:
            raise UserError("--config is given twice; put both files into one")

    def defaults(self) -> dict[str, Any]:
        """Return the values of an empty command line."""
        return vars(self.parse([]))

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the values of the flags that a command line names, and of no others.

        argparse gives a flag its default only where the namespace that it fills has no value yet.
        """
        unset = object()
        args = self.parse(argv, Namespace(**dict.fromkeys(self.defaults(), unset)))
        return {name: value for name, value in vars(args).items() if value is not unset}

    def spellings(self) -> dict[str, argparse.Action]:
        """Return every spelling of every flag; argparse has no public list of its actions, hence the private one."""
        return {text: action for action in self._actions for text in action.option_strings if text.startswith("--")}


def normalise_flag(token: str) -> str:
    """Spell a flag with underscores: --batch-size=4 -> --batch_size=4. Values keep their hyphens."""
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    if value == "--":  # argparse would take it for the end of the options and hand on an empty list
        raise UserError(f"{flag} needs a value, not '--'; see --help")
    return "--" + flag[2:].replace("-", "_") + equals + value


# Types of values


@dataclass(frozen=True)
class Number:
    """A number type for argparse, which tells its range in the error."""

    kind: type[int] | type[float]
    low: float
    high: float = math.inf
    low_excluded: bool = False
    high_excluded: bool = False

    def __call__(self, text: str) -> Any:
        try:
            value = self.kind(text)
        except ValueError:
            name = "integer" if self.kind is int else "number"
            raise ArgumentTypeError(f"invalid {name} value: {text!r}") from None
        above = self.low < value if self.low_excluded else self.low <= value
        below = value < self.high if self.high_excluded else value <= self.high  # both are false for NaN
        if not above or not below or value in (math.inf, -math.inf):
            interval = f"{'>' if self.low_excluded else '>='} {self.low:g}"
            interval += f" and {'<' if self.high_excluded else '<='} {self.high:g}" if self.high < math.inf else ""
            raise ArgumentTypeError(f"must be {interval}, not {text}")
        return value


positive_int = Number(int, 1, 10**9)
non_negative_int = Number(int, 0, 10**9)
positive_float = Number(float, 0, low_excluded=True)
non_negative = Number(float, 0)
unit_interval = Number(float, 0, 1)
unit_interval_below_one = Number(float, 0, 1, high_excluded=True)


def finite_number(text: str) -> int | float:
    """Parse an int where the text is one, else a float."""
    try:
        value = int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"invalid number value: {text!r}")
    return value


def dataset_name(text: str) -> str:
    """Return our name of a data set for one of DeiT's."""
    return DATASET_ALIASES.get(text, text)


def block_list(text: str) -> tuple[int, ...]:
    """Parse indices of blocks: 1,2,11 or [1,2,11]."""
    try:
        blocks = tuple(int(item) for item in text.strip("[]() ").split(",") if item.strip())
    except ValueError:
        raise ArgumentTypeError(f"invalid list of blocks value: {text!r}") from None
    if not blocks:
        raise ArgumentTypeError("names no block; for a model that does not merge give --merge none")
    return blocks


def gmacs_budget(text: str) -> str:
    """Check a number of GMACs, 0.70, or per cent of the dense model's, 55%."""
    text = text.strip()
    positive_float(text.removesuffix("%"))
    if text.endswith("%") and float(text[:-1]) >= 100:
        raise ArgumentTypeError(f"must be below 100%, the dense model, not {text}")
    return text


def trainable_parts(text: str) -> str:
    """Check the parts of the model that --train_only names."""
    try:
        parse_train_only(text)
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None
    return text


def adapted_parts(text: str) -> tuple[str, ...]:
    """Parse parts of a block: qkv,proj."""
    parts = tuple(part.strip() for part in text.split(","))
    if unknown := [part for part in parts if part not in TARGETS]:
        raise ArgumentTypeError(f"must be some of {', '.join(TARGETS)} with commas between them, not {unknown[0]!r}")
    if len(set(parts)) < len(parts):
        raise ArgumentTypeError(f"{text} names a part twice; leave one out")
    return parts


def nonempty(text: str) -> str:
    """Refuse an empty text, which a script passes when a variable of its own is not set."""
    if not text.strip():
        raise ArgumentTypeError("is empty; name one or leave the flag out")
    return text


def add_boolean(group: Any, flag: str, default: bool | None, text: str, *aliases: str) -> None:
    """Add --flag and --no_flag, of which the last one given wins."""
    group.add_argument(f"--{flag}", *aliases, dest=flag, action="store_true", default=default, help=text)
    group.add_argument(f"--no_{flag}", dest=flag, action="store_false", help=argparse.SUPPRESS)


# Flags


def _general_flags(parser: Parser) -> None:
    group = parser.add_argument_group("general")
    group.add_argument("--config", type=nonempty, metavar="FILE", help="yaml file of defaults: flags without dashes")
    group.add_argument("--seed", type=Number(int, 0, 2**63 - 1), default=0)
    group.add_argument("--device", help="cuda, cpu, ... (default: a GPU if there is one)")


def _data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", "--data_set", type=dataset_name, default="IMNET", metavar="NAME", help=", ".join(DATASETS)
    )
    text = "folder of the data (default: data/<dataset>); WDS: or shards to train on, CSV: or a list"
    group.add_argument("--data_path", type=nonempty, help=text)
    group.add_argument("--val_path", type=nonempty, metavar="LIST", help="WDS, CSV: shards or list to evaluate on")
    text = "pixels (default: the checkpoint's or the model's)"
    group.add_argument("--input_size", type=Number(int, 1, 4096), help=text)
    group.add_argument(
        "--eval_crop_ratio", type=unit_interval, help="crop / resize in evaluation (default: as input_size)"
    )
    group.add_argument("--batch_size", type=positive_int, default=64, help="per process and micro-step")
    group.add_argument(
        "--num_workers", type=non_negative_int, help="loader processes per process (default: one per 128 images, to 10)"
    )
    group.add_argument(
        "--loader_timeout",
        type=non_negative,
        default=600.0,
        metavar="SECONDS",
        help="without a batch from the loader processes, after which the run ends (0: never)",
    )
    group.add_argument(
        "--limit", type=positive_int, metavar="N", help="every ceil(len/N)-th image of each split, for trials"
    )
    add_boolean(group, "pin_mem", True, "pinned memory for faster copies to a GPU")


def _model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    text = "ours or a timm ViT name (default: the checkpoint's, else deit_small)"
    group.add_argument("--model", type=nonempty, metavar="NAME", help=text)
    group.add_argument("--num_registers", type=Number(int, 0, 1024), help="in all (default: what the model has)")
    group.add_argument(
        "--register_layer", type=non_negative_int, help="block before which registers enter (default: 0)"
    )
    add_boolean(group, "pretrained", None, "timm's weights (default: yes, unless --finetune or --resume is given)")
    text = "weights to start from, of DeiT, timm, MCTF or ours"
    group.add_argument("--finetune", type=nonempty, metavar="FILE|URL", help=text)
    add_boolean(group, "use_ema", False, "of a checkpoint.pth, which holds both: the average, not the raw weights")


def _merging_flags(parser: Parser) -> None:
    """Add the schedule, and a flag for every setting of every method in `models/methods`."""
    group = parser.add_argument_group("merging (settings default to the method's published values)")
    group.add_argument(
        "--merge", choices=(*METHODS, "auto"), help=f"auto: {AUTO}; default: tome if --r or --r_evals is given"
    )
    text = "tokens per block: 16, ratio 0.35, list 16,0,8, '(16,-1)', or the json file of a searched schedule"
    group.add_argument("--r", metavar="R", help=text)
    group.add_argument("--activate_layer", type=block_list, metavar="1,2,11", help="blocks that merge")
    for name, knob in all_knobs().items():
        users = methods_with(name)
        text = knob.help if len(users) == len(METHODS) else f"{', '.join(users)}: {knob.help}"
        text = f"{text} ({knob.note})" if knob.note else text
        if knob.kind is bool:
            add_boolean(group, name, None, text)
        elif knob.kind is str:
            group.add_argument(f"--{name}", choices=knob.choices, help=text)
        else:
            high = math.inf if knob.high is None else knob.high
            low = -math.inf if knob.low is None else knob.low
            high = min(high, 10**9) if knob.kind is int else high
            group.add_argument(f"--{name}", type=Number(knob.kind, low, high), help=text)


def _budget_flags(parser: Parser) -> None:
    group = parser.add_argument_group("a schedule for a budget, searched on unlabelled images (in place of --r)")
    text = "multiply-adds per image in 1e9, or per cent of the dense model's: 0.70, 55%%"
    group.add_argument("--gmacs", type=gmacs_budget, metavar="G", help=text)
    text = "times faster than timm's dense model at --batch_size on this machine: 1.8"
    group.add_argument("--speedup", type=positive_float, metavar="X", help=text)
    text = "folder or tree of images to search on (default: the training split, else the evaluated images)"
    group.add_argument("--calibration_path", type=nonempty, metavar="DIR", help=text)
    group.add_argument("--calibration_images", type=positive_int, metavar="N", help="of them, at random (default: 256)")


def _augmentation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation and regularisation (as in DeiT)")
    group.add_argument("--color_jitter", type=non_negative, default=0.3)
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's AutoAugment, or none")
    group.add_argument("--train_interpolation", default="bicubic", choices=("bicubic", "bilinear", "random"))
    add_boolean(group, "three_augment", False, "DeiT-III's 3-Augment", "--ThreeAugment")
    add_boolean(group, "src", False, "simple random crop, with --three_augment")
    text = "three copies of a third of the images in an epoch; three epochs see all (default: from 10,000 images on)"
    add_boolean(group, "repeated_aug", None, text)
    group.add_argument("--hflip", type=unit_interval, default=0.5)
    group.add_argument("--reprob", type=unit_interval, default=0.25, help="random erasing")
    group.add_argument("--remode", default="pixel", choices=("pixel", "const", "rand"))
    group.add_argument("--recount", type=positive_int, default=1)
    group.add_argument("--mixup", type=non_negative, default=0.8)
    group.add_argument("--cutmix", type=non_negative, default=1.0)
    group.add_argument("--cutmix_minmax", type=unit_interval, nargs=2)
    group.add_argument("--mixup_prob", type=unit_interval, default=1.0)
    group.add_argument("--mixup_switch_prob", type=unit_interval, default=0.5)
    group.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"))
    group.add_argument("--smoothing", type=unit_interval_below_one, default=0.1, help="of labels")
    group.add_argument("--drop", type=unit_interval_below_one, default=0.0, help="dropout")
    group.add_argument("--drop_path", type=unit_interval_below_one, default=0.1, help="stochastic depth")


def _objective_flags(parser: Parser) -> None:
    group = parser.add_argument_group("objective")
    text = "bring the merged model back to its own unmerged weights, as the teacher: no labels, few updates"
    add_boolean(group, "recover", False, text)
    group.add_argument("--distillation_type", default="none", choices=("none", "soft", "hard"))
    group.add_argument("--teacher_model", default="regnety_160.deit_in1k", metavar="NAME", help="any timm model")
    group.add_argument("--teacher_path", type=nonempty, metavar="FILE|URL")
    group.add_argument("--distillation_alpha", type=unit_interval, default=0.5)
    group.add_argument("--distillation_tau", type=positive_float, default=1.0)
    group.add_argument("--merged_weight", type=non_negative, default=1.0, help="of the loss of the merged pass")
    group.add_argument("--full_weight", type=non_negative, default=0.0, help="> 0 adds a pass at a random r'")
    group.add_argument("--full_r_max", type=finite_number, default=8, help="r' in [0, this); below 1 a ratio")
    group.add_argument("--consistency_weight", type=non_negative, default=0.0)
    group.add_argument("--consistency_threshold", type=unit_interval_below_one, default=0.4, help="0: all images")
    group.add_argument("--r_warmup_epochs", type=non_negative_int, default=0, help="epochs over which r grows from 0")
    add_boolean(group, "bce_loss", False, "binary cross entropy (DeiT-III)")


def _optimizer_flags(parser: Parser) -> None:
    group = parser.add_argument_group("optimisation (DeiT's names and defaults)")
    group.add_argument("--epochs", type=positive_int, default=300)
    group.add_argument("--opt", default="adamw", metavar="NAME", help="timm's optimizers")
    group.add_argument("--opt_eps", type=positive_float, default=1e-8)
    group.add_argument("--opt_betas", type=unit_interval_below_one, nargs="+", metavar="BETA")
    group.add_argument("--momentum", type=unit_interval_below_one, default=0.9)
    group.add_argument("--weight_decay", type=non_negative, default=0.05)
    group.add_argument("--clip_grad", type=positive_float, metavar="NORM")
    group.add_argument("--sched", default="cosine", metavar="NAME", help="timm's schedulers")
    group.add_argument("--lr", type=non_negative, default=5e-4, help="times global batch / 512")
    add_boolean(group, "unscale_lr", False, "do not scale lr by the global batch")
    group.add_argument("--lr_times", type=positive_float, default=1.0, help="factor on lr")
    group.add_argument("--min_lr_times", type=non_negative, default=1.0, help="factor on min_lr and warmup_lr")
    group.add_argument("--warmup_lr", type=non_negative, default=1e-6)
    group.add_argument("--min_lr", type=non_negative, default=1e-5)
    text = "may be a fraction (default: 5, of short runs a fifth of --epochs)"
    group.add_argument("--warmup_epochs", type=non_negative, help=text)
    group.add_argument("--cooldown_epochs", type=non_negative_int, default=0, help="epochs at min_lr after --epochs")
    group.add_argument("--decay_epochs", type=positive_float, default=30.0)
    group.add_argument("--decay_rate", type=positive_float, default=0.1)
    group.add_argument("--patience_epochs", type=positive_int, default=10)
    group.add_argument("--accumulation_steps", type=positive_int, default=1, help="micro-steps per update")
    group.add_argument("--amp", choices=("bf16", "fp16", "none"), help="default: bf16 on a GPU, none on a CPU")
    add_boolean(group, "compile", False, "torch.compile")
    add_boolean(group, "grad_checkpointing", False, "recompute blocks in the backward")
    text = "spread weights, gradients and optimizer over the processes, for models too large for one GPU (FSDP2)"
    add_boolean(group, "fsdp", False, text)
    group.add_argument("--sam_rho", type=non_negative, default=0.0, help="sharpness-aware minimisation, 0: off")
    add_boolean(group, "sam_adaptive", False, "ASAM")
    group.add_argument("--register_lr_mult", type=positive_float, default=1.0)
    text = "factor on the rate from a block to the one before it (default: 1, one rate for all; usual: 0.65 to 0.8)"
    group.add_argument("--layer_decay", type=Number(float, 0, 1, low_excluded=True), default=1.0, help=text)
    text = f"all, or some of {', '.join(PARTS)} with commas between them (default: all; with --lora all four but norms)"
    group.add_argument("--train_only", type=trainable_parts, default="all", metavar="PARTS", help=text)
    text = "train adapters of this rank in place of the blocks' weights (LoRA, arXiv 2106.09685)"
    group.add_argument("--lora", type=Number(int, 1, 4096), metavar="R", help=text)
    group.add_argument("--lora_alpha", type=positive_float, help="adapters count alpha / R (default: R)")
    group.add_argument("--lora_dropout", type=unit_interval_below_one, default=0.0, help="in front of the adapters")
    text = f"parts of a block that get adapters, some of {','.join(TARGETS)} (default: all of them)"
    group.add_argument("--lora_targets", type=adapted_parts, metavar="PARTS", help=text)
    add_boolean(group, "model_ema", True, "average the weights; evaluated beside the raw ones")
    group.add_argument("--model_ema_decay", type=unit_interval, default=0.99996)
    add_boolean(group, "model_ema_warmup", True, "begin with a short average: about the last tenth of the run so far")
    text = "of a new head on pretrained weights: a linear probe, or random (default: probe for small training sets)"
    group.add_argument("--head_init", choices=("probe", "random"), help=text)
    group.add_argument(
        "--max_nonfinite", type=non_negative_int, default=10, help="non-finite steps that are skipped before a stop"
    )


def _evaluation_flags(parser: Parser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval", action="store_true", help="evaluate only")
    group.add_argument("--r_evals", nargs="+", metavar="R", help="with --eval: several schedules in one pass")
    group.add_argument("--throughput", action="store_true", help="with --eval: images/s against timm's dense model")
    group.add_argument("--agreement", action="store_true", help="with --eval: compare with r=0 of the same weights")
    group.add_argument("--dist_eval", action="store_true", help="accepted for DeiT; evaluation is always distributed")


def _run_flags(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="", metavar="DIR")
    group.add_argument(
        "--resume", type=nonempty, metavar="FILE|auto", help="go on from a checkpoint; auto: the newest in --output_dir"
    )
    add_boolean(group, "resume_anyway", False, "go on inside an epoch with another global batch, at the same image")
    add_boolean(group, "overwrite", False, "start anew where --output_dir holds a run, which the first save replaces")
    group.add_argument("--save_every", type=positive_int, default=1, metavar="EPOCHS")
    group.add_argument(
        "--save_every_steps", type=non_negative_int, default=0, metavar="UPDATES", help="0: at epoch ends only"
    )
    text = "updates between two lines (default: 10, in short epochs fewer)"
    group.add_argument("--log_every", type=positive_int, metavar="UPDATES", help=text)
    group.add_argument(
        "--log_images",
        type=non_negative_int,
        default=0,
        metavar="EPOCHS",
        help="norms, attention, merged tokens to tensorboard",
    )
    group.add_argument(
        "--max_bad_images", type=non_negative_int, help="unreadable images a run survives (0.1 %%, at least 10)"
    )


FLAG_GROUPS: dict[str, Callable[[Parser], None]] = {
    "general": _general_flags,
    "data": _data_flags,
    "model": _model_flags,
    "merging": _merging_flags,
    "budget": _budget_flags,
    "augmentation": _augmentation_flags,
    "objective": _objective_flags,
    "optimisation": _optimizer_flags,
    "evaluation": _evaluation_flags,
    "run": _run_flags,
}
INFERENCE_GROUPS = ("general", "data", "model", "merging")  # what a model and its images are made from, without a run


def build_parser() -> Parser:
    """Build the parser of every flag, in groups; flags are spelled with underscores here, hyphens work too."""
    parser = Parser(
        prog="main.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Booleans are --flag / --no_flag; --config FILE.yaml sets defaults that flags override.",
    )
    for add_flags in FLAG_GROUPS.values():
        add_flags(parser)
    return parser


def flags_of(*groups: str) -> frozenset[str]:
    """Return the names of the flags of some of the groups in `FLAG_GROUPS`."""
    parser = Parser()
    for group in groups:
        FLAG_GROUPS[group](parser)
    return frozenset(parser.defaults())


# From argv to args


def parse_args(argv: Sequence[str]) -> Namespace:
    """Parse and check a command line of main.py.

    Raises:
        UserError: anything that argparse or the rules between flags refuse.
    """
    named = named_flags(argv)
    if named != list(argv):
        log("as named flags: main.py " + " ".join(named))
    parser = build_parser()
    defaults, given = parser.defaults(), _given(parser, named)
    recipe = RECIPES.get(given.get("dataset", defaults["dataset"]), {}) | (RECOVERY if given.get("recover") else {})
    args = Namespace(**(defaults | recipe | given), given=sorted(given))
    if args.eval:
        _check_idle(parser.given(named))
    args.merge = AUTO if args.merge == "auto" else args.merge
    read_schedule_flag(args)
    if "warmup_epochs" not in given:
        args.warmup_epochs = min(recipe.get("warmup_epochs", WARMUP_EPOCHS), args.epochs / 5)
    if args.lora and "train_only" not in given:
        args.train_only = LORA_TRAINS
    check_rules(args)
    return args


def _check_idle(given: dict[str, Any]) -> None:
    """Refuse flags of training on the command line of an evaluation; a --config file may serve both."""
    training = flags_of("augmentation", "objective", "optimisation") - {"amp", "compile"}
    training |= {"save_every", "save_every_steps", "log_images"}
    idle = sorted(name for name in given if name in training)
    if idle:
        raise UserError(f"--{idle[0]} has no effect with --eval; leave it out")


def check_heeded(argv: Sequence[str], heeded: frozenset[str], what: str) -> None:
    """Refuse flags of main.py that a command does not heed.

    Args:
        heeded: names of those that it does.
        what: the command, for people: "an analysis".
    """
    idle = given_flags(argv) - heeded - {"eval", "config"}
    if idle:
        raise UserError(f"--{min(idle)} has no effect on {what}; leave it out")


def given_flags(argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the flags that a command line of main.py, or its --config file, sets."""
    return frozenset(_given(build_parser(), named_flags(argv)))


def _given(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """Return the values that the command line sets, and those of its --config file where the command line is silent."""
    given = parser.given(argv)
    return (read_config(given["config"], parser) if given.get("config") else {}) | given


def read_config(path: str, parser: Parser) -> dict[str, Any]:
    """Return the values of a yaml file; they pass the same checks as those of a command line.

    Raises:
        UserError: the file cannot be read, or holds a key or value that no flag takes.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        found = "is empty" if not content else f"holds a {type(content).__name__}"
        raise UserError(f"--config {path} {found}; write lines such as 'batch_size: 128' into it")
    spellings = parser.spellings()
    actions = {action.dest: action for action in spellings.values() if action.dest not in ("config", "help")}
    tokens: list[str] = []
    values: set[str] = set()
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if f"--{name}" in spellings and name not in actions:  # no_flag: true, or another spelling of a flag
            action = spellings[f"--{name}"]
            if name.startswith("no_") and action.nargs == 0:
                if not isinstance(value, bool):
                    raise UserError(f"--config {path}: {name} takes true or false")
                value = not value
            name = action.dest
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UserError(f"--config {path}: unknown key '{name}'; {hint}see main.py --help")
        if name in values:
            raise UserError(f"--config {path}: {name} is set twice")
        values.add(name)
        boolean = actions[name].nargs == 0
        if isinstance(value, bool) != boolean and value is not None:
            expected = "true or false" if boolean else "a value, not true or false"
            raise UserError(f"--config {path}: {name} takes {expected}")
        if value is None or (value is False and f"--no_{name}" not in spellings):
            continue  # the default; --eval and its like, which have no negative form, are off anyway
        tokens += _config_tokens(name, value, several=actions[name].nargs is not None)
    return parser.given(tokens)


def _config_tokens(name: str, value: Any, several: bool) -> list[str]:
    """Write a line of the file as on a command line; a list is joined by commas where the flag takes one value."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    if isinstance(value, list) and several:
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}"]


def read_schedule_flag(args: Namespace) -> None:
    """Put the schedule of a file that --r names into --r, and its method and settings where no flag says otherwise.

    `args.schedule` keeps what the file says of the model that it was made for; None: --r is no file.

    Raises:
        UserError: it is no schedule file, or one of another method than --merge.
    """
    args.schedule = None
    if args.r is None or not is_schedule_file(args.r):
        return
    path, record = args.r, read_schedule(args.r)
    merge = record["merge"]
    if args.merge not in (None, merge["method"]):
        raise UserError(f"--r {path} was searched for {merge['method']}, not for --merge {args.merge}; leave one out")
    args.merge, args.r = merge["method"], format_schedule(parse_schedule(record["r"]))
    if args.activate_layer is None and merge["activate_layers"] is not None:
        args.activate_layer = tuple(merge["activate_layers"])
    for name in METHODS[args.merge].knobs():
        if getattr(args, name) is None:
            setattr(args, name, merge[name])
    args.schedule = {"path": path, **{key: record[key] for key in ("depth", "patches", "model")}}


def has_budget(args: Namespace) -> bool:
    """True where a schedule is to be searched."""
    return args.gmacs is not None or args.speedup is not None


def merge_config(args: Namespace, stored: dict[str, Any] | None = None) -> MergeConfig:
    """Return the merging that the command line asks for, or a checkpoint's where it asks for nothing.

    Args:
        stored: `MergeConfig.as_dict()` of a checkpoint.
    """
    settings = {name: getattr(args, name) for name in all_knobs() if getattr(args, name) is not None}
    if args.activate_layer is not None:
        settings["activate_layers"] = args.activate_layer
    asks = args.merge is not None or args.r is not None or bool(settings)
    if stored is not None and not asks and not has_budget(args) and not (stored["method"] == "none" and args.r_evals):
        return MergeConfig.from_dict(stored)
    evaluated = [r for r in args.r_evals or () if parse_schedule(r) != 0]
    method = args.merge or ("tome" if args.r is not None or evaluated or has_budget(args) else "none")
    if method != "none" and args.r is None and not args.r_evals and not has_budget(args):
        raise UserError(f"--merge {method} merges nothing without an amount; give --r 16 or --gmacs 60%, for example")
    r = args.r if args.r is not None else evaluated[0] if evaluated and method != "none" else 0
    return MergeConfig(method=method, r=r, **settings)


# Rules between flags


def check_rules(args: Namespace) -> None:
    """Refuse options that contradict each other or do nothing, as far as they alone tell, before anything is built.

    What depends on weights or data is refused where these are built: a schedule that does not fit the model by the
    model, --r_warmup_epochs and --full_weight without merging by `losses.build_objective`, --train_only and
    --register_lr_mult without registers by `models.parameters`, class counts by `build_model` and `build_teacher`.
    """
    if args.dataset not in DATASETS:
        raise UserError(nearest(args.dataset, DATASETS, "--dataset"))
    if args.data_path and not DATASETS[args.dataset].files:
        raise UserError(f"--data_path has no effect with --dataset {args.dataset}, which needs no files; leave one out")
    if args.val_path and not (args.data_path and DATASETS[args.dataset].lists):
        lists = ", ".join(name for name, info in DATASETS.items() if info.lists)
        raise UserError(f"--val_path goes with --data_path and a data set that reads lists ({lists}); leave it out")
    _check_budget(args)
    merge_config(args)  # settings that the method does not have, an r in none of its forms, a method without r
    if args.eval_crop_ratio == 0:
        raise UserError(f"--eval_crop_ratio must lie in (0, 1], it is {args.eval_crop_ratio}")
    if args.log_images and (args.eval or not args.output_dir):
        raise UserError("--log_images writes tensorboard events in training: it needs --output_dir and no --eval")
    if args.sam_adaptive and not args.sam_rho:
        raise UserError("--sam_adaptive has no effect without --sam_rho; give --sam_rho 2.0")
    if args.use_ema and not (args.finetune or args.resume):
        raise UserError("--use_ema chooses among the weights of a checkpoint; it needs --resume or --finetune")
    if args.use_ema and args.resume and not args.eval:
        raise UserError("--use_ema has no effect on a resumed training, which goes on with both; leave it out")
    _check_r_evals(args)
    if args.save_every_steps and not args.output_dir:
        raise UserError("--save_every_steps needs --output_dir to save into")
    if args.resume_anyway and (args.eval or not args.resume):
        raise UserError("--resume_anyway is about how --resume goes on when training; leave it out")
    if args.overwrite and (args.eval or not args.output_dir):
        raise UserError("--overwrite is about the run in --output_dir when training; leave it out")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto looks into --output_dir, which is not given; add it")
    if args.opt_betas and args.opt.startswith(("adam", "lamb", "nadam", "radam")) and len(args.opt_betas) != 2:
        raise UserError(f"--opt_betas needs two numbers for {args.opt}, not {len(args.opt_betas)}")
    if args.eval and args.dataset == "IMAGES":
        raise UserError("--dataset IMAGES has no labels to score; evaluate on a data set with classes")
    if not args.eval:
        _check_evaluation_flags(args)
        _check_augmentation(args)
        _check_objective(args)
        _check_recovery(args)
        _check_distillation(args)
        _check_optimizer_names(args)
        _check_trained_parts(args)
        _check_fsdp(args)


def _check_budget(args: Namespace) -> None:
    """Refuse two ways to say how much to merge, and flags of a search without one."""
    budgets = [flag for flag in ("gmacs", "speedup") if getattr(args, flag) is not None]
    others = [flag for flag in ("r", "r_evals") if getattr(args, flag) is not None]
    if args.speedup is not None and args.speedup <= 1:
        raise UserError(f"--speedup {args.speedup:g} is no speed-up; give more than 1, which is timm's dense model")
    if len(budgets) == 2:
        raise UserError("--gmacs and --speedup are two budgets; give one of them")
    if budgets and others:
        raise UserError(f"--{budgets[0]} searches a schedule, which --{others[0]} gives; leave one of them out")
    if budgets and args.merge == "none":
        raise UserError(f"--{budgets[0]} needs a method that merges; leave --merge none out")
    for flag in () if budgets else ("calibration_path", "calibration_images"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} is for the search of a schedule; add --gmacs or --speedup, or leave it out")


def _check_r_evals(args: Namespace) -> None:
    """Refuse a schedule that is named twice: 8 and 8.0 are one row."""
    seen: list[Any] = []
    for text in args.r_evals or ():
        schedule = parse_schedule(text)
        if schedule in seen:
            raise UserError(f"--r_evals names {format_schedule(schedule)} twice; leave one of them out")
        seen.append(schedule)


def _check_evaluation_flags(args: Namespace) -> None:
    for flag in ("throughput", "agreement", "r_evals"):
        if getattr(args, flag):
            raise UserError(f"--{flag} has no effect without --eval; add it or leave --{flag} out")


def _check_augmentation(args: Namespace) -> None:
    if args.three_augment:
        for flag in ("aa", "reprob", "remode", "recount"):
            if flag in args.given:
                raise UserError(f"--{flag} has no effect with --three_augment, which has its own; leave one out")
    if args.cutmix_minmax and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        low, high = args.cutmix_minmax
        raise UserError(f"--cutmix_minmax takes the smaller ratio first, and they must differ, not {low:g} {high:g}")
    if args.src and not args.three_augment:
        raise UserError("--src does nothing without --three_augment; give both or neither")
    if mixes_images(args) and args.batch_size % 2:  # timm mixes an image with its mirror position in the batch
        raise UserError(f"mixup and cutmix need an even --batch_size, not {args.batch_size}; or --mixup 0 --cutmix 0")
    if args.bce_loss and args.smoothing:
        raise UserError("--bce_loss trains on hard 0/1 targets, which smoothing contradicts; add --smoothing 0")


def _check_objective(args: Namespace) -> None:
    if args.merged_weight == args.full_weight == 0:
        raise UserError("--merged_weight and --full_weight are both 0: there is nothing to train; set one of them")
    if args.consistency_weight and not args.full_weight:
        raise UserError("--consistency_weight has no effect without the full pass; add --full_weight 1")
    if args.r_warmup_epochs >= args.epochs and args.r_warmup_epochs:
        raise UserError(
            f"--r_warmup_epochs {args.r_warmup_epochs} reaches r only after the last of {args.epochs} epochs; "
            f"give fewer than {args.epochs}"
        )
    if not args.full_r_max > 0 or (args.full_r_max >= 1 and args.full_r_max != int(args.full_r_max)):
        raise UserError(f"--full_r_max must be an integer >= 1 or a ratio between 0 and 1, not {args.full_r_max}")


def _check_recovery(args: Namespace) -> None:
    """Refuse what does not go with a teacher that is the unmerged model itself, and unlabelled images without it."""
    if not args.recover:
        if args.dataset == "IMAGES":
            raise UserError("--dataset IMAGES has no labels to learn from or to score; it goes with --recover")
        return
    for flag in ("distillation_type", "distillation_alpha", "teacher_model", "teacher_path"):
        if flag in args.given:
            raise UserError(f"--recover distils softly from the model's own unmerged weights; leave --{flag} out")
    for flag in RECOVERED_PLAINLY:
        if flag in args.given:
            raise UserError(f"--{flag} has no effect with --recover, whose images are shifted and flipped alone")


def _check_distillation(args: Namespace) -> None:
    if args.distillation_type == "none":
        if args.teacher_path:
            raise UserError("--teacher_path has no effect without distillation; add --distillation_type hard or soft")
        return
    if not args.merged_weight:
        raise UserError("--distillation_type acts on the merged pass; it needs --merged_weight above 0")
    if args.teacher_model not in NAMES and not timm.is_model(args.teacher_model):
        near = difflib.get_close_matches(args.teacher_model, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"unknown teacher model {args.teacher_model!r}{hint}")


def _check_optimizer_names(args: Namespace) -> None:
    names = [name for name in list_optimizers() if not get_optimizer_info(name).second_order]
    name = args.opt.lower().removeprefix("lookahead_")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "such as adamw, lamb, sgd and lion"
        raise UserError(f"unknown --opt {args.opt!r} among timm's {len(names)} optimizers; {hint}")
    info = get_optimizer_info(name)
    if args.opt_betas and not info.has_betas:
        raise UserError(f"--opt_betas has no effect on {args.opt}, which has none; leave it out")
    if "momentum" in args.given and not info.has_momentum:
        raise UserError(f"--momentum has no effect on {args.opt}, which has none; leave it out")
    if args.sched not in SCHEDULES:
        raise UserError(nearest(args.sched, SCHEDULES, "--sched"))


def _check_trained_parts(args: Namespace) -> None:
    """Refuse adapters that do not train, and rates of what does not train."""
    parts = parse_train_only(args.train_only)
    for flag in ("lora_alpha", "lora_dropout", "lora_targets"):
        if flag in args.given and not args.lora:
            raise UserError(f"--{flag} has no effect without --lora; give --lora 8, for example")
    if args.lora and "lora" not in parts:
        trains = "the very weights that the adapters spare" if not parts else "no adapters"
        raise UserError(f"--train_only {args.train_only} trains {trains}; name lora in it, or leave one of both out")
    if "lora" in parts and not args.lora:
        raise UserError(f"--train_only {args.train_only} trains adapters; give their rank too: --lora 8, for example")
    if args.register_lr_mult != 1 and parts and "registers" not in parts:
        raise UserError(f"--register_lr_mult has no effect with --train_only {args.train_only}; leave one of both out")
    if args.layer_decay != 1 and parts == ("head",):
        raise UserError("--layer_decay has no effect on a head alone; leave it or --train_only head out")


def _check_fsdp(args: Namespace) -> None:
    """Refuse what is not built for weights that are spread over the processes."""
    if not args.fsdp:
        return
    for flag, given, instead in (
        ("sam_rho", args.sam_rho, "leave one of both out"),
        ("compile", args.compile, "leave one of both out"),
        ("amp fp16", args.amp == "fp16", "give --amp bf16"),
        ("gmacs", args.gmacs, "search first, with run/search.py, and give --r FILE"),
        ("speedup", args.speedup, "search first, with run/search.py, and give --r FILE"),
        ("log_images", args.log_images, "draw them from a checkpoint with run/visualize.py"),
    ):
        if given:
            raise UserError(f"--{flag} does not go with --fsdp; {instead}")
    if args.opt.lower() not in OPTIMIZERS_OF_SLICES:
        known = ", ".join(OPTIMIZERS_OF_SLICES)
        raise UserError(f"--opt {args.opt} does not go with --fsdp; these step on slices as on whole weights: {known}")


# MCTF's old flags

# what MCTF's main.py does where its README's command lines say nothing: no mixing, no warm-up, ten epochs of cooldown
_MCTF_RECIPE = ("--mixup", "0", "--cutmix", "0", "--warmup_epochs", "0", "--cooldown_epochs", "10")


def named_flags(argv: Sequence[str]) -> list[str]:
    """Translate MCTF's command lines to named flags; any other command line comes back as it is.

    mctf_type = r, full_r_max, trace (no effect), prop_attn, one_step_ahead, tau_sim, tau_info, tau_size, bidirectional,
    pooling, unused; task_type = merged on/off, full on/off, consistency threshold (0: off), unused; task_weight =
    merged_weight, full_weight, consistency_weight. Where MCTF's defaults differ from DeiT's, they are put in front.
    """
    old = Parser(add_help=False, allow_abbrev=False)
    for flag in ("--use_mctf", "--mctf_type", "--task_type", "--task_weight"):
        old.add_argument(flag)
    mctf, others = old.parse_known_args([normalise_flag(token) for token in argv])
    if mctf.use_mctf is None and mctf.mctf_type is None and mctf.task_type is None:
        return list(argv)
    on = (mctf.use_mctf or "True") not in ("False", "false", "0")
    methods = [value for flag, value in itertools.pairwise(others) if flag == "--merge"]
    methods += [token.partition("=")[2] for token in others if token.startswith("--merge=")]
    if on and any(method != "mctf" for method in methods):
        raise UserError(f"--merge {methods[-1]} contradicts MCTF's own flags (--use_mctf); leave one of them out")
    task = _number_list("task_type", mctf.task_type or "[1,0,0]", 3, 4)
    weights = _number_list("task_weight", mctf.task_weight or "[1,1,1]", 3, 3)
    training = "--eval" not in others  # the losses of task_type have no effect in an evaluation
    named = list(_MCTF_RECIPE) if training else []
    named += _task_flags(task, weights) if training and (mctf.task_type or mctf.task_weight) else []
    if on:
        values = _number_list("mctf_type", mctf.mctf_type or "", 10, 11)
        named += _method_flags(values, pairing=training and bool(task[1]))
    return [*named, *_unpack_r_evals(others)]


def _number_list(flag: str, text: str, least: int, most: int) -> list[int | float]:
    """Parse a list such as [16,8,0.4]."""
    try:
        values = [finite_number(item) for item in text.strip().strip("[]()").split(",") if item.strip()]
    except ArgumentTypeError:
        values = []
    if not least <= len(values) <= most:
        raise UserError(f"--{flag} must be a list of {least} to {most} numbers such as [16,8,...], not {text!r}")
    return values


def _task_flags(task: list[int | float], weight: list[int | float]) -> list[str]:
    merged, full, threshold = task[:3]
    if not merged and not full:
        raise UserError("--task_type trains nothing: its first two numbers, the merged and the full pass, are both 0")
    flags = ["--merged_weight", str(weight[0] if merged else 0), "--full_weight", str(weight[1] if full else 0)]
    if full and threshold:
        flags += ["--consistency_weight", str(weight[2]), "--consistency_threshold", str(threshold)]
    return flags


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
    """Rewrite --r_evals [8,16] as --r_evals 8 16."""
    unpacked: list[str] = []
    for before, token in zip(["", *tokens], tokens, strict=False):
        is_list = before == "--r_evals" and token.startswith("[")
        unpacked += [item for item in token.strip("[]").split(",") if item.strip()] if is_list else [token]
    return unpacked


# Ending


def exit_status(program: str, run: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run one command line and turn every way it may end into an exit status; all commands end here.

    Args:
        program: name in front of the error line.
        run: does the work; its return value is the exit status, None is 0.
        argv: None is the command line of this process.

    Returns:
        The status of `run`; 2 after the user's mistake and 1 after a run that cannot go on, each told in one line on
        stderr; 130 after Ctrl-C.
    """
    interrupts.imported()
    try:
        return run(sys.argv[1:] if argv is None else list(argv)) or 0
    except UserError as error:
        return _report(program, error, 2)
    except RunError as error:
        return _report(program, error, 1)
    except KeyboardInterrupt:
        return _report(program, "interrupted", INTERRUPTED_STATUS)
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)
    finally:
        close_distributed()


def _report(program: str, error: object, status: int) -> int:
    where = "error" if is_main_process() else "error on another rank"
    print(without_credentials(f"{program}: {where}: {' '.join(str(error).split())}"), file=sys.stderr, flush=True)
    return status
