#!/usr/bin/env bash
# Quantize one checkpoint, export, verify and evaluate it, and leave the figures as JSON.
#
#   examples/benchmarks/quantize_wiki_llama.sh MODEL_FOLDER TRAIN_TEXT HELDOUT_TEXT OUT_FOLDER [quantize options …]
#
# The results in examples/benchmarks/results/wiki-llama-22m come from it, on an H200. PY is the Python to use.
set -euo pipefail
model=$1 train=$2 heldout=$3 out=$4
shift 4
py=${PY:-python3}
mkdir -p "$out"
$py -m rcpconv quantize "$model" --data "$train" --out "$out/run" "$@"
$py -m rcpconv export --run "$out/run" --out "$out/model.rcp" --force
$py -m rcpconv verify "$out/model.rcp"
$py -m rcpconv eval --run "$out/run" --text "$heldout" --window 1024 --skip rcp --json "$out/eval-whole.json"
$py -m rcpconv eval --run "$out/run" --rcp "$out/model.rcp" --text "$heldout" --window 1024 --max-tokens 120000 \
    --agreement --json "$out/eval-agreement.json"
