#!/usr/bin/env bash
# Formatting, lint, types, shell scripts and generated files.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install lint
cd "$root"
say "ruff"
"$venv/bin/ruff" format --check .
"$venv/bin/ruff" check .
say "mypy"
"$venv/bin/mypy"
say "shellcheck"
"$venv/bin/shellcheck" -x scripts/*.sh scripts/models/*.sh .ci/run
say "generated files"
"$venv/bin/python" scripts/make_schema.py --check
"$venv/bin/python" scripts/make_reference.py --check
