#!/usr/bin/env bash
# Evaluate DeiT-T with RegToMe: 4 registers (arXiv 2309.16588) and ToMe (arXiv 2210.09461), r=16 in every block.
#
# CKPT=output/finetune_deit_t_regtome/best.pth gives trained weights. Without it the registers are fresh and random.
#
# Expected top-1 on ImageNet: not measured yet. The nearest published: 70.7 % for ToMe r=16 trained from scratch,
# without registers (Papers with Code). 0.65 GMACs. Unmerged: 72.2 % at 1.25 GMACs (README of DeiT).
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_tiny \
  --merge tome --r 16 --num_registers 4 \
  -- "$@"
