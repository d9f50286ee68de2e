#!/usr/bin/env bash
# Evaluate DeiT-T with MCTF-Fast (arXiv 2403.10030): 35 % in blocks 3, 6 and 9.
#
# Expected top-1 on ImageNet: 72.7 % with the authors' finetuned weights, given by CKPT (README of MCTF). Off the
# shelf none is published. 0.75 GMACs. Unmerged: 72.2 % at 1.25 GMACs (README of DeiT).
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_tiny \
  --merge mctf --r 0.35 \
  --activate_layer 3,6,9 \
  -- "$@"
