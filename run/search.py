"""Search schedules for several budgets: the tokens that each block merges, so that little is lost at a given cost.

python run/search.py --model deit_tiny --merge mctf --gmacs 0.62 0.7 80% --data_path data/IMNET --out searched
python run/search.py --resume out/best.pth --speedup 1.5 2 --calibration_path photos/ --batch_size 32 --out searched

No labels and no training: every schedule is compared with the unmerged model on a few hundred images. --out gets a file
for each budget, which --r of main.py and of the scripts reads, and a figure: tokens per block, what a block loses for
what it saves, and the Pareto front of all that was measured. All other options are main.py's (model, weights, merging
without --r, data, --calibration_path, --calibration_images, --seed).
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

from build import load_for_inference
from calibration import Result, goals_of, load_calibration, search_schedules, verify, write_result
from distributed import init_distributed
from engine import build_precision
from models import UserError
from options import Number, Parser, check_heeded, exit_status, flags_of, gmacs_budget, parse_args
from utils import is_main_process, log, setup_output, table

HEEDED = frozenset(
    "resume dataset data_path val_path input_size eval_crop_ratio batch_size limit amp calibration_path".split()
) | {"calibration_images", "num_workers", "pin_mem"}


def build_parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="search.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    text = "budgets in GMACs per image, or per cent of the dense model's"
    parser.add_argument("--gmacs", nargs="+", type=gmacs_budget, default=[], metavar="G", help=text)
    text = "budgets in times the speed of timm's dense model at --batch_size"
    parser.add_argument(
        "--speedup", nargs="+", type=Number(float, 1, low_excluded=True), default=[], metavar="X", help=text
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the schedule files and the figure")
    return parser


def search(args: Namespace, main_argv: Sequence[str]) -> Result:
    """Search a schedule for every budget."""
    if not args.gmacs and not args.speedup:
        raise UserError("name a budget: --gmacs 0.7, --gmacs 55% or --speedup 1.8")
    check_heeded(main_argv, flags_of("general", "model", "merging") | HEEDED, "a search")
    budget = ["--gmacs", args.gmacs[0]] if args.gmacs else ["--speedup", str(args.speedup[0])]
    main_args = parse_args([*main_argv, *budget, "--eval"])
    dist = init_distributed(main_args.device)
    loaded = load_for_inference(main_args, dist.device)
    precision = build_precision(main_args, dist.device)
    goals = goals_of(args.gmacs, args.speedup, main_args, loaded.model, loaded.name, precision)
    calibration = load_calibration(main_args, None, loaded.config, dist)
    result = search_schedules(goals, loaded.model, calibration, loaded.name, main_args.seed)
    return verify(result, loaded.name, main_args.batch_size, precision) if dist.is_main else result


def file_names(result: Result) -> list[str]:
    """Name a file for each budget after method and budget: schedule-tome-gmacs-0.7."""
    method = result.divergence.model.merge.method
    return [f"schedule-{method}-{goal.flag.removeprefix('--').replace(' ', '-')}" for goal in result.goals]


def result_table(result: Result) -> str:
    """The schedules as a markdown table."""
    rows = []
    for record in result.records():
        speed = record["speedup"]
        texts = [f"{record['gmacs']:.3f}", f"{record['loss']:.4f}", f"{record['agree']:.2f}"]
        texts += ["", ""] if speed is None else [f"{speed['predicted']:.2f}", f"{speed['measured']:.2f}"]
        rows.append([record["asked"], ",".join(map(str, record["r"])), *texts])
    headers = ("budget", "r", "GMACs", result.about["loss_of"], "agree %", "speed-up predicted", "measured")
    return table(headers, rows, left=2)


def run(argv: Sequence[str]) -> None:
    """Search, print and write."""
    args, main_argv = build_parser().parse_known_args(argv)
    folder = setup_output(args.out, is_main_process())
    result = search(args, main_argv)
    log(result_table(result))
    if folder is not None and is_main_process():
        for file in write_result(result, folder, file_names(result)):
            log(f"wrote {file}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, or 2 after the user's mistake."""
    return exit_status("search.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
