#!/usr/bin/env bash
# Formatting, lint, types, shell scripts and generated files. Arguments are names of steps; all
# without. .pre-commit-config.yaml calls the same steps.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# shellcheck disable=SC2329 # called by name below
ruff() {
  "$venv/bin/ruff" format --check .
  "$venv/bin/ruff" check .
}

# shellcheck disable=SC2329
cxx() {
  find csrc tests/kernels -regex '.*\.\(cuh?\|h\|cpp\)' -exec "$venv/bin/clang-format" --dry-run --Werror {} +
}

# shellcheck disable=SC2329
types() {
  "$venv/bin/mypy"
}

# shellcheck disable=SC2329
shell() {
  find .ci/run .devcontainer examples scripts \( -name '*.sh' -o -name run \) -exec "$venv/bin/shellcheck" -x {} +
}

# shellcheck disable=SC2329
workflows() {
  local schema=(--builtin-schema vendor.github-workflows)
  "$venv/bin/check-jsonschema" "${schema[@]}" .github/workflows/*.yml
}

# shellcheck disable=SC2329
generated() {
  "$venv/bin/python" scripts/make_schema.py --check
  "$venv/bin/python" scripts/make_reference.py --check
  "$venv/bin/python" scripts/make_api.py --check
}

install lint
cd "$root"
[ $# -gt 0 ] || set -- ruff cxx types shell workflows generated
for step in "$@"; do
  say "$step"
  "$step"
done
