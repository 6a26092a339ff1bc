#!/usr/bin/env bash
# What needs a GPU: the reference on CUDA and under graph capture, then the demo on the device.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

install test
cd "$root"
"$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "error: torch sees no CUDA device here" >&2; exit 1; }
say "tests that need a GPU"
"$venv/bin/python" -m pytest tests/gpu
say "the demo on the GPU"
"$venv/bin/sglang-moe-routing" demo --json
