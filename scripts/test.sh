#!/usr/bin/env bash
# Install into a virtual environment if need be, then run all tests. Options go to pytest.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install test
say "running the tests"
cd "$root"
exec "$venv/bin/python" -m pytest "$@"
