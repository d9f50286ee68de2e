#!/usr/bin/env bash
# The whole job on the digits of scikit-learn, in a few minutes on two CPU cores; no files and no network but for the
# installation. Trains a small dense ViT, merges its tokens as it is, finetunes it with merging and registers in two
# processes, and compares accuracy, GMACs and images/s.
#
#     bash run/quickstart.sh
#
# Everything it makes is in output/quickstart, which it empties first. REGTOME_VENV=FOLDER uses that environment.
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
esac
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
cd "$ROOT"

OUT=output/quickstart
R=9 # of 64 patches, six times
export OMP_NUM_THREADS=1 # for a model this small more threads only wait for each other

step() { # TITLE COMMAND...
  printf '\n== %s (after %d s)\n' "$1" "$SECONDS"
  "${@:2}" || die "\"$1\" failed with status $?; what it said is above"
}

digits() { "$PYTHON" main.py --dataset DIGITS --model deit_digits --device cpu --log_every 90 "$@"; }

digits_in_two_processes() {
  torchrun --standalone --nproc_per_node=2 main.py --dataset DIGITS --model deit_digits --device cpu --log_every 90 "$@"
}

SECONDS=0
rm -rf "$OUT"
step "train a dense model" digits --epochs 10 --output_dir $OUT/dense
step "merge its tokens as it is" digits --eval --finetune $OUT/dense/best.pth --merge tome --r_evals 0 6 $R \
  --agreement --throughput --batch_size 64 --output_dir $OUT/as_is
step "finetune with merging and 4 registers, in two processes" digits_in_two_processes \
  --finetune $OUT/dense/best.pth --r $R --num_registers 4 --epochs 5 --warmup_epochs 0 --lr_times 0.5 --output_dir $OUT/finetuned
step "evaluate the finetuned model" digits --eval --resume $OUT/finetuned/best.pth --r_evals 6 $R \
  --throughput --batch_size 64 --output_dir $OUT/finetuned
step "draw merged tokens" "$PYTHON" run/visualize.py merged --model deit_digits --finetune $OUT/finetuned/best.pth \
  --dataset DIGITS --device cpu --out $OUT/merged_tokens.png
step "compare" "$PYTHON" run/results.py "dense weights as is=$OUT/as_is" "finetuned=$OUT/finetuned" \
  --plot $OUT/accuracy_speed.png

cat <<EOF

Done in $SECONDS s. The row with r=0 is unmerged; a speed-up is over timm's own dense model, measured in the same run.
(The finetuned weights have also seen five more epochs.) Files:
EOF
find $OUT -type f | sort | sed 's/^/  /'
