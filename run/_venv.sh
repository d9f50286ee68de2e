# shellcheck shell=bash
# Sourced by test.sh and quickstart.sh: sets PYTHON to an interpreter that has requirements.txt installed, and puts its
# commands (torchrun, ...) first in PATH.
#
# The environment is $REGTOME_VENV; or .venv; or, with CI=true and no .venv, a folder under ~/.cache/regtome that is
# named after what is installed and kept between runs. A stamp in it holds the hash of the requirements that it has: it is
# written last, so that a torn or outdated installation is done again, and a good one costs nothing.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
  printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
  exit "${2:-1}"
}

# The checkout's own modules are not part of it, for nothing here imports their installed copy.
requirements_hash() {
  local sum=(sha256sum)
  command -v sha256sum >/dev/null || sum=(shasum -a 256)
  cat "$ROOT/requirements.txt" "$ROOT/setup.py" "$ROOT/run/torchrun.py" | "${sum[@]}" | cut -c1-64
}

venv_folder() { # HASH
  if [ -n "${REGTOME_VENV:-}" ]; then
    echo "$REGTOME_VENV"
  elif [ "${CI:-}" = true ] && [ ! -d "$ROOT/.venv" ]; then
    echo "${XDG_CACHE_HOME:-$HOME/.cache}/regtome/venv-${1:0:16}"
  else
    echo "$ROOT/.venv"
  fi
}

# Being on the PATH is not enough: version managers put stand-ins there that do not run.
find_python() {
  local name
  for name in python3.11 python3.12 python3; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  die "no Python 3.11 or 3.12 found; install one, or name an environment that has it: REGTOME_VENV=FOLDER"
}

install_venv() { # FOLDER STAMP HASH
  local base
  if ! "$1/bin/python" -c '' 2>/dev/null; then
    base=$(find_python) || exit
    echo "creating $1 with $base"
    "$base" -m venv --clear "$1" || die "$base cannot make $1 (on Debian: apt install python3-venv)"
  fi
  rm -f "$2"
  echo "installing requirements.txt into $1 (once; torch is large)"
  # regtome itself brings the torchrun that takes main.py's --r on every Python (run/torchrun.py)
  "$1/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt" "$ROOT" ||
    die "pip could not install requirements.txt into $1; its message is above"
  printf '%s\n' "$3" >"$2"
}

ensure_venv() {
  local hash folder stamp
  hash=$(requirements_hash)
  folder=$(venv_folder "$hash")
  mkdir -p "$folder" || die "cannot make $folder; name another folder: REGTOME_VENV=FOLDER"
  folder=$(cd "$folder" && pwd)
  stamp=$folder/.regtome-requirements
  PYTHON=$folder/bin/python
  if [ "$(cat "$stamp" 2>/dev/null)" != "$hash" ] || ! "$PYTHON" -c '' 2>/dev/null; then
    # one installation at a time: the second waits and then finds the stamp of the first
    exec 9<"$(dirname "$folder")"
    if command -v flock >/dev/null; then flock 9; fi
    [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ] && "$PYTHON" -c '' 2>/dev/null || install_venv "$folder" "$stamp" "$hash"
    exec 9<&-
  fi
  export PYTHON PATH="$folder/bin:$PATH"
}

ensure_venv
