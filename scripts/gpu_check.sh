#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with a GPU, torch, nvcc and, for the servers, SGLang.
# Unattended, within 8 minutes; --help lists the options:
#   ./scripts/gpu_check.sh [RESULT.json]
# PYTHON is the interpreter that has torch. Small packages that it lacks are installed with pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
