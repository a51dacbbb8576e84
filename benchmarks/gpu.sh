#!/usr/bin/env bash
# Builds the extension, then runs the GPU tests and the benchmarks, on a machine with a GPU, its own torch and no
# network. Figures go to ${OUT:-build}/cuda.json and ${OUT:-build}/cuda_compiled.json.
# Usage: benchmarks/gpu.sh [build|tests|bench] [further arguments of pytest or of run.py]; all three by default.
set -euo pipefail
cd "$(dirname "$0")/.."

export PEFT_EXT_REQUIRE_NATIVE=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
root=$PWD
out=${OUT:-$root/build}
part=${1:-all}
shift || true

build() {
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c \
    'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
  export TORCH_CUDA_ARCH_LIST
  PEFT_EXT_FORCE_CUDA=1 python3 -m pip install --quiet --no-build-isolation --no-deps .
}

# In a folder other than the root, so that the installed package is imported, not the folder.
tests() (
  cd tests
  OMP_NUM_THREADS=1 python3 -m pytest -q -p no:cacheprovider -m gpu -n 12 "$@" .
)

bench() (
  mkdir -p "$out"
  cd benchmarks
  status=0
  python3 run.py --device cuda --keep-going --json "$out/cuda.json" "$@" || status=$?
  # torch.compile of the formulas, as a peer more: not waited for where it takes long.
  timeout 60 python3 run.py --device cuda --compile --keep-going --json "$out/cuda_compiled.json" || status=$?
  return "$status"
)

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
case $part in
  all)
    build
    (cd tests && python3 -m peft_ext info)
    status=0
    tests || status=$?
    bench || status=$?
    exit "$status"
    ;;
  build | tests | bench) "$part" "$@" ;;
  *)
    echo "benchmarks/gpu.sh: got '$part', want build, tests or bench" >&2
    exit 2
    ;;
esac
