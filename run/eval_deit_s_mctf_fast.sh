#!/usr/bin/env bash
# Evaluate DeiT-S with MCTF-Fast (arXiv 2403.10030): 35 % in blocks 3, 6 and 9.
#
# Expected top-1 on ImageNet: 80.1 % with the authors' finetuned weights, given by CKPT (README of MCTF). Off the
# shelf none is published. 2.76 GMACs. Unmerged: 79.8 % at 4.60 GMACs (README of DeiT).
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_small \
  --merge mctf --r 0.35 \
  --activate_layer 3,6,9 \
  -- "$@"
