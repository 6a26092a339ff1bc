#!/usr/bin/env bash
# Install into a virtual environment if need be, then run the demo. Options go to the demo.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install ""
say "running the demo"
exec "$venv/bin/sglang-moe-routing" demo "$@"
