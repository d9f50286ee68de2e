#!/usr/bin/env bash
# Evaluate DeiT-S with RegToMe: 4 registers (arXiv 2309.16588) and ToMe (arXiv 2210.09461), r=16 in every block.
#
# CKPT=output/finetune_deit_s_regtome/best.pth gives trained weights. Without it the registers are fresh and random.
#
# Expected top-1 on ImageNet: not measured yet. The nearest published: 79.1 % for ToMe r=16 trained from scratch,
# without registers (Papers with Code). 2.38 GMACs. Unmerged: 79.8 % at 4.60 GMACs (README of DeiT).
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_small \
  --merge tome --r 16 --num_registers 4 \
  -- "$@"
