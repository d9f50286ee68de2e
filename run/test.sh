#!/usr/bin/env bash
# All checks: format, lint, types, tests; with CI=true also a sample of the table of faults. Makes its environment if there is none (see _venv.sh).
#
#     bash run/test.sh [pytest options]
#
# Without options the tests run in two halves side by side, for nearly all of them use one core.
# REGTOME_VENV=FOLDER uses, or makes, that environment instead of .venv.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
cd "$ROOT"

step() { # NAME COMMAND...
  echo "== $1"
  "${@:2}" || die "$1 failed"
}

run_tests() { # PYTEST OPTIONS...
  "$PYTHON" -m pytest -q --durations=10 "$@"
}

# Every second file to each half. The second one's output follows the first one's, whole.
run_halves() {
  local files=(tests/test_*.py) first=() second=() i output status=0
  for i in "${!files[@]}"; do
    if ((i % 2)); then second+=("${files[i]}"); else first+=("${files[i]}"); fi
  done
  output=$(mktemp)
  run_tests -p no:cacheprovider "${second[@]}" >"$output" 2>&1 &
  other=$!
  trap 'kill "$other" 2>/dev/null || true' EXIT
  run_tests "${first[@]}" || status=$?
  wait "$other" || status=$?
  trap - EXIT
  cat "$output"
  rm "$output"
  return "$status"
}

step "ruff format" "$PYTHON" -m ruff format --check .
step "ruff check" "$PYTHON" -m ruff check .
step "mypy" "$PYTHON" -m mypy
echo "== pytest"
if (($#)); then run_tests "$@"; else run_halves; fi
# a part of the table of faults, with real kills; `run/kill_test.py --all --slurm` plays the whole
if [ "${CI:-}" = true ] && ! (($#)); then step "faults" timeout 900 "$PYTHON" run/kill_test.py --sample; fi
