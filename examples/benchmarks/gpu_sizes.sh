#!/usr/bin/env bash
# Converts and trains models of real sizes on one GPU or two, and measures that, what matters most first.
#
#     examples/benchmarks/gpu_sizes.sh OUT [PART...]
#
# Each part has a time limit and may fail. As soon as one is done, its output is in OUT/sizes.txt, and all outputs and
# JSON are in OUT/results.tar.gz. Without parts: the first five, which fit into 9 minutes; name others for another call.
# They run in the order in which they are named. Parts, with the time that each takes on H200s (measured on 2026-11-29,
# on two GPUs on 2026-11-30; in brackets: thought):
#
#     chain          a checkpoint of random weights, three steps, file, rcp-run bench, sizes    150 s
#     steps-0        the same checkpoint without training                                      85 s
#     train-7b-full  memory and speed with all of the GPU's memory, and of plain training       98 s
#     train-7b-80    memory and speed with --low-memory under a cap of 80 GiB                   100 s
#     train-7b-48    the same under 48 GiB                                                      90 s
#     1b, 3b         memory and speed with all of the memory, and of plain training              62 s, 83 s
#     wiki           speed and profile of the small model that recipes are measured on           63 s
#     resume         kill -9 in training, resume, the same bytes as uninterrupted              125 s
#     resume-gpus    the same by two GPUs, with int8 states and bfloat16 weights                 172 s
#     gpus-1b        losses, speed and memory on one GPU, twice, and on two, 32 sequences       251 s
#     gpus-tests     losses of tiny models on two GPUs, which are those of one; four cases of 50 s   about 200 s
#     gpus-7b        gpus-1b's for 7B, on two GPUs alone, 16 sequences                          180 s
#     gpus-7b-80, gpus-7b-48   7B with --low-memory and so many GiB of each of two GPUs     165 s, 206 s
#
# Nothing is drawn anew (resample=0), which would be done for the little text that there is, and not for a text's first time.
# SHAPE_7B, SHAPE_1B and SHAPE_3B are the shapes (examples/make_synthetic_checkpoint.py), SEQ the length of sequences,
# MEASURED the steps to measure. PY is the interpreter, SECONDS_IN_ALL the time after which nothing begins or goes on.
# QUANTIZE_OPTIONS and MEASURE_OPTIONS go to rcpconv quantize and measure_training.py.
set -u
cd "$(dirname "$0")/../.."
out=$(realpath -m "$1")
shift
parts=${*:-chain steps-0 train-7b-full train-7b-80 train-7b-48}
export py=${PY:-python3} SEQ=${SEQ:-2048} MEASURED=${MEASURED:-3}
export SHAPE_7B=${SHAPE_7B:-llama-2-7b} SHAPE_1B=${SHAPE_1B:-llama-3.2-1b} SHAPE_3B=${SHAPE_3B:-llama-3.2-3b}
export QUANTIZE_OPTIONS=${QUANTIZE_OPTIONS:-} MEASURE_OPTIONS=${MEASURE_OPTIONS:-}
end=${SECONDS_IN_ALL:-560}
export PYTHONPATH="$PWD:$PWD/formats:$PWD/runtime${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false here=examples/benchmarks
work=$(mktemp -d)
mkdir -p "$out"

# A new folder where so many GB are free, in memory if possible.
folder() {
    local place
    for place in /dev/shm "${TMPDIR:-/tmp}" /var/tmp "$HOME"; do
        if [[ -w $place ]] && (($(df --output=avail -B1000000000 "$place" | tail -n 1) >= $1)); then
            mktemp -d "$place/rcp-sizes.XXXXXX"
            return
        fi
    done
    mktemp -d
}
needed=16
[[ $SHAPE_7B == *7b* ]] || needed=1
models=$(folder "$needed") runs=$(folder $((2 * needed)))
export work models runs
trap 'rm -rf "$work" "$models" "$runs"' EXIT

log=$out/sizes.txt
. examples/benchmarks/parts.sh

# timed COMMAND...: how long it took.
timed() {
    local began status
    began=$(date +%s.%N)
    "$@"
    status=$?
    awk -v began="$began" -v now="$(date +%s.%N)" -v status=$status -v what="${*:1:5}" \
        'BEGIN { printf "-- %.1f s, status %d: %s\n", now - began, status, what }'
    return $status
}
checkpoint() {
    [[ -d $models/$1 ]] || timed "$py" examples/make_synthetic_checkpoint.py "$1" "$models/$1"
}
chain() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
    df -h "$models" "$runs" | cat
    "$py" -c 'import torch; print("torch", torch.__version__, torch.cuda.is_available())'
    local run=$runs/chain file=$runs/chain.rcp
    checkpoint "$SHAPE_7B" || return
    # shellcheck disable=SC2086
    timed "$py" -m rcpconv quantize "$models/$SHAPE_7B" --out "$run" --steps 3 --data demo --seq-len "$SEQ" \
        --log-every 1 --checkpoint-every 0 --checkpoint-contents weights $QUANTIZE_OPTIONS || return
    cat "$run/metrics.jsonl"
    timed "$py" -m rcpconv export --run "$run" --out "$file" || return
    "$py" - "$models/$SHAPE_7B" "$file" <<'END'
import os, sys
from pathlib import Path
original = sum(path.stat().st_size for path in Path(sys.argv[1]).glob("*.safetensors"))
file = os.path.getsize(sys.argv[2])
print(f"sizes: checkpoint in 16 bits {original:,} bytes, file {file:,}: {original / file:.3f} times smaller")
END
    timed "$py" -m rcprun bench "$file" -p 512 -n 64 -d 0 -r 2 --json "$work/chain-bench.json"
    timed "$py" -m rcprun "$file" --prompt "w1 w2 w3" --max-tokens 16 --seed 1
}
steps_0() {
    checkpoint "$SHAPE_7B" || return
    # shellcheck disable=SC2086
    timed "$py" -m rcpconv quantize "$models/$SHAPE_7B" --out "$runs/steps-0" --steps 0 $QUANTIZE_OPTIONS || return
    timed "$py" -m rcpconv export --run "$runs/steps-0" --out "$runs/steps-0.rcp"
}
# measured NAME CASE OPTIONS...: once more with another allocator where it fails for memory.
measured() {
    local name=$1 case=$2
    shift 2
    # shellcheck disable=SC2086
    set -- "$py" $here/measure_training.py --case "$case" --steps "$MEASURED" --profile --set seq_len="$SEQ" --set resample=0 "$@" $MEASURE_OPTIONS
    timed "$@" --out "$work/$name.json" && return
    grep -q "out of memory" "$work/$name.json" 2>/dev/null || return
    echo "once more with expandable segments"
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True timed "$@" --out "$work/$name-expandable.json"
}
resume() {
    checkpoint "$SHAPE_1B" || return
    # shellcheck disable=SC2086
    timed "$py" $here/resume_drill.py "$models/$SHAPE_1B" "$runs/resume" -- --data demo --seq-len "$SEQ" \
        --batch-size 1 --grad-accum 1 --compile off --keep-checkpoints 1 $QUANTIZE_OPTIONS
}
resume_gpus() {
    checkpoint "$SHAPE_1B" || return
    # shellcheck disable=SC2086
    timed "$py" $here/resume_drill.py "$models/$SHAPE_1B" "$runs/resume-gpus" --gpus 2 --steps 6 --every 2 -- --data demo \
        --seq-len "$SEQ" --batch-size 2 --grad-accum 1 --compile off --keep-checkpoints 1 --optimizer-states int8 \
        --master-weights bf16 $QUANTIZE_OPTIONS
}
# gpus SHAPE NUMBERS SEQUENCES STEPS OPTIONS...: one training on different numbers of GPUs.
gpus() {
    checkpoint "$1" || return
    local shape=$1 numbers=$2 sequences=$3 steps=$4
    shift 4
    local name=gpus-$shape${AS:-}
    timed "$py" $here/measure_gpus.py "$models/$shape" demo --out "$work/$name.json" --gpus "$numbers" \
        --sequences "$sequences" --set steps="$steps" --set seq_len="$SEQ" --set resample=0 --limit 215 --plot "$work/$name.png" "$@"
}
export -f timed checkpoint chain steps_0 measured resume resume_gpus gpus

rm -f "$log"
for name in $parts; do
    case $name in
        chain) part "$name" 260 bash -c chain ;;
        steps-0) part "$name" 150 bash -c steps_0 ;;
        train-7b-full) part "$name" 240 bash -c 'measured train-7b-full "$SHAPE_7B:full" --plain' ;;
        train-7b-80) part "$name" 150 bash -c 'measured train-7b-80 "$SHAPE_7B:80"' ;;
        train-7b-48) part "$name" 150 bash -c 'measured train-7b-48 "$SHAPE_7B:48"' ;;
        1b) part "$name" 180 bash -c 'measured 1b "$SHAPE_1B:full" --plain' ;;
        3b) part "$name" 200 bash -c 'measured 3b "$SHAPE_3B:full" --plain' ;;
        wiki) part "$name" 90 bash -c 'SEQ=1024 measured wiki wiki-llama-22m:full --set batch_size=8 --set grad_accum=1' ;;
        resume) part "$name" 240 bash -c resume ;;
        resume-gpus) part "$name" 240 bash -c resume_gpus ;;
        gpus-1b) part "$name" 330 bash -c 'gpus "$SHAPE_1B" 1,2 32 8 --yardstick' ;;
        gpus-tests) part "$name" 240 "$py" -m pytest -q -m gpu tests/rcpconv/train/test_gpus.py ;;
        gpus-7b-80) part "$name" 260 bash -c 'AS=-80 gpus "$SHAPE_7B" 2 16 3 --free-gib 80 --set low_memory' ;;
        gpus-7b-48) part "$name" 300 bash -c 'AS=-48 gpus "$SHAPE_7B" 2 16 3 --free-gib 48 --set low_memory --limit 260' ;;
        gpus-7b) part "$name" 260 bash -c 'gpus "$SHAPE_7B" 2 16 5' ;;
        *) echo "no part $name" ;;
    esac
    # What a later part makes again if it needs it; in memory, it would be in the way of a single GPU's machine.
    rm -rf "$runs"/*
    [[ $name == chain || $name == gpus-7b* || $SHAPE_1B == "$SHAPE_7B" ]] || rm -rf "${models:?}/$SHAPE_7B"
done
