#!/usr/bin/env bash
# Install into a virtual environment if need be, then run all tests. Arguments go to pytest instead.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install test
say "running the tests"
cd "$root"
if [ $# -gt 0 ]; then
  exec "$venv/bin/python" -m pytest "$@"
fi
status=0 # servers run one after the other: they need ports, memory and time of their own
"$venv/bin/python" -m pytest -n 2 --dist loadfile --ignore tests/e2e || status=$?
"$venv/bin/python" -m pytest tests/e2e || status=$?
exit "$status"
