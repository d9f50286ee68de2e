#!/usr/bin/env bash
# Evaluate DeiT-S with ToMe (arXiv 2210.09461), r=13 in every block, off the shelf: nothing is trained.
#
# Expected top-1 on ImageNet: 78.8 % off the shelf (78.83: ToMe issue #11; 78.79: README of ToMeCIS). 2.70 GMACs.
# Unmerged: 79.8 % at 4.60 GMACs (README of DeiT). For a curve, add --r_evals 0 8 13 16.
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_small \
  --merge tome --r 13 \
  -- "$@"
