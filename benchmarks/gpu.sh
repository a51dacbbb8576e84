#!/usr/bin/env bash
# Builds the extension, runs the GPU tests and the GPU benchmarks, on a machine with a GPU, its own torch and no network.
# Usage: benchmarks/gpu.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

export PEFT_EXT_REQUIRE_NATIVE=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
TORCH_CUDA_ARCH_LIST=$(python3 -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
export TORCH_CUDA_ARCH_LIST

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
PEFT_EXT_FORCE_CUDA=1 python3 -m pip install --quiet --no-build-isolation --no-deps .
cd tests # so that the installed package is imported, not the folder
python3 -m peft_ext info
OMP_NUM_THREADS=1 python3 -m pytest -q -p no:cacheprovider -m gpu -n 12 "$@" .
