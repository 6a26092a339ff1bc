#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with a GPU, torch and nvcc. SGLang is not needed; where
# it is installed, the demo runs on the GPU too. Unattended, within 8 minutes:
#   ./scripts/gpu_check.sh [RESULT.json]
# PYTHON is the interpreter that has torch. Small packages that it lacks are installed with pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" scripts/gpu_check.py --out "${1:-gpu-check.json}"
