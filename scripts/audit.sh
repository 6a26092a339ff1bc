#!/usr/bin/env bash
# Hold every installed package against the public advisories, with pip-audit. Options go to it.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install ""
tool=$venv/audit
if [ ! -x "$tool/bin/pip-audit" ]; then
  say "installing pip-audit into a virtual environment of its own"
  "$(find_python)" -m venv "$tool"
  "$tool/bin/python" -m pip install --quiet pip-audit
fi
say "auditing $venv"
frozen=$(mktemp)
trap 'rm -f "$frozen"' EXIT
# sglang-moe-routing-cpu is metadata in our own wheel: no index has it, and nobody's may stand in
"$venv/bin/python" -m pip freeze --exclude-editable --exclude sglang-moe-routing-cpu | grep -v ' @ ' >"$frozen"
"$tool/bin/pip-audit" --requirement "$frozen" --no-deps --disable-pip --progress-spinner off "$@"
