"""Images per second of merging models against two yardsticks measured in the same rounds.

python run/benchmark.py --models deit_small --methods tome mctf --r 16 --num_registers 4 --batch_sizes 16 --rounds 20
python run/benchmark.py --models deit_base --dtypes bf16 --modes eager compiled --batch_sizes 1 32 256 --device cuda
python run/benchmark.py --phases train --models deit_small --batch_sizes 32
python run/benchmark.py --models deit_small --results output/eval_deit_s_tome --output_dir output/speed

*native* is timm's own dense model with fused attention, *ideal* the same data flow whose tokens are dropped by slicing,
so that matching and merging cost nothing. All models of a setting (model, batch size, dtype, device, phase), eager and
compiled, take turns in one process, in a new random order every round; a ratio is the median over rounds of the ratio
within a round, so that it survives a noisy machine. What was not timed in the same rounds has no ratio. Ratios are to
native and ideal in the same mode; where both modes are timed, the compiled also to the eager ones.

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
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.ideal import ideal_model
from analysis.operators import operator_times, overhead_table
from build import device_name
from datasets import DataConfig, build_data, build_eval_loader
from engine import quartiles, seconds_of
from models import MergeConfig, MergingViT, UserError, apply_merging
from models.gmacs import gmacs
from models.registry import check_name, data_settings, native_model
from models.schedule import format_schedule
from options import Parser, parse_args
from run.results import COLOURS, collect, pareto
from utils import compile_model, git_revision, log, nearest, seed_all, setup_output, versions, write_json

# name -> keywords of MergeConfig; a method with its own r ignores --r
METHODS: dict[str, dict[str, Any]] = {
    "tome": {"method": "tome"},
    "mctf": {"method": "mctf"},
    "mctf_fast": {"method": "mctf", "r": 0.35, "activate_layers": (3, 6, 9)},
    "mctf_off": {"method": "mctf", "one_step_ahead": "off"},
    "mctf_precise": {"method": "mctf", "one_step_ahead": "precise"},
    "mctf_max": {"method": "mctf", "pooling": "max"},
    "lgtm": {"method": "lgtm"},
    "none": {"method": "none", "r": 0},
}
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
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
UNTIMED = "no row of --results is timed in this run; give --models, --num_registers and --r of at least one"


@dataclass(frozen=True)
class Setting:
    """What the models that take turns have in common."""

    model: str
    phase: str
    dtype: str
    batch_size: int
    img_size: int
    device: str


@dataclass(frozen=True)
class Contestant:
    """One model of a setting. `ideal` names the contestant that is its yardstick, `native` the dense one."""

    name: str
    module: nn.Module
    describe: dict[str, Any]
    ideal: str | None = None


Key = tuple[str, str]  # name and mode of what takes part


@dataclass(frozen=True)
class Step:
    """Something to time: a call, and the images that it takes."""

    run: Callable[[], Any]
    images: int


# What takes part


def contestants(native: nn.Module, own: Namespace) -> list[Contestant]:
    """timm's model, the merging models and the ideal of each; all share native's weights."""
    found = [] if own.no_native else [Contestant("native", native, {"method": "native"})]
    for method, registers in itertools.product(own.methods, own.num_registers):
        fixed = METHODS[method]
        for r in [fixed["r"]] if "r" in fixed else own.r:
            with warnings.catch_warnings(record=True):  # the table shows the tokens left
                warnings.simplefilter("always", UserWarning)
                model = apply_merging(native, MergeConfig(**(fixed | {"r": r})), registers)  # type: ignore[arg-type]
            model.train(native.training).to(next(native.parameters()).device)
            name = f"{method} r={format_schedule(model.merge.r)} +{registers}"
            about = _describe(model, method)
            ideal = None if own.no_ideal else f"ideal of {name}"
            found.append(Contestant(name, model, about, ideal))
            if ideal:
                found.append(Contestant(ideal, ideal_model(model), about | {"method": f"ideal {method}"}))
    return found


def _describe(model: MergingViT, method: str) -> dict[str, Any]:
    plan = model.plan()
    about: dict[str, Any] = {"method": method, "r": format_schedule(model.merge.r), "merge": model.merge.as_dict()}
    about |= {"num_registers": model.num_registers, "tokens": list(plan.counts), "gmacs": round(gmacs(model), 4)}
    return about


# What is timed


def inference_step(module: nn.Module, images: Tensor) -> Step:
    def run() -> None:
        with torch.inference_mode():
            module(images)

    return Step(run, len(images))


def train_step(module: nn.Module, images: Tensor, dtype: torch.dtype) -> Step:
    """Forward, backward and AdamW, at lr 0 so that all models keep the same weights; below fp32 under autocast."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0)
    targets = torch.arange(len(images), device=images.device) % 10

    def run() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(module(images).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Step(run, len(images))


def end_to_end_step(module: nn.Module, loader: Any, images: int, device: torch.device, dtype: torch.dtype) -> Step:
    """A pass over the validation split: reading, decoding, copying and the forward."""

    def run() -> None:
        with torch.inference_mode():
            for batch in loader:
                module(batch.images.to(device, dtype, non_blocking=True))

    return Step(run, images)


def build_steps(found: Sequence[Contestant], setting: Setting, own: Namespace) -> dict[Key, Step]:
    """A step for every contestant in every mode, on the same images."""
    device, dtype = torch.device(setting.device), DTYPES[setting.dtype]
    images = torch.randn(setting.batch_size, 3, setting.img_size, setting.img_size, device=device)
    loader, length = build_loader(own, setting) if setting.phase == "end_to_end" else (None, 0)
    steps = {}
    for mode, contestant in itertools.product(own.modes, found):
        module, options = contestant.module, MODES[mode]
        if options is not None:
            module = compile_model(module, dynamic=False, fullgraph=True, **options)
        if setting.phase == "train":
            step = train_step(module, images, dtype)
        elif loader is not None:
            step = end_to_end_step(module, loader, length, device, dtype)
        else:
            step = inference_step(module, images.to(dtype))
        steps[contestant.name, mode] = step
    return steps


def build_loader(own: Namespace, setting: Setting) -> tuple[Any, int]:
    """The validation loader of main.py's data options, and its images."""
    flags = ["--eval", "--dataset", own.dataset, "--batch_size", str(setting.batch_size)]
    for name in ("data_path", "num_workers", "limit"):
        if getattr(own, name) is not None:
            flags += [f"--{name}", str(getattr(own, name))]
    args = parse_args([*flags, "--input_size", str(setting.img_size)])
    config = DataConfig(**(data_settings(setting.model) | {"input_size": setting.img_size}))
    images = build_data(args, config).val
    return build_eval_loader(args, images, 0, 1), len(images)


# Timing


def interleave(
    steps: dict[Any, Step],
    rounds: int,
    device: torch.device,
    seed: int = 0,
    clock: Callable[[], float] = CLOCKS["wall"],
) -> dict[Any, np.ndarray]:
    """Seconds (rounds,) of every step, in rounds in which each has one turn, in an order drawn anew."""
    order, draw = list(steps), random.Random(seed)
    for _ in range(2):  # allocation and compilation
        for name in order:
            seconds_of(steps[name].run, device, clock)
    times: dict[Any, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            times[name].append(seconds_of(steps[name].run, device, clock))
    return {name: np.array(taken) for name, taken in times.items()}


def ratio(times: dict[Any, np.ndarray], name: Any, reference: Any) -> dict[str, float] | None:
    """How many times faster than the reference, round by round; None if that did not take part in these rounds."""
    if reference not in times or name not in times:
        return None
    return quartiles(times[reference] / times[name])


def peak_memory(step: Step, device: torch.device) -> int:
    """Most bytes of tensors at one time during a step above what there was before it: no weights, images or states.

    On a GPU the caching allocator's own count; on a CPU the sum of all allocations and frees that the profiler saw,
    which is exact and, other than the resident size of a process, not changed by what ran before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes a line when it starts and one when it stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.run()
    found = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((event for event in found if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return int(max(itertools.accumulate((event.nbytes() for event in events), initial=0)))


def measure(setting: Setting, own: Namespace) -> list[dict[str, Any]]:
    """One row for every contestant of a setting."""
    seed_all(own.seed)
    device = torch.device(setting.device)
    native = native_model(setting.model, img_size=setting.img_size).to(device)
    native.train(setting.phase == "train")
    if setting.phase != "train":
        native.to(DTYPES[setting.dtype])
    found = contestants(native, own)
    steps = build_steps(found, setting, own)
    times = interleave(steps, own.rounds, device, own.seed, CLOCKS[own.clock])
    rows = []
    for mode, contestant in itertools.product(own.modes, found):
        key = (contestant.name, mode)
        row = asdict(setting) | {"mode": mode, "name": contestant.name} | contestant.describe
        row |= {"images_per_s": quartiles(steps[key].images / times[key]), "rounds": own.rounds}
        row["ratio_native"] = ratio(times, key, ("native", mode))
        row["ratio_ideal"] = ratio(times, key, (contestant.ideal, mode))
        eager = mode == "eager"  # its own mode's ratios would be said twice
        row["ratio_eager_native"] = None if eager else ratio(times, key, ("native", "eager"))
        row["ratio_eager_ideal"] = None if eager else ratio(times, key, (contestant.ideal, "eager"))
        # a loader's tensors are other processes'
        row["peak_memory"] = None if setting.phase == "end_to_end" else peak_memory(steps[key], device)
        if own.profile:
            row["operators"] = operator_times(steps[key].run, device)
        rows.append(row)
    torch.compiler.reset()
    return rows


# Showing

COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("model", lambda row: row["model"]),
    ("phase", lambda row: row["phase"]),
    ("dtype", lambda row: f"{row['dtype']} {row['mode']}"),
    ("batch", lambda row: str(row["batch_size"])),
    ("contestant", lambda row: row["name"]),
    ("tokens left", lambda row: str(row["tokens"][-1]) if "tokens" in row else ""),
    ("GMACs", lambda row: f"{row['gmacs']:.3f}" if "gmacs" in row else ""),
    ("images/s [quartiles]", lambda row: "{median:.1f} [{q25:.1f}, {q75:.1f}]".format_map(row["images_per_s"])),
    ("x native", lambda row: _ratio_text(row["ratio_native"])),
    ("of ideal", lambda row: _ratio_text(row["ratio_ideal"])),
    ("x eager native", lambda row: _ratio_text(row["ratio_eager_native"])),
    ("of eager ideal", lambda row: _ratio_text(row["ratio_eager_ideal"])),
    ("peak MiB", lambda row: "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f}"),
)


def _ratio_text(value: dict[str, float] | None) -> str:
    return "" if value is None else "{median:.3f} [{q25:.3f}, {q75:.3f}]".format_map(value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as markdown, which is readable as text too."""
    cells = [[title, *(text(row) for row in rows)] for title, text in COLUMNS]
    cells = [column for column in cells if any(column[1:])]
    widths = [max(map(len, column)) for column in cells]
    cells = [[column[0], "-" * width, *column[1:]] for column, width in zip(cells, widths, strict=True)]
    lines = zip(
        *([cell.ljust(width) for cell in column] for column, width in zip(cells, widths, strict=True)), strict=True
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def overheads(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For every profiled merging model what its operators take beyond those of its ideal."""
    timed = {(_setting_text(row), row["mode"], row["name"]): row for row in rows if "operators" in row}
    texts = []
    for (setting, mode, name), row in timed.items():
        ideal = timed.get((setting, mode, f"ideal of {name}"))
        if ideal:
            title = f"{setting}, {mode}: {name}"
            texts.append(title + "\n\n" + overhead_table(row["operators"], ideal["operators"]))
    return texts


def plot_speed(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """images/s of every contestant, a panel for each setting."""
    plt = _pyplot()
    groups = [list(group) for _, group in itertools.groupby(rows, _setting_text)]  # rows of a setting follow each other
    heights = [0.9 + 0.28 * len(group) for group in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(8, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, group in zip(axes[:, 0], groups, strict=True):
        speeds = [row["images_per_s"] for row in group]
        middle = [speed["median"] for speed in speeds]
        spread = [[s["median"] - s["q25"] for s in speeds], [s["q75"] - s["median"] for s in speeds]]
        colours = [_colour(row["name"]) for row in group]
        names = [row["name"] + ("" if row["mode"] == "eager" else f", {row['mode']}") for row in group]
        axis.barh(names, middle, xerr=spread, color=colours, error_kw={"linewidth": 1})
        axis.invert_yaxis()
        axis.set_title(_setting_text(group[0]), fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("images/s, median and quartiles")
    _save(figure, file)


def _colour(name: str) -> str:
    return "0.45" if name == "native" else "0.8" if name.startswith("ideal") else COLOURS[0]


def plot_pareto(rows: Sequence[dict[str, Any]], places: Sequence[str], file: Path) -> None:
    """Accuracies of result.json files over the speeds of this run, in multiples of native.

    Raises:
        UserError: no row of the files was timed here.
    """
    points = match_accuracies(rows, places)
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 4.5))
    front = pareto([(x, y) for _, _, x, y in points], smaller_x=False)
    axis.plot(*zip(*front, strict=True), color="0.75", linewidth=5, zorder=1, label="Pareto front")
    for i, group in enumerate(dict.fromkeys(point[0] for point in points)):
        mine = sorted((x, y, label) for name, label, x, y in points if name == group)
        axis.plot([p[0] for p in mine], [p[1] for p in mine], "o-", color=COLOURS[i % len(COLOURS)], label=group)
        for x, y, label in mine:
            axis.annotate(label, (x, y), (0, 7), textcoords="offset points", fontsize=7, ha="center")
    axis.set_xlabel("speed, in multiples of timm's dense model")
    axis.set_ylabel("top-1 accuracy (%)")
    axis.legend(fontsize=8, frameon=False)
    axis.grid(alpha=0.25)
    _save(figure, file)


def match_accuracies(rows: Sequence[dict[str, Any]], places: Sequence[str]) -> list[tuple[str, str, float, float]]:
    """(group, label, speed in multiples of native, accuracy) where the same model merges the same way."""
    timed: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if row["ratio_native"] and "tokens" in row and not row["name"].startswith("ideal") and row["phase"] != "train":
            timed.setdefault(merges_as(row["model"], row["merge"], row["tokens"]), []).append(row)
    points, absent = [], []
    for accuracy in collect(places):
        values = accuracy.values
        matches = timed.get(merges_as(accuracy.model, accuracy.merge, values["tokens"]), [])
        if not matches:
            absent.append(f"{accuracy.label} r={values['r']}")
        for row in matches:
            group = f"{accuracy.label}, {row['method']}, {_setting_text(row)}, {row['mode']}"
            points.append((group, f"r={row['r']}", row["ratio_native"]["median"], float(values["acc1"])))
    if not points:
        raise UserError(UNTIMED)
    for name in absent:
        log(f"note: {name} was not timed in this run; it is left out of the plot")
    return points


def merges_as(model: str, merge: Mapping[str, Any], tokens: Sequence[int]) -> tuple[Any, ...]:
    """What an accuracy and a speed must have in common: the model, tokens after every block and all but r of `merge`.

    Where nothing merges the method does not matter.
    """
    dense = len(set(tokens)) == 1
    rest = None if dense else json.dumps({k: v for k, v in merge.items() if k != "r"}, sort_keys=True)
    return model, tuple(tokens), rest


def _setting_text(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['phase']}, {row['dtype']}, batch {row['batch_size']}, {row['device']}"


def _pyplot() -> Any:
    import matplotlib  # half a second that a table does not need

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    _pyplot().close(figure)


# The command line


def settings(own: Namespace) -> list[Setting]:
    """Every combination that was asked for."""
    combinations = itertools.product(own.device, own.models, own.phases, own.dtypes, own.batch_sizes)
    return [
        Setting(model, phase, dtype, batch, own.img_size or data_settings(model)["input_size"], device)
        for device, model, phase, dtype, batch in combinations
    ]


def check(own: Namespace) -> None:
    """Mistakes before minutes of timing.

    Raises:
        UserError: unknown names, numbers out of range, options that do nothing or contradict.
    """
    for method in own.methods:
        if method not in METHODS:
            raise UserError(nearest(method, METHODS, "--methods"))
    if min(own.batch_sizes) < 1 or own.rounds < 3 or min(own.num_registers) < 0 or (own.threads or 1) < 1:
        raise UserError("--batch_sizes and --threads must be at least 1, --rounds 3, --num_registers 0")
    if own.results and (not own.output_dir or own.no_native):
        raise UserError("--results is drawn over speed-ups against native: it needs --output_dir, and no --no_native")
    for device in own.device:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise UserError(f"--device is cpu, cuda or cuda:INDEX, not {device!r}")
        if device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"--device {device}: this machine has no GPU that torch can use")
    if "cudagraphs" in own.modes and "cpu" in own.device:
        raise UserError("--modes cudagraphs is for a GPU: it needs --device cuda alone")
    if own.clock == "cpu" and (own.threads != 1 or own.device != ["cpu"] or "end_to_end" in own.phases):
        raise UserError("--clock cpu counts what one thread works: it needs --device cpu --threads 1, no end_to_end")
    if own.dataset and "end_to_end" not in own.phases:
        raise UserError("--dataset has no effect without --phases end_to_end")
    if "end_to_end" in own.phases and not own.dataset:
        raise UserError("--phases end_to_end reads images; name them with --dataset (and --data_path)")
    for name in own.models:
        check_name(name)
    planned = set()
    for setting in {(setting.model, setting.img_size) for setting in settings(own)}:
        found = contestants(native_model(setting[0], img_size=setting[1]), own)
        about = [one.describe for one in found if "tokens" in one.describe]
        planned |= {merges_as(setting[0], one["merge"], one["tokens"]) for one in about}
    if own.results and not planned & {
        merges_as(row.model, row.merge, row.values["tokens"]) for row in collect(own.results)
    }:
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
    add("--methods", nargs="+", default=["tome", "mctf", "mctf_fast"], help=", ".join(METHODS))
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
    add("--modes", nargs="+", choices=tuple(MODES), default=["eager"], help=", ".join(MODES))
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


def run(own: Namespace) -> None:
    """Measure every setting, print its rows as they come, and save all."""
    check(own)
    if own.threads:
        torch.set_num_threads(own.threads)
    folder = setup_output(own.output_dir, True)
    rows: list[dict[str, Any]] = []
    for setting in settings(own):
        measured = measure(setting, own)
        log(table(measured) + "\n")
        for text in overheads(measured):
            log(text + "\n")
        rows += measured
    if folder is None:
        return
    device = " and ".join(device_name(torch.device(name)) for name in own.device)
    options = {key: value for key, value in vars(own).items() if not callable(value)}
    result = {"device": device, "versions": versions(), "git": git_revision(), "options": options, "rows": rows}
    write_json(folder / "benchmark.json", json.loads(json.dumps(result, default=str)))
    head = f"{device}, torch {torch.__version__}, {own.rounds} rounds, {own.clock} clock"
    (folder / "benchmark.txt").write_text("\n\n".join([head, table(rows), *overheads(rows)]) + "\n")
    plot_speed(rows, folder / "speed.png")
    if own.results:
        plot_pareto(rows, own.results, folder / "pareto.png")
    log(f"wrote {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    try:
        run(build_parser().parse(list(sys.argv[1:] if argv is None else argv)))
        return 0
    except UserError as error:
        print(f"benchmark.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
