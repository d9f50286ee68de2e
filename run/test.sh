#!/usr/bin/env bash
# All checks: format, lint, types, tests. Makes its environment if there is none (see _venv.sh).
#
#     bash run/test.sh [pytest options]
#
# REGTOME_VENV=FOLDER uses, or makes, that environment instead of .venv.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
cd "$ROOT"

step() { # NAME COMMAND...
  echo "== $1"
  "${@:2}" || die "$1 failed"
}

step "ruff format" "$PYTHON" -m ruff format --check .
step "ruff check" "$PYTHON" -m ruff check .
step "mypy" "$PYTHON" -m mypy
echo "== pytest"
exec "$PYTHON" -m pytest -q --durations=10 "$@"
