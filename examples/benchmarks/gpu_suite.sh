#!/usr/bin/env bash
# Measures all that is said of the CUDA backend's speed, in about 9 minutes on one GPU, what matters most first.
#
#     examples/benchmarks/gpu_suite.sh OUT [PART...]
#
# Each part has a time limit and may fail. As soon as one is done, its output is in OUT/suite.txt, and all outputs,
# JSON and pictures are in OUT/results.tar.gz. Parts: model bench right linear token-512 token-16384 token-8 hadamard
# others picture token-drawn. "right": the tests, compute-sanitizer and, where AGREEMENT names a folder with run/,
# model.rcp and text.txt, the agreement with torch, side by side. PY is the interpreter, SECONDS_IN_ALL the time after
# which nothing begins or goes on.
set -u
cd "$(dirname "$0")/../.."
out=$(realpath -m "$1")
shift
parts=" ${*:-every} "
py=${PY:-python3}
end=${SECONDS_IN_ALL:-560}
export PYTHONPATH="$PWD:$PWD/formats:$PWD/runtime${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
models=${TMPDIR:-/tmp}/rcp-suite-models
work=$(mktemp -d)
mkdir -p "$out" "$models"
trap 'rm -rf "$work"' EXIT

log=$out/suite.txt
. examples/benchmarks/parts.sh

# wanted NAME LIMIT COMMAND...: the part, if it was named.
wanted() {
    if [[ $parts == *" every "* || $parts == *" $1 "* ]]; then part "$@"; fi
}

here=examples/benchmarks
seven=$models/7b.rcp demo=$models/demo.rcp
make_models() {
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv,noheader
    git log -1 --format='%h %s' 2>/dev/null
    "$py" examples/make_synthetic_rcp.py demo "$demo" --layers 1 --force &
    "$py" examples/make_synthetic_rcp.py llama-2-7b "$seven" --context 32768 --force
    wait
}
is_it_right() {
    "$py" -m pytest -q -m gpu --numprocesses 12 tests/rcprun/cuda 2>&1 | tail -n 15 &
    "$py" $here/sanitize.py "$demo" --no-graphs --serialized --limit 130 --logs "$work/sanitizer" &
    if [[ ${AGREEMENT:-} ]]; then
        "$py" -m rcpconv eval --run "$AGREEMENT/run" --rcp "$AGREEMENT/model.rcp" --text "$AGREEMENT/text.txt" \
            --window 1024 --max-tokens 120000 --agreement --skip original --json "$work/agreement.json" &
    fi
    wait
}
export -f make_models is_it_right
export here py seven demo work

wanted model 90 bash -c make_models
wanted bench 90 "$py" -m rcprun bench "$seven" --backend cuda -b 1,8 -r 3 --json "$work/bench.json"
wanted right 150 bash -c is_it_right
wanted linear 260 "$py" $here/bench_linear.py --peers --peer-limit 90 --json "$work/linear-7b.json"
wanted token-512 30 "$py" $here/bench_token.py "$seven" --depth 512 --json "$work/token-512.json"
wanted token-16384 30 "$py" $here/bench_token.py "$seven" --depth 16384 --json "$work/token-16384.json"
wanted token-8 30 "$py" $here/bench_token.py "$seven" --depth 512 --batch 8 --json "$work/token-8.json"
wanted hadamard 20 "$py" $here/bench_hadamard.py --json "$work/hadamard.json"
wanted others 100 "$py" $here/bench_linear.py --shape llama-3.2-1b --shape llama-3.2-3b --shape llama-3-8b \
    --shape llama-2-13b --peer "torch float16" --peer-limit 25 --json "$work/linear-others.json"
wanted picture 10 "$py" $here/roofline.py "$work/roofline.png" "$work/linear-7b.json" "$work/linear-others.json"
wanted token-drawn 30 "$py" $here/bench_token.py "$seven" --depth 512 --drawn --json "$work/token-drawn.json"
