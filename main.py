"""Train, or evaluate with --eval: main.py parses its command line, calls one of both, and returns an exit status.

The flags are in options.py, what is built from them in build.py, a training run in trainer.py, its loops in engine.py.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

import torch
from torch import nn

from build import data_record, device_name, prepare
from calibration import write_result
from datasets import bad_image_limit, build_eval_loader
from distributed import Distributed, barrier, init_distributed
from engine import Precision, RunControl, Scores, UnreadableImages, evaluate, throughput
from models import MergingViT
from models.gmacs import gmacs
from models.registry import native_model
from models.schedule import TokenPlan, format_schedule, parse_schedule
from options import exit_status, parse_args
from trainer import run_training
from utils import (
    StopSignal,
    compile_model,
    die_with_launcher,
    git_revision,
    log,
    setup_output,
    to_jsonable,
    versions,
    write_json,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Returns:
        The exit status: 0 done, 1 stopped by an error of the run, 2 the user's mistake, 75 stopped by a signal and
        resumable, 130 interrupted.
    """
    return exit_status("main.py", run, argv)


def run(argv: Sequence[str]) -> int:
    """Train, or evaluate with --eval."""
    args = parse_args(argv)
    dist = init_distributed(args.device)
    return run_eval(args, dist) if args.eval else run_training(args, dist)


def run_eval(args: Namespace, dist: Distributed) -> int:
    """Evaluate every schedule of --r_evals in one pass over the data, and write result.json."""
    folder = setup_output(args.output_dir, dist.is_main)
    data, weights, model, _, precision, searched = prepare(args, dist)
    schedules = [parse_schedule(r) for r in args.r_evals or [model.merge.r]]
    plans = [model.plan(r) for r in schedules]  # a schedule that does not fit is told before the pass over the data
    forward: nn.Module = compile_model(model) if args.compile else model
    loader = build_eval_loader(args, data.val, dist.rank, dist.world)
    control = RunControl(unreadable=UnreadableImages(bad_image_limit(args, data)), log_every=args.log_every)
    scores = evaluate(forward, loader, schedules, precision, dist, agreement=args.agreement, control=control)
    assert scores is not None  # None is for a stop signal, which an evaluation does not listen to
    rows = [result_row(model, *row) for row in zip(schedules, plans, scores, strict=True)]
    if args.throughput:
        add_throughput(rows, schedules, args, weights.name, model, forward, precision)
    for row in rows:
        log("  ".join(row_texts(row)))
    result = {
        "model": weights.name,
        "weights": weights.source,
        "dataset": data.name,
        "data": data_record(data),
        "num_registers": model.num_registers,
        "merge": model.merge.as_dict(),
        "n_images": scores[0].n_images,
        "device": device_name(dist.device),
        "versions": versions(),
        "git": git_revision(),
        "args": to_jsonable(args),
        "rows": rows,
    }
    if folder is not None and dist.is_main:  # args.json is the record of the training run that may lie there
        write_json(folder / "result.json", result)
        log(f"wrote {folder / 'result.json'}")
        if searched is not None:
            write_result(searched, folder)
    barrier()
    return 0


def result_row(model: MergingViT, r: Any, plan: TokenPlan, score: Scores) -> dict[str, Any]:
    """Return one schedule's row of result.json."""
    row = {
        "r": format_schedule(r),
        "schedule": list(plan.merges),
        "tokens": list(plan.counts),
        "gmacs": round(gmacs(model, plan), 4),
        "params": sum(p.numel() for p in model.parameters()),
        "acc1": score.acc1,
        "acc5": score.acc5,
        "loss": score.loss,
    }
    return row if score.agree is None else {**row, "agree": score.agree, "kl": score.kl}


def row_texts(row: dict[str, Any]) -> list[str]:
    """Format a row of result.json for people."""
    texts = [f"r={row['r']}", f"acc1 {row['acc1']:.3f}", f"acc5 {row['acc5']:.3f}", f"loss {row['loss']:.4f}"]
    texts += [f"gmacs {row['gmacs']:.3f}", f"tokens left {row['tokens'][-1]}"]
    if "agree" in row:
        texts += [f"agree {row['agree']:.2f}", f"kl {row['kl']:.4f}"]
    if "images_per_s" in row:
        texts += [f"{row['images_per_s']['median']:.1f} images/s", f"{row['speedup']:.2f}x native"]
    return texts


def add_throughput(
    rows: list[dict[str, Any]],
    schedules: Sequence[Any],
    args: Namespace,
    name: str,
    model: MergingViT,
    forward: nn.Module,
    precision: Precision,
) -> None:
    """Add images/s of every row and of timm's dense model, measured in interleaved rounds on random images."""
    device, size = next(model.parameters()).device, model.patch_embed.img_size
    native = native_model(name, num_classes=model.num_classes, img_size=size[0]).to(device).eval()
    images = torch.randn(args.batch_size, 3, *size, device=device)
    forwards: dict[str, Callable[[torch.Tensor], Any]] = {"native": compile_model(native) if args.compile else native}
    forwards |= {f"row {i}": partial(forward.eval(), r=r) for i, r in enumerate(schedules)}
    speeds = throughput(forwards, images, precision)
    for i, row in enumerate(rows):
        speed = speeds[f"row {i}"]
        row["images_per_s"] = speed
        row["native_images_per_s"] = speeds["native"]
        row["batch_size"] = args.batch_size
        row["speedup"] = speed["median"] / speeds["native"]["median"]


if __name__ == "__main__":
    StopSignal.ends_process = True
    die_with_launcher()
    sys.exit(main())
