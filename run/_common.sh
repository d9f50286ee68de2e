# shellcheck shell=bash
# Sourced by eval_*.sh and finetune_*.sh:
#     evaluate MAIN_OPTION... -- "$@"
#     finetune MAIN_OPTION... -- "$@"
# REGTOME_ECHO=1 prints the command in place of running it, and needs no data.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
NAME=$(basename "$0" .sh)

evaluate() { launch val --eval "$@"; }

finetune() { launch "train val" "$@"; }

launch() { # SPLITS MAIN_OPTION... -- [DATA] [MAIN_OPTION...]
  local splits=$1 options=() data=${DATA:-data/IMNET}
  shift
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  case "${1:-}" in
    -h | --help) usage && exit ;;
    "" | -*) ;;
    *) data=$1 && shift ;;
  esac
  [ -n "${REGTOME_ECHO:-}" ] || check_data "$data" "$splits"
  find_python
  count_gpus
  if [ "$splits" != val ]; then
    # the recipes' global batch is 8 GPUs x 128: with fewer GPUs, gradients are accumulated to it
    options+=(--batch_size 128 --accumulation_steps $(((8 + NGPUS - 1) / NGPUS)))
  fi
  if [ -n "${CKPT:-}" ]; then options+=(--finetune "$CKPT"); fi
  run_main --data_path "$data" --output_dir "output/$NAME" "${options[@]}" "$@"
}

usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  cat <<EOF

usage: bash $0 [DATA] [options of main.py]
  DATA         folder with val/CLASS/* (and train/CLASS/* for finetuning); default: \$DATA, or else data/IMNET
  CKPT=FILE    weights to evaluate or to start from (.pth, .safetensors or URL) in place of timm's
  NGPUS=N      processes; default: as many as there are GPUs, or else 1
  PYTHON=EXE   interpreter; default: .venv/bin/python of this folder, or else python3
Results go to output/$NAME. An option given here wins over the script's.
EOF
}

fail() {
  printf '%s.sh: error: %s\n' "$NAME" "$1" >&2
  exit 2
}

check_data() { # FOLDER SPLITS
  local split
  for split in $2; do
    [ -d "$1/$split" ] ||
      fail "no folder $1/$split (ImageNet's: $1/$split/n01440764/*.JPEG, ...); usage: bash $0 DATA [options of main.py]"
  done
}

find_python() {
  if [ -z "${PYTHON:-}" ] && [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; fi
  PYTHON=${PYTHON:-python3}
}

count_gpus() {
  if [ -z "${NGPUS:-}" ]; then
    NGPUS=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))' 2>/dev/null) ||
      fail "$PYTHON has no torch; name an interpreter that has requirements.txt: PYTHON=EXE"
  fi
  [[ $NGPUS =~ ^[1-9][0-9]*$ ]] || fail "NGPUS must be a number of processes, not '$NGPUS'"
}

run_main() {
  local command=("$PYTHON")
  if [ "$NGPUS" -gt 1 ]; then command+=("$ROOT/run/torchrun.py" --standalone --nproc_per_node="$NGPUS"); fi
  command+=("$ROOT/main.py" "$@")
  if [ -n "${REGTOME_ECHO:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
  else
    exec "${command[@]}"
  fi
}
