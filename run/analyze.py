"""See what registers and merging do to a Vision Transformer.

python run/analyze.py norms --model deit_tiny --data photos --limit 200 --out norms
python run/analyze.py norms --models deit3_small:a.pth deit3_small:b.pth,registers=4 --data photos --out both
python run/analyze.py attention --model deit_small --r 16 --data photos --out attention
python run/analyze.py similarity --model deit_small --dataset IMAGENETTE --data_path imagenette --out similarity
python run/analyze.py lost --model deit_small --voc VOCdevkit --year 2007 --out lost

Every command writes PNG, npz and json into --out.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed import close_distributed
from models import UserError
from options import Parser, normalise_flag
from utils import RunError

INSTRUMENTS = (
    *("attention", "dynamics_command", "lost_command", "norms", "probes_command", "report", "similarity", "ttr"),
)


def build_parser() -> Parser:
    """One sub-command per instrument: each of `INSTRUMENTS` adds its own by `add_parser(subparsers)`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="analyze.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name in INSTRUMENTS:
        importlib.import_module(f"analysis.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, 1 a run that cannot go on, 2 the user's mistake."""
    try:
        tokens = [normalise_flag(token) for token in (sys.argv[1:] if argv is None else argv)]
        own, rest = build_parser().parse_known_args(tokens)
        own.run(own, rest)
        return 0
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
    print(f"analyze.py: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
