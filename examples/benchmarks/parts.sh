# part NAME LIMIT COMMAND...: runs a part of a measurement; for gpu_suite.sh and gpu_sizes.sh, which source this.
#
# The command's output, at most LIMIT seconds of it, goes to $work/NAME.txt and its end to $log; whatever lies in $work is
# in $out/results.tar.gz afterwards. Nothing begins, or goes on, after $end seconds of the script.
part() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    ((limit = end - began < limit ? end - began : limit))
    if ((limit < 10)); then
        echo "== $name: no time left" | tee -a "$log"
        return 0
    fi
    timeout --kill-after=5 "$limit" "$@" >"$work/$name.txt" 2>&1
    status=$?
    ((status != 124)) || sleep 2 # for its last words
    {
        echo "== $name: status $status after $((SECONDS - began)) of at most $limit s: ${*//$PWD\//}"
        tail -c 6000 "$work/$name.txt"
    } | tee -a "$log"
    tar -C "$work" -czf "$out/results.tmp" . && mv "$out/results.tmp" "$out/results.tar.gz"
}
