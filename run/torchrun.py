"""torchrun that leaves the options of the script that it starts alone, and whose last lines say why a run ended.

    torchrun --nproc_per_node=8 main.py --model deit_small --r 16 --num_registers 4

It is torch's own but for two things. Up to Python 3.12.6 argparse looks for abbreviations in the whole command line,
also behind the script's name, and refuses main.py's --r because it could be short for --role, --redirects, --rdzv-id
and others of torchrun's options. Here options are written out, so that --r is none of torchrun's. And where torch's
ends with a traceback of its own, this one names the rank that ended first, its node, the signal and what it probably
means, the checkpoint that is left, and the command to go on with.

setup.py installs this file as the command `torchrun` of environments with such a Python. It imports nothing of the
project, and works from any folder.
"""

import os
import shlex
import signal
import socket
import sys
from argparse import Namespace

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.run import get_args_parser, run

CAUSES = {
    "SIGKILL": "most likely because memory ran out: lower --batch_size or --num_workers",
    "SIGBUS": "most likely because shared memory is full: lower --num_workers",
    "SIGSEGV": "a fault of a library or of the machine",
    "SIGABRT": "a fault of a library, which says more above",
}
RESUMABLE = 75  # main.py's status after a stop that it saved


def describe(failures: dict[int, ProcessFailure], args: Namespace) -> str:
    """Say which rank ended first and why, and how to go on."""
    # those that the launcher ended itself, by SIGTERM, are not the cause; a killed one is, before those it left alone
    rank = min(failures, key=lambda r: (failures[r].exitcode == -signal.SIGTERM, failures[r].exitcode > 0, r))
    code, script = failures[rank].exitcode, os.path.basename(args.training_script)
    where = f"rank {rank} on {socket.gethostname()} (process {failures[rank].pid})"
    if code == RESUMABLE:
        lines = [f"{script} was stopped and has saved"]
    elif code < 0:
        name = signal.Signals(-code).name
        lines = [f"{script} failed: {where} was killed by {name}" + (f", {CAUSES[name]}" if name in CAUSES else "")]
    else:
        lines = [f"{script} failed: {where} ended with status {code}; its error is above"]
    lines += ways_on(args) if code != 2 else []  # 2: a mistake in the command line
    return "\n".join(f"torchrun: {line}" for line in lines)


def ways_on(args: Namespace) -> list[str]:
    """Name the checkpoint that is left, and the command to go on with."""
    checkpoint = os.path.join(os.path.expanduser(_value(args.training_script_args, "output_dir")), "checkpoint.pth")
    if not os.path.isfile(checkpoint):
        return []
    again = [] if _value(args.training_script_args, "resume") == "auto" else ["--resume", "auto"]
    again = [word for word in sys.argv[1:] if word != "--overwrite"] + again
    return [f"last good checkpoint: {checkpoint}", f"go on with: torchrun {shlex.join(again)}"]


def _value(words: list[str], flag: str) -> str:
    """Return the value of a flag in a script's arguments, the last one given; "" without one."""
    found = ""
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if before.replace("-", "_") == f"__{flag}":
            found = word
        elif equals and name.replace("-", "_") == f"__{flag}":
            found = value
    return found


@record  # as torch's main: an error of the launcher itself goes where torchrun's errors go
def main() -> None:
    parser = get_args_parser()
    parser.allow_abbrev = False
    args = parser.parse_args()
    if ":" in args.nnodes:
        # nodes that share their rendezvous' store keep the address of the first round, for which one that joins later
        # waits in vain; otherwise every round makes a store of its own
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run(args)
    except ChildFailedError as error:
        print(describe(error.failures, args), file=sys.stderr, flush=True)
        codes = {failure.exitcode for failure in error.failures.values()} - {-signal.SIGTERM}
        sys.exit(codes.pop() if len(codes) == 1 and min(codes, default=0) > 0 else 1)
    except SignalException as error:
        lines = [f"stopped by {error.sigval.name}", *ways_on(args)]
        print("\n".join(f"torchrun: {line}" for line in lines), file=sys.stderr, flush=True)
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
