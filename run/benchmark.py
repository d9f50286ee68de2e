"""Images per second of merging models against two baselines measured in the same rounds.

python run/benchmark.py --models deit_small --methods tome mctf --r 16 --num_registers 4 --batch_sizes 16 --rounds 20
python run/benchmark.py --models deit_base --dtypes bf16 --modes eager compiled --batch_sizes 1 32 256 --device cuda
python run/benchmark.py --phases train --models deit_small --batch_sizes 32
python run/benchmark.py --models deit_small --results output/eval_deit_s_tome --output_dir output/speed

*native* is timm's own dense model with fused attention, *ideal* the same data flow whose tokens are dropped by slicing,
so that matching and merging cost nothing. All models of a setting (model, batch size, dtype, device, phase), eager and
compiled, take turns in one process, in a new random order every round; a ratio is the median over rounds of the ratio
within a round, so that it survives a noisy machine. What was not timed in the same rounds has no ratio. Ratios are to
native and ideal in the same mode; where both modes are timed, the compiled also to the eager ones. --modes onnxruntime,
onnxruntime_int8 and openvino time the files of run/export.py onnx in these programs, with as many threads as torch has.

--output_dir saves benchmark.json, benchmark.txt and speed.png, with --results also pareto.png: accuracies of main.py
--eval over the speeds measured here. --profile adds where the time of each merging model goes beyond that of its ideal.
"""

import argparse
import itertools
import json
import os
import random
import re
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from analysis import charts
from analysis.ideal import ideal_model
from analysis.operators import operator_times
from build import device_name
from datasets import DataConfig, build_data, build_eval_loader, with_own_preprocessing
from engine import quartiles, seconds_of
from models import MergeConfig, MergingViT, UserError, apply_merging
from models.export import export_onnx, load_onnx
from models.gmacs import gmacs
from models.methods import METHODS, variants
from models.onnx_files import load_openvino, quantise_onnx, save_openvino
from models.registry import check_name, data_settings, native_model
from models.schedule import format_schedule
from options import Parser, exit_status, parse_args
from run.results import Point, collect, draw_accuracies, save
from utils import (
    Progress,
    compile_model,
    git_revision,
    log,
    nearest,
    seed_all,
    setup_output,
    table,
    versions,
    write_json,
)


def configurations() -> dict[str, dict[str, Any]]:
    """The choices of --methods by name, as keywords of `MergeConfig`.

    They are the published variants, and every method with each choice of a setting that is not its default
    (mctf_off, mctf_max, ...). --r replaces the r of a variant unless that comes with blocks of its own.
    """
    choices = {
        f"{name}_{choice}": {"method": name, knob.name: choice}
        for name, method in METHODS.items()
        for knob in method.knobs().values()
        for choice in knob.choices
        if choice != knob.default and name != "none"
    }
    published = {
        name: keywords if "activate_layers" in keywords else {k: v for k, v in keywords.items() if k != "r"}
        for name, keywords in variants().items()
    }
    return {"none": {"method": "none", "r": 0}, **published, **choices}


CONFIGURATIONS = configurations()
PHASES = {
    "inference": "the forward alone",
    "train": "a step of forward, backward and AdamW",
    "end_to_end": "a pass over a data set, with its loader",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# name -> keywords of torch.compile; cudagraphs replays the whole forward, which is for small batches on a GPU
MODES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compiled": {},
    "cudagraphs": {"mode": "reduce-overhead"},
}
# other programs that run what run/export.py onnx writes, on a CPU
RUNTIMES = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_int8": "the same with weights of 8 bits (--int8)",
    "openvino": "OpenVINO (pip install openvino)",
}
SHOWN_OPERATORS = 15  # in a table of --profile
DEFAULT_METHODS = ("tome", "mctf", "mctf_fast")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
UNTIMED = "no row of --results is timed in this run; give --models, --num_registers and --r of at least one"


@dataclass(frozen=True)
class BenchmarkSetting:
    """The setting that all models share which take turns in the same rounds."""

    model: str
    phase: str
    dtype: str
    batch_size: int
    img_size: int
    device: str


@dataclass(frozen=True)
class Variant:
    """A model that takes turns with others.

    Attributes:
        describe: what a row of the result says about it.
        ideal: the name of the variant that drops the same tokens at no cost.
    """

    name: str
    module: nn.Module
    describe: dict[str, Any]
    ideal: str | None = None


Key = tuple[str, str]  # a variant's name, and eager or compiled


@dataclass(frozen=True)
class TimedCall:
    """A call to time, and the images that it takes."""

    run: Callable[[], Any]
    images: int


# What takes part


def build_variants(native: nn.Module, args: Namespace) -> list[Variant]:
    """Build timm's model, the merging models and the ideal of each; all share native's weights."""
    models = [] if args.no_native else [Variant("native", native, {"method": "native"})]
    for method, registers in itertools.product(args.methods, args.num_registers):
        keywords = CONFIGURATIONS[method]
        for r in [keywords["r"]] if "r" in keywords else args.r:
            with warnings.catch_warnings(record=True):  # that r is clamped: the table shows the tokens left
                warnings.simplefilter("always", UserWarning)
                model = apply_merging(native, MergeConfig(**(keywords | {"r": r})), registers)  # type: ignore[arg-type]
            model.train(native.training).to(next(native.parameters()).device)
            name = f"{method} r={format_schedule(model.merge.r)} +{registers}"
            about = _describe(model, method)
            ideal = None if args.no_ideal else f"ideal of {name}"
            models.append(Variant(name, model, about, ideal))
            if ideal:
                models.append(Variant(ideal, ideal_model(model), about | {"method": f"ideal {method}"}))
    return models


def _describe(model: MergingViT, method: str) -> dict[str, Any]:
    return {
        "method": method,
        "r": format_schedule(model.merge.r),
        "merge": model.merge.as_dict(),
        "num_registers": model.num_registers,
        "tokens": list(model.plan().counts),
        "gmacs": round(gmacs(model), 4),
        "gmacs_run": round(gmacs(model, inference=True), 4),
    }


# What is timed


def inference_call(module: nn.Module, images: Tensor) -> TimedCall:
    """Time the forward alone."""

    def run() -> None:
        with torch.inference_mode():
            module(images)

    return TimedCall(run, len(images))


def training_call(module: nn.Module, images: Tensor, dtype: torch.dtype) -> TimedCall:
    """Time forward, backward and AdamW, at lr 0 so that all models keep the same weights; below fp32 in autocast."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0)
    targets = torch.arange(len(images), device=images.device) % 10

    def run() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(module(images).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return TimedCall(run, len(images))


def end_to_end_call(module: nn.Module, loader: Any, images: int, device: torch.device, dtype: torch.dtype) -> TimedCall:
    """Time a pass over the validation split: reading, decoding, copying and the forward."""

    def run() -> None:
        with torch.inference_mode():
            for batch in loader:
                module(batch.images.to(device, dtype, non_blocking=True))

    return TimedCall(run, images)


def build_calls(models: Sequence[Variant], setting: BenchmarkSetting, args: Namespace) -> dict[Key, TimedCall]:
    """Build a call of every model in every mode, on the same images."""
    device, dtype = torch.device(setting.device), DTYPES[setting.dtype]
    images = torch.randn(setting.batch_size, 3, setting.img_size, setting.img_size, device=device)
    loader, length = build_loader(args, setting) if setting.phase == "end_to_end" else (None, 0)
    calls: dict[Key, TimedCall] = {}
    runtimes = [mode for mode in args.modes if mode in RUNTIMES]
    for variant in models if runtimes else ():
        if not variant.name.startswith("ideal of"):  # slices stand for nothing that a user could export
            calls |= runtime_calls(variant, runtimes, images)
    for mode, variant in itertools.product(args.modes, models):
        if mode in RUNTIMES:
            continue
        module, compiler_options = variant.module, MODES[mode]
        if compiler_options is not None:
            module = compile_model(module, dynamic=False, fullgraph=True, **compiler_options)
        if setting.phase == "train":
            call = training_call(module, images, dtype)
        elif loader is not None:
            call = end_to_end_call(module, loader, length, device, dtype)
        else:
            call = inference_call(module, images.to(dtype))
        calls[variant.name, mode] = call
    return calls


def runtime_calls(variant: Variant, runtimes: Sequence[str], images: Tensor) -> dict[Key, TimedCall]:
    """Build the calls of a model in other programs, with as many threads as torch has."""
    model = variant.module
    if not isinstance(model, MergingViT):
        model = apply_merging(model, MergeConfig(method="none")).eval()  # type: ignore[arg-type]
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    threads = torch.get_num_threads()
    log(f"exporting {variant.name}")
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, images, file, dynamic=False)
        if "openvino" in runtimes:
            save_openvino(file, Path(folder) / "openvino", {})
            calls["openvino"] = load_openvino(Path(folder) / "openvino", threads)
        if "onnxruntime" in runtimes:
            calls["onnxruntime"] = load_onnx(file, threads)
        if "onnxruntime_int8" in runtimes:
            quantise_onnx(file)
            calls["onnxruntime_int8"] = load_onnx(file, threads)
    return {(variant.name, runtime): TimedCall(partial(run, images), len(images)) for runtime, run in calls.items()}


def build_loader(args: Namespace, setting: BenchmarkSetting) -> tuple[Any, int]:
    """Build the validation loader of main.py's data options; returns its number of images, too."""
    flags = ["--eval", "--dataset", args.dataset, "--batch_size", str(setting.batch_size)]
    for name in ("data_path", "num_workers", "limit"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    main_args = parse_args([*flags, "--input_size", str(setting.img_size)])
    config = DataConfig(**(data_settings(setting.model) | {"input_size": setting.img_size}))
    config = with_own_preprocessing(config, args.dataset)
    images = build_data(main_args, config).val
    return build_eval_loader(main_args, images, 0, 1), len(images)


# Timing


def interleave(
    calls: dict[Any, TimedCall],
    rounds: int,
    device: torch.device,
    seed: int = 0,
    clock: Callable[[], float] = CLOCKS["wall"],
    title: str = "rounds",
) -> dict[Any, np.ndarray]:
    """Time every call once a round, in an order that each round draws anew; returns seconds (rounds,) by name."""
    order, draw = list(calls), random.Random(seed)
    for _ in range(2):  # allocation and compilation
        for name in order:
            seconds_of(calls[name].run, device, clock)
    times: dict[Any, list[float]] = {name: [] for name in order}
    progress = Progress(range(rounds), rounds, title)
    for _ in progress:
        draw.shuffle(order)
        for name in order:
            times[name].append(seconds_of(calls[name].run, device, clock))
        if progress.due:
            progress.show()
    return {name: np.array(seconds) for name, seconds in times.items()}


def ratio(times: dict[Any, np.ndarray], name: Any, reference: Any) -> dict[str, float] | None:
    """How many times faster than the reference, round by round; None if that did not take part in these rounds."""
    if reference not in times or name not in times:
        return None
    return quartiles(times[reference] / times[name])


def peak_memory(call: TimedCall, device: torch.device) -> int:
    """Measure the most bytes of tensors at one time in a call, above what there was before: weights, images, states.

    On a GPU the caching allocator's own count; on a CPU the sum of all allocations and frees that the profiler saw,
    which is exact and, other than the resident size of a process, not changed by what ran before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes a line when it starts and one when it stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call.run()
    # the raw events: the public tables sum allocations and frees by operator, and so lose their order
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return int(max(itertools.accumulate((event.nbytes() for event in changes), initial=0)))


def measure(setting: BenchmarkSetting, args: Namespace) -> list[dict[str, Any]]:
    """Measure one setting; returns a row for every variant in every mode."""
    seed_all(args.seed)
    device = torch.device(setting.device)
    native = native_model(setting.model, img_size=setting.img_size).to(device)
    native.train(setting.phase == "train")
    if setting.phase != "train":
        native.to(DTYPES[setting.dtype])
    models = build_variants(native, args)
    calls = build_calls(models, setting, args)
    title = f"{setting.model} {setting.phase} {setting.dtype} batch {setting.batch_size}"
    log(f"{title} on {setting.device}: {len(calls)} models, two turns each to warm up")
    times = interleave(calls, args.rounds, device, args.seed, CLOCKS[args.clock], title)
    rows = []
    for mode, variant in itertools.product(args.modes, models):
        key = (variant.name, mode)
        if key not in calls:
            continue
        eager = mode == "eager"  # its own mode's ratios would be said twice
        row = {
            **asdict(setting),
            "mode": mode,
            "name": variant.name,
            **variant.describe,
            "images_per_s": quartiles(calls[key].images / times[key]),
            "rounds": args.rounds,
            "ratio_native": ratio(times, key, ("native", mode)),
            "ratio_ideal": ratio(times, key, (variant.ideal, mode)),
            "ratio_eager_native": None if eager else ratio(times, key, ("native", "eager")),
            "ratio_eager_ideal": None if eager else ratio(times, key, (variant.ideal, "eager")),
            # a loader's tensors are other processes', and those of other programs are not torch's
            "peak_memory": None
            if setting.phase == "end_to_end" or mode in RUNTIMES
            else peak_memory(calls[key], device),
        }
        if args.profile:
            row["operators"] = operator_times(calls[key].run, device)
        rows.append(row)
    torch.compiler.reset()
    return rows


# Showing

COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("model", lambda row: row["model"]),
    ("phase", lambda row: row["phase"]),
    ("dtype", lambda row: f"{row['dtype']} {row['mode']}"),
    ("batch", lambda row: str(row["batch_size"])),
    ("variant", lambda row: row["name"]),
    ("tokens left", lambda row: str(row["tokens"][-1]) if "tokens" in row else ""),
    ("GMACs", lambda row: f"{row['gmacs']:.3f}" if "gmacs" in row else ""),
    ("GMACs run", lambda row: f"{row['gmacs_run']:.3f}" if "gmacs_run" in row else ""),
    ("images/s [quartiles]", lambda row: "{median:.1f} [{q25:.1f}, {q75:.1f}]".format_map(row["images_per_s"])),
    ("x native", lambda row: _ratio_text(row["ratio_native"])),
    ("of ideal", lambda row: _ratio_text(row["ratio_ideal"])),
    ("x eager native", lambda row: _ratio_text(row["ratio_eager_native"])),
    ("of eager ideal", lambda row: _ratio_text(row["ratio_eager_ideal"])),
    ("peak MiB", lambda row: "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}"),
)


def _ratio_text(value: dict[str, float] | None) -> str:
    return "" if value is None else "{median:.3f} [{q25:.3f}, {q75:.3f}]".format_map(value)


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as markdown, which is readable as text too."""
    texts = [[text(row) for _, text in COLUMNS] for row in rows]
    return table([title for title, _ in COLUMNS], texts, left=5)


def overheads(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For every profiled merging model a table of what its operators take beyond those of its ideal."""
    profiled = {(_setting_text(row), row["mode"], row["name"]): row for row in rows if "operators" in row}
    texts = []
    for (setting, mode, name), row in profiled.items():
        ideal = profiled.get((setting, mode, f"ideal of {name}"))
        if ideal:
            title = f"{setting}, {mode}: {name}"
            texts.append(title + "\n\n" + overhead_table(row["operators"], ideal["operators"]))
    return texts


def overhead_table(merging: Mapping[str, float], ideal: Mapping[str, float]) -> str:
    """The operators whose milliseconds differ most, as markdown; last the sum over all."""
    differences = {name: merging.get(name, 0) - ideal.get(name, 0) for name in sorted(merging.keys() | ideal.keys())}
    shown = sorted(differences, key=lambda name: -abs(differences[name]))[:SHOWN_OPERATORS]
    lines = [(name[:60], merging.get(name, 0.0), ideal.get(name, 0.0)) for name in shown]
    lines.append(("all operators", sum(merging.values()), sum(ideal.values())))
    texts = [(name, f"{ours:.2f}", f"{least:.2f}", f"{ours - least:+.2f}") for name, ours, least in lines]
    return table(("operator", "merging ms", "ideal ms", "difference"), texts)


@charts.styled
def draw_speed(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the images/s of every variant, a panel for each setting."""
    groups = [list(group) for _, group in itertools.groupby(rows, _setting_text)]  # rows of a setting follow each other
    heights = [0.9 + 0.28 * len(group) for group in groups]
    figure, axes = charts.new_figure(len(groups), 1, width=8, height=sum(heights) / len(heights), height_ratios=heights)
    for ax, group in zip(axes[:, 0], groups, strict=True):
        speeds = [row["images_per_s"] for row in group]
        medians = [speed["median"] for speed in speeds]
        spread = [[s["median"] - s["q25"] for s in speeds], [s["q75"] - s["median"] for s in speeds]]
        names = [row["name"] + ("" if row["mode"] == "eager" else f", {row['mode']}") for row in group]
        colours = [_colour(row["name"]) for row in group]
        ax.barh(names, medians, xerr=spread, color=colours, error_kw={"linewidth": 1})
        ax.invert_yaxis()
        ax.grid(False, axis="y")
        ax.set_title(_setting_text(group[0]), fontsize=9)
    axes[-1, 0].set_xlabel("images/s, median and quartiles")
    return figure


def _colour(name: str) -> str:
    return charts.FAINT if name == "native" else charts.RULE if name.startswith("ideal") else charts.colour_of(0)


@charts.styled
def draw_pareto(points: Sequence[Point]) -> Figure:
    """Draw accuracies of result.json files over the speeds of this run."""
    figure, axes = charts.new_figure(width=6.5, height=4.5)
    draw_accuracies(axes[0, 0], points, "speed, in multiples of timm's dense model", smaller_x=False)
    axes[0, 0].set_ylabel("top-1 accuracy (%)")
    axes[0, 0].legend()
    return figure


def match_accuracies(rows: Sequence[dict[str, Any]], places: Sequence[str]) -> list[Point]:
    """Accuracies over speeds, in multiples of native, where the same model merges the same way.

    Raises:
        UserError: no row of the files was timed here.
    """
    timed: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if row["ratio_native"] and "tokens" in row and not row["name"].startswith("ideal") and row["phase"] != "train":
            timed.setdefault(merges_as(row["model"], row["merge"], row["tokens"]), []).append(row)
    points, untimed = [], []
    for accuracy in collect(places):
        values = accuracy.values
        matches = timed.get(merges_as(accuracy.model, accuracy.merge, values["tokens"]), [])
        if not matches:
            untimed.append(f"{accuracy.label} r={values['r']}")
        for row in matches:
            series = f"{accuracy.label}, {row['method']}, {_setting_text(row)}, {row['mode']}"
            points.append(Point(series, row["ratio_native"]["median"], float(values["acc1"]), f"r={row['r']}"))
    if not points:
        raise UserError(UNTIMED)
    for name in untimed:
        log(f"note: {name} was not timed in this run; it is left out of the plot")
    return points


def merges_as(model: str, merge: Mapping[str, Any], tokens: Sequence[int]) -> tuple[Any, ...]:
    """The key that joins accuracy and speed: model, tokens after every block, and all of `merge` but r.

    Where nothing merges the method does not matter.
    """
    dense = len(set(tokens)) == 1
    method = None if dense else json.dumps({k: v for k, v in merge.items() if k != "r"}, sort_keys=True)
    return model, tuple(tokens), method


def _setting_text(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['phase']}, {row['dtype']}, batch {row['batch_size']}, {row['device']}"


# The command line


def settings(args: Namespace) -> list[BenchmarkSetting]:
    """Every combination that was asked for."""
    combinations = itertools.product(args.device, args.models, args.phases, args.dtypes, args.batch_sizes)
    return [
        BenchmarkSetting(model, phase, dtype, batch, args.img_size or data_settings(model)["input_size"], device)
        for device, model, phase, dtype, batch in combinations
    ]


def check(args: Namespace) -> None:
    """Find mistakes before minutes of timing.

    Raises:
        UserError: unknown names, numbers out of range, options that do nothing or contradict.
    """
    for method in args.methods or ():
        if method not in CONFIGURATIONS:
            raise UserError(nearest(method, CONFIGURATIONS, "--methods"))
    for device in args.device:
        _check_device(device)
    for message, broken in _rules(args).items():
        if broken:
            raise UserError(message)
    for name in args.models:
        check_name(name)
    if args.methods is None:
        misfits = {method: _misfit(method, args) for method in DEFAULT_METHODS}
        # where none fits, the schedule is to blame, which is told below
        args.methods = [name for name, reason in misfits.items() if reason is None] or list(DEFAULT_METHODS)
        for name, reason in misfits.items():
            if name not in args.methods:
                log(f"note: {name} is left out: {reason}")
    _check_schedules(args)


def _misfit(method: str, args: Namespace) -> str | None:
    """Say why a method that nobody named cannot be built for some model; its blocks may be those of another one."""
    alone = copy(args)
    alone.methods = [method]
    try:
        for model, img_size in {(setting.model, setting.img_size) for setting in settings(args)}:
            build_variants(native_model(model, img_size=img_size), alone)
    except UserError as error:
        return str(error)
    return None


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device is cpu, cuda or cuda:INDEX, not {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no GPU that torch can use")


def _rules(args: Namespace) -> dict[str, bool]:
    """What to say -> whether these options break the rule."""
    too_small = min(args.batch_sizes) < 1 or args.rounds < 3 or min(args.num_registers) < 0 or (args.threads or 1) < 1
    end_to_end = "end_to_end" in args.phases
    plain = args.phases == ["inference"] and args.dtypes == ["fp32"] and args.device == ["cpu"]
    one_thread = args.threads == 1 and args.device == ["cpu"] and not end_to_end
    return {
        "--batch_sizes and --threads must be at least 1, --rounds 3, --num_registers 0": too_small,
        "--results is drawn over speed-ups against native: it needs --output_dir, and no --no_native": bool(
            args.results and (not args.output_dir or args.no_native)
        ),
        "--modes cudagraphs is for a GPU: it needs --device cuda alone": (
            "cudagraphs" in args.modes and "cpu" in args.device
        ),
        f"--modes {', '.join(RUNTIMES)} run forwards in fp32: they need --device cpu, no other --phases and --dtypes": (
            bool(set(args.modes) & set(RUNTIMES)) and not plain
        ),
        "--modes openvino needs openvino; pip install openvino": (
            "openvino" in args.modes and find_spec("openvino") is None
        ),
        "--clock cpu counts what one thread works: it needs --device cpu --threads 1, no end_to_end": (
            args.clock == "cpu" and not one_thread
        ),
        "--dataset has no effect without --phases end_to_end": bool(args.dataset) and not end_to_end,
        "--phases end_to_end reads images; name them with --dataset (and --data_path)": (
            end_to_end and not args.dataset
        ),
    }


def _check_schedules(args: Namespace) -> None:
    """Build every model once, which finds schedules that it refuses, and accuracies that no model would match."""
    planned = {
        merges_as(model, variant.describe["merge"], variant.describe["tokens"])
        for model, img_size in {(setting.model, setting.img_size) for setting in settings(args)}
        for variant in build_variants(native_model(model, img_size=img_size), args)
        if "tokens" in variant.describe
    }
    if not args.results:
        return
    measured = {merges_as(row.model, row.merge, row.values["tokens"]) for row in collect(args.results)}
    if not planned & measured:
        raise UserError(UNTIMED)


def build_parser() -> Parser:
    parser = Parser(
        prog="benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = partial(parser.add_argument, metavar="NAME")
    add("--models", nargs="+", default=["deit_tiny"], help="default: deit_tiny")
    text = f"{', '.join(CONFIGURATIONS)} (default: {' '.join(DEFAULT_METHODS)}, as far as they fit)"
    add("--methods", nargs="+", help=text)
    add("--r", nargs="+", default=["16"], metavar="R", help="schedules of the methods without one of their own")
    add("--num_registers", nargs="+", type=int, default=[4], metavar="R")
    add("--batch_sizes", nargs="+", type=int, default=[8], metavar="B")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp32"], help="of weights, in training of autocast")
    add(
        "--phases",
        nargs="+",
        choices=PHASES,
        default=["inference"],
        help="; ".join(f"{k}: {v}" for k, v in PHASES.items()),
    )
    modes = (*MODES, *RUNTIMES)
    add("--modes", nargs="+", choices=modes, default=["eager"], help=", ".join((*MODES, *RUNTIMES.values())))
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", nargs="+", default=[gpu], help="cpu, cuda; default: a GPU if there is one")
    add("--img_size", type=int, metavar="PIXELS", help="default: the model's")
    add("--rounds", type=int, default=20, metavar="N", help="turns of each model (default: 20)")
    add("--threads", type=int, metavar="N", help="of a CPU")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: time of this process alone, for a shared machine")
    add("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--profile", action="store_true", help="also time operator by operator, beside the ideal")
    parser.add_argument("--no_native", action="store_true", help="leave out timm's model, and the ratios to it")
    parser.add_argument("--no_ideal", action="store_true", help="leave out the ideal, and the ratios to it")
    add("--dataset", help="of end_to_end: main.py's --dataset")
    for flag, kind in (("--data_path", str), ("--num_workers", int), ("--limit", int)):
        add(flag, type=kind, metavar="X", help="of end_to_end: main.py's")
    add("--results", nargs="+", metavar="[LABEL=]PLACE", help="result.json files: accuracies for pareto.png")
    add("--output_dir", metavar="DIR", help="save benchmark.json, benchmark.txt, speed.png, pareto.png")
    return parser


def run(argv: Sequence[str]) -> None:
    """Measure every setting, print its rows as they come, and save all."""
    args = build_parser().parse(argv)
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = setup_output(args.output_dir, True)
    rows: list[dict[str, Any]] = []
    for setting in settings(args):
        measured = measure(setting, args)
        log(speed_table(measured) + "\n")
        for text in overheads(measured):
            log(text + "\n")
        rows += measured
    if folder is not None:
        save_all(folder, rows, args)
        log(f"wrote {folder}")


def save_all(folder: Path, rows: Sequence[dict[str, Any]], args: Namespace) -> None:
    """Write the rows as JSON, as text and as figures."""
    device = " and ".join(device_name(torch.device(name)) for name in args.device)
    write_json(
        folder / "benchmark.json",
        {"device": device, "versions": versions(), "git": git_revision(), "options": vars(args), "rows": rows},
    )
    head = f"{device}, torch {torch.__version__}, {args.rounds} rounds, {args.clock} clock"
    (folder / "benchmark.txt").write_text("\n\n".join([head, speed_table(rows), *overheads(rows)]) + "\n")
    save(draw_speed(rows), folder / "speed.png", "--output_dir")
    if args.results:
        save(draw_pareto(match_accuracies(rows, args.results)), folder / "pareto.png", "--output_dir")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    return exit_status("benchmark.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
