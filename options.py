"""The command line of main.py: every flag, the yaml file, MCTF's old flags, and the rules between flags."""

import argparse
import difflib
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from datasets import (
    RECIPES,
    SOURCES,
)
from distributed import close_distributed
from models import UserError
from models.methods import METHODS, POOLINGS, all_knobs, methods_with
from models.methods.mctf import ONE_STEP_AHEAD
from models.parameters import TRAIN_ONLY
from utils import INTERRUPTED_STATUS, RunError, is_main_process, log, nearest


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
    """The schedule, and every setting of every method: those of `models/methods` become flags of their names."""
    group = parser.add_argument_group("merging (settings default to the method's published values)")
    group.add_argument("--merge", choices=tuple(METHODS), help="default: tome if --r or --r_evals is given")
    group.add_argument("--r", metavar="R", help="tokens per block: 16, ratio 0.35, list 16,0,8 or '(16,-1)'")
    group.add_argument("--r_evals", nargs="+", metavar="R", help="with --eval: several schedules in one pass")
    group.add_argument("--activate_layer", type=_layer_list, metavar="1,2,11", help="blocks that merge")
    group.add_argument("--r_warmup_epochs", type=count, default=0, help="epochs over which r grows from 0")
    for name, knob in all_knobs().items():
        users = methods_with(name)
        text = knob.help if len(users) == len(METHODS) else f"{', '.join(users)}: {knob.help}"
        text = f"{text} ({knob.note})" if knob.note else text
        if knob.kind is bool:
            _boolean(group, name, None, text)
        elif knob.kind is str:
            group.add_argument(f"--{name}", choices=knob.choices, help=text)
        else:
            high = math.inf if knob.high is None else knob.high
            low = -math.inf if knob.low is None else knob.low
            high = min(high, 10**9) if knob.kind is int else high
            group.add_argument(f"--{name}", type=_bounded(knob.kind, low, high), help=text)


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


def exit_status(program: str, run: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run one command line and turn every way it may end into an exit status; all commands end here.

    Returns:
        What `run` returns (None: 0); 2 after the user's mistake and 1 after a run that cannot go on, each told in one
        line on stderr; 130 after Ctrl-C.
    """
    try:
        return run(sys.argv[1:] if argv is None else list(argv)) or 0
    except UserError as error:
        return _tell(program, error, 2)
    except RunError as error:
        return _tell(program, error, 1)
    except KeyboardInterrupt:
        return _tell(program, "interrupted", INTERRUPTED_STATUS)
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)
    finally:
        close_distributed()


def _tell(program: str, error: object, status: int) -> int:
    whose = "error" if is_main_process() else "error on another rank"
    print(f"{program}: {whose}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status
