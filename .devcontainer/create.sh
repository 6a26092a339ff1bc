#!/usr/bin/env bash
# What a fresh container needs: the system's tools, then the project with all extras.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
sudo apt-get update -qq
sudo apt-get install -y -qq --no-install-recommends g++ make prometheus
./scripts/check.sh
./scripts/test.sh --collect-only -q
.venv/bin/pip install --quiet pre-commit
.venv/bin/pre-commit install
