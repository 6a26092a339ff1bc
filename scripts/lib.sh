# Shared by the scripts beside it: find Python, make the virtual environment, install.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

# on stderr: `demo.sh --json` prints one JSON object and nothing else
say() { printf '\n==> %s\n' "$*" >&2; }

find_python() {
  local name
  for name in "${PYTHON:-}" python3.12 python3.11 python3 python; do
    if [ -n "$name" ] && command -v "$name" >/dev/null &&
      "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; install it or set PYTHON" >&2
  return 1
}

# install EXTRA: the project with this optional group ("" for none), if not yet done.
install() {
  local target=$root${1:+[$1]} stamp=$venv/.installed-${1:-base}
  if [ ! -x "$venv/bin/python" ]; then
    say "creating the virtual environment $venv"
    "$(find_python)" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
  fi
  if [ ! -f "$stamp" ] || [ "$root/pyproject.toml" -nt "$stamp" ]; then
    say "installing the project and SGLang (about 11 GB the first time)"
    "$venv/bin/python" -m pip install --quiet --editable "$target"
    touch "$stamp"
  fi
}
