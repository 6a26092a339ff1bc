#!/usr/bin/env bash
# Install into a virtual environment if need be, then run all tests. Arguments go to pytest instead.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install test
say "running the tests"
cd "$root"
unset PYTHONDONTWRITEBYTECODE # every process of every server would compile the package anew
if [ $# -gt 0 ]; then
  exec "$venv/bin/python" -m pytest "$@"
fi
status=0
"$venv/bin/python" -m pytest -m "not serial" -n 2 --dist loadfile --no-loadscope-reorder || status=$?
"$venv/bin/python" -m pytest -m serial || status=$?
exit "$status"
