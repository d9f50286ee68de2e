"""torchrun that leaves the options of the script that it starts alone.

    torchrun --nproc_per_node=8 main.py --model deit_small --r 16 --num_registers 4

It is torch's own but for one thing. Up to Python 3.12.6 argparse looks for abbreviations in the whole command line,
also behind the script's name, and refuses main.py's --r because it could be short for --role, --redirects, --rdzv-id
and others of torchrun's options. Here options are written out, so that --r is none of torchrun's.

setup.py installs this file as the command `torchrun` of environments with such a Python. It imports nothing of the
project, and works from any folder.
"""

from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.run import get_args_parser, run


@record  # as torch's main: an error of the launcher itself goes where torchrun's errors go
def main() -> None:
    parser = get_args_parser()
    parser.allow_abbrev = False
    run(parser.parse_args())


if __name__ == "__main__":
    main()
