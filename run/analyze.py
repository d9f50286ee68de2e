"""See what registers and merging do to a Vision Transformer.

python run/analyze.py norms --model deit_tiny --data photos --limit 200 --out norms
python run/analyze.py norms --models deit3_small:a.pth deit3_small:b.pth,registers=4 --data photos --out both
python run/analyze.py attention --model deit_small --r 16 --data photos --out attention
python run/analyze.py similarity --model deit_small --dataset IMAGENETTE --data_path imagenette --out similarity
python run/analyze.py pca --models deit_small deit_small,r=16 --data photos --out pca
python run/analyze.py changes --model deit_small --dataset IMNET --data_path imagenet --r_values 8 16 --out changes
python run/analyze.py lost --model deit_small --voc VOCdevkit --year 2007 --out lost
python run/analyze.py training --run output/run --out training

Every command writes figures, npz and json into --out; docs/analysis.md says what they mean.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import interrupts  # noqa: F401  # isort: skip  # first: Ctrl-C while the rest is imported

from analysis.commands import COMMANDS
from options import Parser, exit_status, normalise_flag


def build_parser() -> Parser:
    """Make the parser with its sub-commands, which the instruments add."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="analyze.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def analyze(argv: Sequence[str]) -> None:
    """Run one command line. Words that the command's parser does not know are taken for flags of main.py."""
    args, main_argv = build_parser().parse_known_args([normalise_flag(token) for token in argv])
    args.run(args, main_argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit status."""
    return exit_status("analyze.py", analyze, argv)


if __name__ == "__main__":
    sys.exit(main())
