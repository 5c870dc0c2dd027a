#!/usr/bin/env bash
# The table of methods and ablations on one checkpoint, in calls of at most 9.5 minutes on one GPU or several.
#
#   examples/benchmarks/compare_wiki.sh MODEL_FOLDER TRAIN_TEXT HELDOUT_TEXT WORK STATE OUT [compare options …]
#
# WORK is a folder that may stay between calls: what is in it is gone on with, checkpoints of trainings that were stopped
# and compiled graphs too. Where there is none, STATE, the state.tar that the last call left in OUT, is unpacked; where
# there is no such file either, this is the first call. OUT gets state.tar (results without run folders and tokens:
# under a megabyte, or 8 MB where text was sampled), compare.md and compare.json, and in the end compare.png. "over" in the
# last lines means: call again, with the same options. PY is the Python to use, MINUTES what compare may take, JOBS how
# many trainings there are side by side (six a GPU).
#
# ONLY says which variants: the methods, and what is not trained, where it is not given; all, ablations and the papers'
# recipes too, where it is "all". A comparison of methods that is over may be gone on with as one of all. That of 2026-11-30
# is in results/wiki-llama-22m-compare: its state.tar.xz may be the STATE of another call, with --generations 64.
#
# Every variant has quantize's defaults (rcpconv/recipes/default.toml: rotations learned on 7.5% of the tokens, KL and a tenth
# of cross-entropy, 15% of the tokens of repeated text drawn anew, quantizers and clips at 2.5 times the weights' rate,
# falling to 0 in a line, activation clips from 0.8), which are the best recipe measured for ldp, in steps of 8 sequences,
# and is swept over the same four rates: the best one of that recipe, 4e-4, one below it and two above it. Ablations take
# ldp's.
#
# Measured with wiki-llama-22m on two H200s (docs/log.md, 2026-11-30): 29 trainings of 8 M tokens, 14 at a time, and most of
# four of 33 M 545 s; eight of 33 M, all at a time, 490 s with start, rotations that they share, and 64 generations each; four
# of 33 M, with rotations of their own, 399 s. A GPU trains 300,000 tokens/s in all with two trainings at a time, and
# 500,000 with four to seven; 30 to 60 s are start and compilation.
#
# On one H200 (2026-12-01), ten at a time under NVIDIA's MPS (nvidia-cuda-mps-control -d, before this): 21 of 33 M, most
# with rotations of their own, in 1,310 s. With --seeds 3 nothing is left of the comparison above.
#
# Nothing is begun that would probably end too late, so a call may end some minutes early: a final training needs six.
set -euo pipefail
model=$1 train=$2 heldout=$3 work=$4 state=$5 out=$6
shift 6
py=${PY:-python3}
mkdir -p "$work" "$out"
if [ ! -e "$work/comparison" ] && [ -e "$state" ]; then
    tar -xf "$state" -C "$work"
fi
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$work/compiled}"
methods=ldp,ldp-udq,lc,uniform,uniform-mix,uniform-no-rotations,seq,r2q,rtn,ldp-untrained
only=(--only "${ONLY:-$methods}")
[ "${ONLY:-}" != all ] || only=()
gpus=$($py -c 'import torch; print(torch.cuda.device_count())')
status=0
$py -m rcpconv compare "$model" --out "$work/comparison" --data "$train" --text "$heldout" \
    --set seq-len=1024 --set step-sequences=8 --lr-grid 2.3e-4,4e-4,7e-4,1.2e-3 ${only[@]+"${only[@]}"} \
    --tokens 33M --sweep-tokens 8M --seeds 3 --best 2 --jobs "${JOBS:-$((6 * (gpus > 0 ? gpus : 1)))}" \
    --minutes "${MINUTES:-8.7}" "$@" || status=$?
# Also after an error: what is finished is worth keeping.
[ -e "$work/comparison" ] || exit $status
tar -cf "$out/state.tar" -C "$work" --exclude=comparison/runs --exclude=comparison/rotations --exclude=comparison/tokens.npy comparison
for name in compare.md compare.json compare.png; do
    [ ! -e "$work/comparison/$name" ] || cp "$work/comparison/$name" "$out/"
done
exit $status
