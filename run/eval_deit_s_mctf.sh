#!/usr/bin/env bash
# Evaluate DeiT-S with MCTF (arXiv 2403.10030): r=16 in blocks 1 to 11.
#
# Expected top-1 on ImageNet: 80.1 % with the authors' finetuned weights, given by CKPT (README of MCTF). Off the
# shelf 79.2 % (the paper, by notes of readers). 2.59 GMACs. Unmerged: 79.8 % at 4.60 GMACs (README of DeiT).
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_small \
  --merge mctf --r 16 \
  --activate_layer 1,2,3,4,5,6,7,8,9,10,11 \
  -- "$@"
