#!/usr/bin/env bash
# Evaluate DeiT-T with DFE and LGTM (arXiv 2303.02331), off the shelf: two dense blocks, then r=16 within windows and,
# from block 7 on, r=16 over the whole image too. The authors' code was never published: this is our reading of it.
#
# Expected top-1 on ImageNet: none published. 0.74 GMACs, as many as ToMe with r=13. Unmerged: 72.2 % at 1.25 GMACs
# (README of DeiT).
. "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
evaluate --model deit_tiny \
  --merge lgtm --r 16 --dense_layers 2 \
  -- "$@"
