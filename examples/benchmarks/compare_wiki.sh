#!/usr/bin/env bash
# The table of methods and ablations on one checkpoint, in calls of at most 9.5 minutes on one GPU.
#
#   examples/benchmarks/compare_wiki.sh MODEL_FOLDER TRAIN_TEXT HELDOUT_TEXT WORK STATE OUT [compare options …]
#
# WORK is a folder that may stay between calls: what is in it is gone on with, checkpoints of trainings that were stopped
# and compiled graphs too. Where there is none, STATE, the state.tar that the last call left in OUT, is unpacked; where
# there is no such file either, this is the first call. OUT gets state.tar (results without run folders and tokens:
# under a megabyte, or 8 MB where text was sampled), compare.md and compare.json, and in the end compare.png. "over" in the
# last line means: call again, with the same options. PY is the Python to use, MINUTES what compare may take.
#
# Estimate for wiki-llama-22m on one H200, from 740,000 tokens/s of three trainings side by side in batches of 32 and 50 s
# of compiling a variant (docs/log.md, 2026-11-22), two measurements of which (text kept back, held-out) take 25 s:
#
#   step                                seconds a cell                    methods (7)    ablations (14)
#   sweep, 3 rates of 8 M, one seed     50 + 3 · (33 + 4), a variant      3 · 161        5 · 161
#   final, 33 M, one seed               50 + 134 + 25                     3 · 209        5 · 209
#   two more seeds of the best two      50 + 134 + 25                     2 · 209
#   start, original, stops              40 a call                         3 · 40         4 · 40
#   all                                                                   27 min         34 min
#
# So first three or four calls with METHODS below as options, which are a table by themselves, then four or five without
# (a machine that stays warm compiles less). The rates are those between which the choice was open at 33 M tokens.
#   METHODS: --only ldp,ldp-udq,lc,uniform,uniform-no-rotations,seq,r2q,rtn,ldp-untrained
set -euo pipefail
model=$1 train=$2 heldout=$3 work=$4 state=$5 out=$6
shift 6
py=${PY:-python3}
mkdir -p "$work" "$out"
if [ ! -e "$work/comparison" ] && [ -e "$state" ]; then
    tar -xf "$state" -C "$work"
fi
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$work/compiled}"
status=0
$py -m rcpconv compare "$model" --out "$work/comparison" --data "$train" --text "$heldout" \
    --set seq-len=1024 --set batch-size=32 --set grad-accum=1 --lr-grid 4.5e-4,1e-3,2e-3 \
    --tokens 33M --sweep-tokens 8M --seeds 3 --best 2 --jobs 3 --minutes "${MINUTES:-8.7}" "$@" || status=$?
# Also after an error: what is finished is worth keeping.
[ -e "$work/comparison" ] || exit $status
tar -cf "$out/state.tar" -C "$work" --exclude=comparison/runs --exclude=comparison/tokens.npy comparison
for name in compare.md compare.json compare.png; do
    [ ! -e "$work/comparison/$name" ] || cp "$work/comparison/$name" "$out/"
done
exit $status
