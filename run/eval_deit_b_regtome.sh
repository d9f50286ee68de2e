#!/usr/bin/env bash
# Evaluate DeiT-B with RegToMe: 4 registers (arXiv 2309.16588) and ToMe (arXiv 2210.09461), r=16 in every block.
#
# CKPT=output/finetune_deit_b_regtome/best.pth gives trained weights. Without it the registers are fresh and random.
#
# Expected top-1 on ImageNet: not measured yet. The nearest published: 81.5 % for DiffRate at 11.5 GMACs, without
# registers (README of DiffRate). 9.13 GMACs. Unmerged: 81.8 % at 17.56 GMACs (README of DeiT).
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_base \
  --merge tome --r 16 --num_registers 4 \
  -- "$@"
