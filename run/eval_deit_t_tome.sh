#!/usr/bin/env bash
# Evaluate DeiT-T with ToMe (arXiv 2210.09461), r=13 in every block, off the shelf: nothing is trained.
#
# Expected top-1 on ImageNet: none published off the shelf; a variant, ToMeCIS, states 70.59 %, and ToMe trained from
# scratch 71.27 % (README of ToMe). 0.73 GMACs. Unmerged: 72.2 % at 1.25 GMACs (README of DeiT). For a curve, add
# --r_evals 0 8 13 16.
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_tiny \
  --merge tome --r 13 \
  -- "$@"
