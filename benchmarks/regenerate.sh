#!/usr/bin/env bash
# Measures every report in results/ anew that a CPU can, one after the other, then writes the documents' tables and plots.
# About two and a half hours on two cores that do nothing else, half an hour of it `compare`; a report is replaced when it
# is complete.
# Usage: benchmarks/regenerate.sh DATA [NAME...], all by default; QUICK=1 only shows that all of them run, in build/.
#   DATA: a folder with movie_train.csv and movie_test.csv (columns text and label) and moby_dick.txt; README.md has more.
#   NAME: lora_linear, e2e_minilm, growth, ... as the files in results/ are called.
set -euo pipefail
data=$(realpath "${1:?a folder with the data, then the names of reports}")
shift
cd "$(dirname "$0")/.."
: "${PEFT_EXT_ADAPTERHUB_PYTHON:?an interpreter that has adapters, see benchmarks/README.md}"

export PEFT_EXT_REQUIRE_NATIVE=1 HF_HUB_OFFLINE=1
quick=${QUICK:+--quick} # without what torch.compile makes of the models, which takes minutes
libraries="--libraries eager,hf_peft,compiled,ours,ours_accelerated,ours_compiled,ours_bfloat16"
bfloat16_ops="adapter_fusion bottleneck_adapter kron_linear lora_linear multi_lora_linear prefix_attention"
results=benchmarks/results
if [ -n "$quick" ]; then
  libraries= results=build/quick_results
  mkdir -p "$results"
fi

measure() {
  local json=$results/$1.json
  case $1 in
    e2e_*) python benchmarks/run.py "$1" ${quick:---compile} --threads 1,2 --json "$json" ;;
    # Its targets are hundredths apart.
    lora_linear) python benchmarks/run.py "$1" ${quick:---seconds 15} --threads 1,2 --json "$json" ;;
    bfloat16) python benchmarks/run.py $bfloat16_ops $quick --dtype bfloat16 --threads 1,2 --json "$json" ;;
    growth) python benchmarks/growth.py $quick --json "$json" ;;
    time_to_minilm)
      python benchmarks/time_to.py minilm $quick $libraries --train "$data/movie_train.csv" --eval "$data/movie_test.csv" \
        --json "$json"
      ;;
    time_to_smollm2)
      python benchmarks/time_to.py smollm2 $quick $libraries --train "$data/moby_dick.txt" --eval-rows 32 --json "$json"
      ;;
    compare) compare "$json" ;;
    *) python benchmarks/run.py "$1" $quick --threads 1,2 --json "$json" ;;
  esac
}

compare() {
  local model rows=2000 out=build/compare
  [ -z "$quick" ] || rows=64
  model=$(python -c 'from peft_ext.cli.demo import find_model; print(find_model())')
  rm -rf "$out"
  OMP_NUM_THREADS=1 python -m peft_ext compare "$model" --train "$data/movie_train.csv" --eval "$data/movie_test.csv" --limit $rows \
    --epochs 2 --max-length 48 -o "$out"
  cp "$out/compare.json" "$1"
}

[ $# -gt 0 ] || set -- adapter_fusion bottleneck_adapter kron_linear lora_linear multi_lora_linear prefix_attention \
  quantized_linear bfloat16 growth e2e_minilm e2e_smollm2 time_to_minilm time_to_smollm2 compare
for name; do
  echo "=== $name ($((SECONDS / 60)) min)"
  measure "$name"
done
[ -n "$quick" ] || python benchmarks/tables.py
