"""Finetune and evaluate Vision Transformers with register tokens and token merging.

torchrun --nproc_per_node=8 -- main.py --model deit_small --r 16 --num_registers 4
python main.py --eval --model deit_tiny --merge tome --r_evals 0 8 16 --data_path data/IMNET
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from build import device_name, prepare
from datasets import (
    bad_image_limit,
    build_eval_loader,
)
from distributed import Distributed, barrier, init_distributed
from engine import (
    BadImages,
    Precision,
    Scores,
    evaluate,
    throughput,
)
from models import MergingViT
from models.gmacs import gmacs
from models.registry import native_model
from models.schedule import format_schedule, parse_schedule
from options import exit_status, parse_args
from trainer import run_training
from utils import (
    compile_model,
    git_revision,
    log,
    to_plain,
    versions,
    write_json,
)

# Building


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


# Training


def run(argv: Sequence[str]) -> int:
    """Train, or evaluate with --eval."""
    args = parse_args(argv)
    dist = init_distributed(args.device)
    return run_eval(args, dist) if args.eval else run_training(args, dist)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0 done, 1 stopped by an error of the run, 2 the user's mistake,
    75 stopped by a signal and resumable, 130 interrupted."""
    return exit_status("main.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
