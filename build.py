"""Build what the options ask for: weights, preprocessing, the model, the teacher, and a model for scripts."""

import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from budget import check_fits
from calibration import Result, apply_budget
from checkpoint import load_checkpoint, load_resume
from datasets import WHOLE_PIXELS, Data, DataConfig, build_data, with_classes, with_own_preprocessing
from distributed import Distributed, broadcast_object
from engine import Precision, build_precision
from losses import check_merging
from memory import check_memory
from models import MergeConfig, MergingViT, UserError, create_model
from models.adapters import TARGETS, LoraSettings, add_lora
from models.errors import NoWeightsError
from models.gmacs import gmacs
from models.methods import all_knobs
from models.parameters import freeze
from models.registry import NAMES, OWN_SIZES, check_name, data_settings, quick_when_offline, timm_name
from models.schedule import Inflection, Schedule, format_schedule, parse_schedule
from models.weights import HEADS, extract_state_dict, load_weights, unwrap_state_dict
from options import has_budget, merge_config
from sources import differing_classes, readable_names
from utils import log, seed_all, to_jsonable, without_credentials


class Weights:
    """Where weights come from: --resume wins over --finetune, which wins over published ones.

    Attributes:
        resumed: state and path of the checkpoint of --resume; None without one.
        path, state: file or URL and content that the model's weights are taken from; None: published or random weights.
        stored: arguments of the run that wrote the checkpoint, if it is one of ours.
        data: preprocessing and classes of that run (`data_record`); None: unknown, also in our older checkpoints.
        name: model of the command line, else of the checkpoint, else of the data set's recipe, else deit_small.
        pretrained: whether published weights are taken.
        goes_on: whether a training goes on from them, with the adapters apart that other uses have in the weights.
    """

    def __init__(self, args: Namespace, name: str | None) -> None:
        self.resumed = load_resume(args.resume, args.output_dir, args.fsdp)
        if args.resume == "auto" and args.eval and self.resumed is None:
            raise UserError(f"--resume auto finds no checkpoint in {args.output_dir}; name a file")
        self.goes_on = self.resumed is not None and not args.eval
        self.path = self.resumed[1] if self.resumed else args.finetune
        read = self.resumed is None and args.finetune is not None
        self.state = load_checkpoint(args.finetune, args.fsdp) if read else self.resumed and self.resumed[0]
        state = self.state or {}
        ours = isinstance(state.get("args"), dict) and isinstance(state.get("merge"), dict)
        self.stored: dict[str, Any] | None = state["args"] if ours else None
        self.data: dict[str, Any] | None = state.get("data") if ours else None
        from_recipe = name if "model" not in args.given else None
        asked = name if from_recipe is None else None
        self.name = asked or (self.stored or {}).get("model") or from_recipe or "deit_small"
        self.use_ema = args.use_ema
        if args.use_ema and state.get("model_ema") is None:
            held = "the average already" if state.get("weights") == "average" else "no averaged weights"
            raise UserError(f"{self.path} holds {held}; leave --use_ema out")
        default = self.state is None and self.name not in OWN_SIZES
        self.pretrained = default if args.pretrained is None else args.pretrained and self.state is None
        if args.pretrained and self.state is not None:
            log(f"--pretrained gives way to {self.path}")

    @property
    def merge(self) -> dict[str, Any] | None:
        """The merging stored with a checkpoint of ours."""
        return self.state["merge"] if self.stored is not None and self.state is not None else None

    def merging(self, args: Namespace) -> MergeConfig:
        """Return the merging that the command line asks for, or the checkpoint's where it asks for nothing.

        A schedule that --resume finds searched for the same budget is not searched again.

        Raises:
            UserError: a training is to go on with another budget than the checkpoint's.
        """
        config = merge_config(args, self.merge)
        if not has_budget(args) or self.resumed is None:
            return config
        stored = self.stored or {}
        same = all(stored.get(flag) == getattr(args, flag) for flag in ("gmacs", "speedup"))
        found = MergeConfig.from_dict(self.merge) if self.merge else config
        if same and found.with_r(0) == config:
            log(f"the schedule is that of {self.path}, which was searched for this budget")
            return found
        if not args.eval:
            flag = "gmacs" if args.gmacs else "speedup"
            raise UserError(
                f"{self.path} was not trained with this --{flag} and method; leave --{flag} out to go on as it was, or "
                f"start anew with --finetune {self.path}"
            )
        return config

    def tensors(self) -> dict[str, Tensor] | None:
        """Return the weights under timm's names; None: published or random ones."""
        if self.state is None:
            return None
        source, merge_adapters = str(self.path), not self.goes_on
        return extract_state_dict(self.state, ema=self.use_ema, source=source, merge_adapters=merge_adapters)[0]

    @property
    def source(self) -> str:
        """Where the weights come from, for people."""
        kind = (self.state or {}).get("weights")  # best.pth tells which of both it holds
        kind = "average" if self.use_ema else kind
        place = without_credentials(self.path or ("timm" if self.pretrained else "random"))
        return place + (f" ({kind} weights)" if kind else "")

    def check_same_model(self, model: MergingViT) -> None:
        """Refuse to resume a model of other parameters than the checkpoint's, which `build_model` would adapt.

        Raises:
            UserError: names what differs first; the optimizer's state belongs to those very parameters.
        """
        before, now = self.tensors() or {}, model.state_dict()
        shapes = [
            f"{name}: {tuple(before[name].shape) if name in before else 'absent'} in the checkpoint, "
            f"{tuple(now[name].shape) if name in now else 'absent'} now"
            for name in sorted(before.keys() | now.keys())
            if name not in before or name not in now or before[name].shape != now[name].shape
        ]
        if shapes:
            raise UserError(
                f"{self.path} cannot go on as another model ({shapes[0]}; {len(shapes)} in all): keep --model, "
                f"--num_registers, --input_size and the classes as they were, or start anew with --finetune {self.path}"
            )

    def check_same_adapters(self, settings: LoraSettings | None) -> None:
        """Refuse to go on with other adapters than the checkpoint's."""
        stored = (self.state or {}).get("lora")
        if self.goes_on and stored != (settings and settings.as_dict()):
            names = ("", "_alpha", "_targets")
            values = stored and (stored["rank"], f"{stored['alpha']:g}", ",".join(stored["targets"]))
            flags = " ".join(f"--lora{name} {value}" for name, value in zip(names, values or (), strict=False))
            raise UserError(
                f"{self.path} was trained {f'with {flags}' if flags else 'without --lora'}, and goes on in no other "
                f"way; give it so, or start anew with --finetune {self.path}"
            )


class BuiltModel(NamedTuple):
    """A model, and the names of those of its parameters that no weights were found for."""

    model: MergingViT
    fresh: tuple[str, ...]


def lora_settings(args: Namespace) -> LoraSettings | None:
    """Return the adapters that the command line asks for."""
    if not args.lora:
        return None
    return LoraSettings(args.lora, args.lora_alpha or args.lora, args.lora_targets or tuple(TARGETS), args.lora_dropout)


def build_model(args: Namespace, weights: Weights, num_classes: int | None, config: DataConfig) -> BuiltModel:
    """Build the model and load its weights; prints what was loaded.

    The weights of a resumed run are loaded here too, through the adapter that serves --finetune: it knows the names of
    DeiT, timm and MCTF, and names what does not fit. `Trainer` restores the rest of such a checkpoint.

    Args:
        num_classes: None is the model's own number.
    """
    tensors = weights.tensors()
    model = _new_model(args, weights, tensors, num_classes, config)
    adapters = lora_settings(args)
    weights.check_same_adapters(adapters)
    if adapters is not None and weights.goes_on:
        add_lora(model, adapters)
    fresh: tuple[str, ...] = ()
    if tensors is not None:
        strict = args.eval or weights.resumed is not None
        report = load_weights(
            model, tensors, num_classes_changed_ok=not strict, source=str(weights.path), name=weights.name
        )
        for line in report.lines():
            log(f"{weights.path}: {line}")
        fresh = report.fresh
    elif weights.pretrained and _published_classes(weights.name) not in (None, model.num_classes) and not args.eval:
        log(f"{weights.name}: published weights; the head is fresh, for {num_classes} classes")
        fresh = tuple(name for name in model.state_dict() if name.split(".")[0] in HEADS)
    if adapters is not None and not weights.goes_on:
        add_lora(model, adapters)
    return BuiltModel(model, fresh)


def build_hollow_model(
    args: Namespace, weights: Weights, num_classes: int | None, config: DataConfig, dist: Distributed
) -> BuiltModel:
    """Build the model with its weights on rank 0, and on the others on the meta device, which holds none.

    All ranks must call it; `sharding.shard` gives the others their part of the weights.
    """
    built, message = None, None
    fresh: tuple[str, ...] = ()
    if dist.is_main:
        try:
            built = build_model(args, weights, num_classes, config)
            fresh = built.fresh
        except UserError as error:
            message = str(error)
    fresh, message = broadcast_object((fresh, message))
    if message is not None:
        raise UserError(message)
    if built is not None:
        return built
    return BuiltModel(_hollow_model(args, weights, num_classes, config), fresh)


def _hollow_model(args: Namespace, weights: Weights, num_classes: int | None, config: DataConfig) -> MergingViT:
    """Build the model of a training on the meta device, where tensors have shapes and no values."""
    model = _new_model(args, weights, weights.tensors(), num_classes, config, hollow=True)
    if adapters := lora_settings(args):
        with torch.device("meta"):
            add_lora(model, adapters)
    freeze(model, trained_parts(args, model))
    return model


def trained_parts(args: Namespace, model: MergingViT) -> str:
    """Return --train_only; its default beside --lora names registers, which the model may not have."""
    named = args.train_only
    return named if "train_only" in args.given or model.reg_token is not None else named.replace("registers,", "")


def _new_model(
    args: Namespace,
    weights: Weights,
    tensors: Mapping[str, Tensor] | None,
    num_classes: int | None,
    config: DataConfig,
    hollow: bool = False,
) -> MergingViT:
    """Build the model with published weights or random ones; a hollow one, on the meta device, has shapes alone."""
    registers, register_layer = args.num_registers, args.register_layer
    if tensors is not None and registers is None and "reg_token" in tensors:
        registers = tensors["reg_token"].shape[1]
    if weights.stored is not None and register_layer is None and registers:
        register_layer = weights.stored.get("register_layer")
    device = torch.device("meta") if hollow else nullcontext()
    with warnings.catch_warnings(record=True) as caught, _ways_out_in_flags(), device:
        warnings.simplefilter("always", UserWarning)
        model = create_model(
            weights.name,
            num_registers=registers,
            merge=weights.merging(args),
            num_classes=num_classes,
            img_size=config.input_size,
            pretrained=weights.pretrained and not hollow,
            register_layer=register_layer or 0,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
        )
    for message in caught if not hollow else ():
        log(f"warning: {message.message}")
    if args.schedule is not None:
        check_fits(args.schedule, args.schedule["path"], model)
    _check_merges(model, args)
    return model


@contextmanager
def _ways_out_in_flags() -> Iterator[None]:
    """Turn the advice of a model without weights, which is for Python, into flags."""
    try:
        yield
    except NoWeightsError as error:
        advice = "give --finetune FILE (weights you have), or --no_pretrained to start from random weights"
        raise UserError(f"{error.problem}; {advice}") from error


def _published_classes(name: str) -> int | None:
    cfg = timm.get_pretrained_cfg(timm_name(name), allow_unregistered=True)
    return None if cfg is None else cfg.num_classes


def _asks(schedule: Schedule) -> bool:
    """Tell whether a schedule asks for any merging; one of zeros is another way to write r = 0."""
    if isinstance(schedule, Inflection):
        return schedule.r > 0
    return any(count > 0 for count in schedule) if isinstance(schedule, tuple) else schedule > 0


def _check_merges(model: MergingViT, args: Namespace) -> None:
    """Refuse an amount of merging of which no block takes any."""
    for r in args.r_evals or [model.merge.r]:
        if model.merge.method != "none" and _asks(parse_schedule(r)) and not any(model.plan(r).merges):
            raise UserError(
                f"r={format_schedule(parse_schedule(r))} merges nothing in the {len(model.blocks)} blocks of this "
                "model; check --dense_layers, --activate_layer and --r, or give --merge none"
            )


# Preprocessing and classes, which a checkpoint carries


def data_record(data: "Data | Inference") -> dict[str, Any]:
    """Return what it takes to use a model on new images, in plain values: `data` of a checkpoint.

    Its class names are those of the data set (folders), its class labels the same for people, both by number.
    """
    settings = asdict(data.config) | {"input_size": [data.config.input_size] * 2}
    return to_jsonable(settings | {"class_names": data.class_names or [], "class_labels": data.class_labels or []})


def stored_config(record: dict[str, Any], source: str) -> DataConfig:
    """Return the preprocessing of a `data_record`.

    Raises:
        UserError: the record is not one.
    """
    try:
        return DataConfig(
            input_size=int(record["input_size"][0]),
            mean=tuple(float(value) for value in record["mean"]),
            std=tuple(float(value) for value in record["std"]),
            interpolation=str(record["interpolation"]),
            crop_pct=float(record["crop_pct"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{source}: its record of the preprocessing is damaged ({reason})") from error


def build_config(args: Namespace, weights: Weights) -> DataConfig:
    """Return the preprocessing that weights were trained with, as flags change it.

    It is the checkpoint's where that holds one, else that of the model's published weights, with the mean and std of a
    data set that has its own. A flag that differs from the checkpoint's value wins, with a note.
    """
    check_name(weights.name)
    changes = {"input_size": args.input_size, "crop_pct": args.eval_crop_ratio}
    flags = {"input_size": "input_size", "crop_pct": "eval_crop_ratio"}
    if weights.data is None:
        config = with_own_preprocessing(DataConfig(**data_settings(weights.name)), args.dataset)
        if (args.input_size or config.input_size) <= WHOLE_PIXELS:
            config = replace(config, crop_pct=1.0)
    else:
        config = stored_config(weights.data, str(weights.path))
        changes = {key: value for key, value in changes.items() if flags[key] in args.given}  # not the recipe's
        for key, value in changes.items():
            if value is not None and value != getattr(config, key):
                log(f"note: --{flags[key]} {value} in place of the checkpoint's {getattr(config, key)}")
    return replace(config, **{key: value for key, value in changes.items() if value is not None})


def assumed_classes(num_classes: int) -> tuple[str, ...] | None:
    """Return the class names of weights that carry none: timm's convention tells ImageNet's sets by their number."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return tuple(ImageNetInfo(subset).label_names()) if subset else None


def build_teacher(args: Namespace, num_classes: int, device: torch.device | str) -> nn.Module | None:
    """Build the frozen teacher on `device` in evaluation mode; None without distillation.

    It is any timm model, with weights from --teacher_path (file or URL) or published ones.

    Raises:
        UserError: no weights to be had, or not of these classes.
    """
    if args.distillation_type == "none":
        return None
    name, path = args.teacher_model, args.teacher_path
    if path:
        teacher = _teacher_from_file(name, path, num_classes, args.input_size)
    else:
        teacher = _published_teacher(timm_name(name), num_classes)
    return teacher.to(device).eval().requires_grad_(False)


def build_own_teacher(args: Namespace, data: Data, device: torch.device | str) -> nn.Module:
    """Build the unmerged model of --recover, frozen: the weights that a run starts from, without what it adds.

    A resumed run loads them anew from where the run began.
    """
    plain = {**vars(args), "resume": None, "num_registers": None, "r": None, "merge": "none", "schedule": None}
    plain |= {"gmacs": None, "speedup": None, "activate_layer": None, "eval": True, "lora": None, "drop": 0.0}
    plain |= dict.fromkeys(all_knobs())
    dense = Namespace(**plain)
    teacher = build_model(dense, Weights(dense, args.model), data.num_classes, data.config).model
    return teacher.to(device).eval().requires_grad_(False)


def _teacher_from_file(name: str, path: str, num_classes: int, img_size: int | None) -> nn.Module:
    """Load a model of ours by our loading, any other by timm's, which knows the older names of each family."""
    weights = unwrap_state_dict(load_checkpoint(path), ema=True, source=path)
    known = {
        len(weights[key])
        for key in ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight")
        if key in weights
    }
    if len(known) == 1 and known != {num_classes}:
        raise UserError(
            f"--teacher_path {path} knows {known.pop()} classes, the data has {num_classes}: a teacher must know the "
            "classes that it teaches; finetune it on this data first"
        )
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


class Prepared(NamedTuple):
    """What training and evaluation share.

    Attributes:
        fresh: the parameters that no weights were found for.
        searched: what the search of the model's schedule found; None: it was given, or none.
    """

    data: Data
    weights: Weights
    model: MergingViT
    fresh: tuple[str, ...]
    precision: Precision
    searched: Result | None


def prepare(args: Namespace, dist: Distributed) -> Prepared:
    """Build everything that training and evaluation share; the cheapest checks come first."""
    if args.fsdp and not dist.distributed:
        raise UserError(
            "--fsdp spreads the weights over several processes, and this is one alone: start it with torchrun "
            "--nproc_per_node=N, or leave it out; --grad_checkpointing and --lora save memory in one process"
        )
    seed_all(args.seed)  # the same fresh parameters on all ranks
    precision = build_precision(args, dist.device)
    weights = Weights(args, args.model)
    if not args.eval:
        _check_weights(args, weights)
    data = _with_stored_classes(build_data(args, build_config(args, weights)), weights, args)
    for note in data.notes:
        log(f"note: {note}")
    if not args.eval:
        hollow = _hollow_model(args, weights, data.num_classes, data.config)
        check_memory(args, hollow, dist, precision, weights.name)
    if args.fsdp:
        model, fresh = build_hollow_model(args, weights, data.num_classes, data.config, dist)
    else:
        model, fresh = build_model(args, weights, data.num_classes or None, data.config)
    if not data.num_classes:  # unlabelled images
        data = _with_classes_of(model, data, weights)
    if args.recover:
        _check_recoverable(model, fresh)
    if weights.goes_on:
        weights.check_same_model(model)
    model = model if args.fsdp else model.to(dist.device)
    searched = None
    if has_budget(args) and not any(model.plan().merges):
        searched = apply_budget(args, dist, data, model, weights.name, fresh, precision)
    describe(model, weights, data)
    return Prepared(data, weights, model, fresh, precision, searched)


def _check_weights(args: Namespace, weights: Weights) -> None:
    """Refuse, before the data set is opened, flags that mean nothing for what the weights and --r make of the model."""
    merge = weights.merging(args)
    if not has_budget(args) or merge.r != 0:  # a schedule that is still to be searched will merge
        check_merging(merge, bool(args.full_weight), args.r_warmup_epochs)
    tensors = weights.tensors()
    known = tensors is not None or args.num_registers is not None or weights.name in NAMES
    registers = args.num_registers if args.num_registers is not None else "reg_token" in (tensors or ())
    for flag, given in (
        ("--register_lr_mult", args.register_lr_mult != 1),
        (f"--train_only {args.train_only}", "train_only" in args.given and "registers" in args.train_only),
    ):
        if given and known and not registers:
            raise UserError(f"{flag} has no effect without registers; give --num_registers 4, for example")


def _with_stored_classes(data: Data, weights: Weights, args: Namespace) -> Data:
    """Hold the classes of the data against those that the weights were trained on.

    An evaluation may lack some of the classes: its labels are then numbered as the checkpoint numbers them. Weights to
    finetune may be of other classes altogether.

    Raises:
        UserError: the data has classes that the checkpoint does not know, or a resumed training has other ones.
    """
    stored = tuple((weights.data or {}).get("class_names") or ())
    if not data.class_names or not stored or stored == data.class_names or not (args.eval or weights.resumed):
        return data
    if args.eval and set(data.class_names) <= set(stored):
        return with_classes(data, stored)
    raise UserError(
        f"the classes of {weights.path} are not those of the data: {differing_classes(stored, data.class_names)}; "
        "give the data that it was trained on, or finetune it for these classes with --finetune"
    )


def _with_classes_of(model: MergingViT, data: Data, weights: Weights) -> Data:
    """Give unlabelled images the classes of the weights."""
    names = tuple((weights.data or {}).get("class_names") or ()) or assumed_classes(model.num_classes) or ()
    labels = readable_names(names)
    return replace(data, num_classes=model.num_classes, class_names=names, class_labels=labels)


def _check_recoverable(model: MergingViT, fresh: tuple[str, ...]) -> None:
    """Refuse a recovery of a model that has nothing to recover, or nothing to recover to."""
    if any(parameter.split(".")[0] in HEADS for parameter in fresh):
        raise UserError("--recover keeps the classes of the weights, and these have a fresh head; finetune it first")
    if model.merge.method == "none":
        raise UserError("--recover has no effect without merging; give --r or --gmacs")


def describe(model: MergingViT, weights: Weights, data: Data) -> None:
    """Print what is about to run: model, weights, tokens per block and GMACs."""
    params = sum(p.numel() for p in model.parameters())
    log(f"{weights.name}: {params / 1e6:.2f} M parameters, {model.num_registers} registers, weights: {weights.source}")
    method, r = model.merge.method, format_schedule(model.merge.r)
    log(f"merging: {method}, r={r}; tokens per block: {list(model.plan().counts)}; {gmacs(model):.3f} GMACs")
    train = f"{len(data.train)} train, " if data.train is not None else ""
    log(f"data: {data.name}, {train}{len(data.val)} val images, {data.num_classes} classes")


def device_name(device: torch.device) -> str:
    """Name the device that a measurement ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


class Inference(NamedTuple):
    """A model in evaluation mode, its preprocessing, and where both come from.

    `class_names` are in the order of the logits, `class_labels` the same for people; both are None if nobody knows.
    """

    model: MergingViT
    config: DataConfig  # how its images are prepared
    name: str
    source: str  # of the weights
    class_names: tuple[str, ...] | None = None
    class_labels: tuple[str, ...] | None = None


def load_for_inference(args: Namespace, device: torch.device | str = "cpu") -> Inference:
    """Build the model that main.py's options ask for, without a data set: its classes are those of its weights."""
    seed_all(args.seed)
    weights = Weights(args, args.model)
    config = build_config(args, weights)
    head = (weights.tensors() or {}).get("head.weight")
    classes = None if head is None else len(head)  # None: the model's own
    model = build_model(args, weights, classes, config).model.to(device).eval()
    names = tuple((weights.data or {}).get("class_names") or ()) or assumed_classes(model.num_classes)
    labels = tuple((weights.data or {}).get("class_labels") or ()) or (names and readable_names(names))
    return Inference(model, config, weights.name, weights.source, names, labels)
