"""main.py whose deit_digits has one block of 16 channels: updates of a few milliseconds, for kill_test.py's long run.

torchrun --nproc_per_node=2 run/tiny_training.py --dataset DIGITS --input_size 8 ...
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: the project's modules lie one folder up
    sys.path.insert(0, str(ROOT))

from main import main
from models.registry import OWN_SIZES

OWN_SIZES["deit_digits"] |= {"img_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}

if __name__ == "__main__":
    sys.exit(main())
