#!/usr/bin/env bash
# Evaluate DeiT-T with MCTF (arXiv 2403.10030): r=16 in blocks 1 to 11.
#
# Expected top-1 on ImageNet: 72.7 % with the authors' finetuned weights, given by CKPT (README of MCTF). Off the
# shelf none is published. 0.70 GMACs. Unmerged: 72.2 % at 1.25 GMACs (README of DeiT).
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_tiny \
  --merge mctf --r 16 \
  --activate_layer 1,2,3,4,5,6,7,8,9,10,11 \
  -- "$@"
