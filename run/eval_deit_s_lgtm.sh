#!/usr/bin/env bash
# Evaluate DeiT-S with DFE and LGTM (arXiv 2303.02331), off the shelf: two dense blocks, then r=16 within windows and,
# from block 7 on, r=16 over the whole image too. The authors' code was never published: this is our reading of it.
#
# Expected top-1 on ImageNet: 78.6 % at 2.5 GMACs off the shelf (a figure of the paper; its r is not known). 2.70
# GMACs, as many as ToMe with r=13. Unmerged: 79.8 % at 4.60 GMACs (README of DeiT).
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_small \
  --merge lgtm --r 16 --dense_layers 2 \
  -- "$@"
