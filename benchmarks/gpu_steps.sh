# Sourced by the scripts that run on a lent GPU. One call that ends within $BUDGET seconds: every step has a limit of its own, none ends
# the run, and what a step printed is kept as soon as it ends. Sets: out, work, site, python, end. For rehearsals: $HURRY divides the
# limits, $CUDA_BIN has other tools.
set -uo pipefail
out=${OUT:-build/$name}
work=${TMPDIR:-/tmp}/dqe_gpu
site=$work/site
python=$(command -v "${PYTHON:-python3}")
end=$((SECONDS + BUDGET))
mkdir -p "$out" "$site"
export PATH=${CUDA_BIN:-/usr/local/cuda/bin}:$PATH PYTHONUNBUFFERED=1 PYTHONPATH=$site:$PWD:$PWD/training:$PWD/export${PYTHONPATH:+:$PYTHONPATH}

say() { echo "$*" | tee -a "$out/summary.txt"; }

step() { # step NAME SECONDS LINES COMMAND...: bounded, logged, never fatal; the last LINES of its log are shown
    local name=$1 limit=$(($2 / ${HURRY:-1})) lines=$3 left=$((end - SECONDS)) began=$SECONDS rc=0
    shift 3
    if ((left < 10)); then
        say "== $name: not run, no time left"
        return 1
    fi
    ((limit > left)) && limit=$left
    timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1 || rc=$?
    say "== $name: exit code $rc after $((SECONDS - began)) of $limit s"
    tail -n "$lines" "$work/$name.log" | cut -c 1-200 | tee -a "$out/summary.txt"
    (cd "$work" && tar -czf logs.tar.gz -- *.log) && cp "$work/logs.tar.gz" "$out/"
    return "$rc"
}

wheels() { # those in .whl/, to a temporary folder
    if compgen -G '.whl/*.whl' >/dev/null; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
    fi
}

begin() {
    : >"$out/summary.txt"
    rm -f "$work"/*.log
    say "$(nvidia-smi -L 2>&1), driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1)"
}
export -f wheels
export python site out work
