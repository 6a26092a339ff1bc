#!/usr/bin/env bash
# Install into a virtual environment if need be, then run all tests, in two processes. Arguments go to
# pytest instead.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install test
say "running the tests"
cd "$root"
[ $# -gt 0 ] || set -- -n 2 --durations 30
exec "$venv/bin/python" -m pytest "$@"
