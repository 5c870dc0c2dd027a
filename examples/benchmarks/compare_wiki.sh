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
# ONLY says which variants: the trained methods and what is not trained where it is not given, all where it is "all".
# A comparison of methods that is over may be gone on with as one of all.
#
# Every variant has quantize's defaults (rcpconv/recipes/default.toml: rotations learned on 7.5% of the tokens, KL and a tenth
# of cross-entropy, 15% of the tokens of repeated text drawn anew, quantizers and clips at 2.5 times the weights' rate,
# falling to 0 in a line, activation clips from 0.8), which are the best recipe measured for ldp, in steps of 8 sequences,
# and is swept over the same three rates: the best one of that recipe, 4e-4, and two above it, which seq was better with.
#
# Estimate for wiki-llama-22m, from what 33 M tokens took on H200s in batches of 8 (docs/log.md, 2026-11-29 and 30): a GPU
# trains 585,000 tokens/s in all, whether four, six or more share it; 30 to 50 s are start and compilation, and measuring
# (text kept back, held-out) takes 25 to 35 s. Tokens drawn anew, from a text's second time on, cost a sixth more, and
# learning rotations takes three times as long as training on as many tokens. Not measured as a whole.
#
#   phase                            tokens      one GPU, 6 at a time      two GPUs, 12 at a time
#   sweep: 24 of 8 M                 192 M       380 s + 4 starts          190 s + 2
#   final: 8 of 33 M, one seed       264 M       590 s + 2                 295 s + 1
#   two more seeds of the best two   132 M       295 s + 1                 150 s + 1
#   in calls of 9 minutes                        5                         3
#   19 ablations after that          627 M       1,400 s, 5 calls          700 s, 2 calls
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
