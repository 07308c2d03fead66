#!/usr/bin/env bash
# The zone kernels on a machine with a CUDA device and no network, in one call that ends within $BUDGET seconds (default 540).
#   benchmarks/gpu_zones.sh        results in $OUT (default build/gpu_zones): gpu_zones.json, ncu.csv, summary.txt, logs.tar.gz
# In order of value: build, a dozen requests, measure, profile, correctness suite, sanitizers, FAISS-GPU. Every step has a limit of
# its own and none ends the run. Needs nvcc, cmake, ninja and a Python with torch, numpy, nanobind and pytest. Wheels in .whl/
# (msgspec, where it is missing) and an archive .gpu/faiss_*.tar.xz are unpacked to a temporary folder and used if they are there.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu_zones}
work=${TMPDIR:-/tmp}/dqe_gpu
site=$work/site
python=$(command -v "${PYTHON:-python3}")
end=$((SECONDS + ${BUDGET:-540}))
mkdir -p "$out" "$site"
export PATH=/usr/local/cuda/bin:$PATH PYTHONUNBUFFERED=1 PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH} DQE_REQUIRE_GPU=1

say() { echo "$*" | tee -a "$out/summary.txt"; }

step() { # step NAME SECONDS LINES COMMAND...: bounded, logged, never fatal; the last LINES of its log are shown
    local name=$1 limit=$2 lines=$3 left=$((end - SECONDS)) began=$SECONDS rc=0
    shift 3
    if ((left < 10)); then
        say "== $name: not run, no time left"
        return 1
    fi
    ((limit > left)) && limit=$left
    timeout -k 5 "$limit" "$@" >"$work/$name.log" 2>&1 || rc=$?
    say "== $name: exit code $rc after $((SECONDS - began)) of $limit s"
    tail -n "$lines" "$work/$name.log" | tee -a "$out/summary.txt"
    (cd "$work" && tar -czf logs.tar.gz -- *.log) && cp "$work/logs.tar.gz" "$out/"
    return "$rc"
}

unpack() {
    if compgen -G '.whl/*.whl'; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
    fi
}

build() {
    local architecture
    architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    cmake --fresh -S cpp_ext -B build/gpu -G Ninja -DDQE_CUDA=ON -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
        -DCMAKE_CUDA_ARCHITECTURES="$architecture-real" || return
    cmake --build build/gpu -j "$(nproc)" --target _kernels _kernels_cuda || return
    cp build/gpu/_kernels*.so build/gpu/cuda/_kernels_cuda*.so dqe_engine/ # git ignores them
}

profile() {
    local metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active,sm__issue_active.avg.pct_of_peak_sustained_active
    ncu --clock-control none --kernel-name regex:scan --launch-count 6 --section SpeedOfLight --section WarpStateStats \
        --section MemoryWorkloadAnalysis --section Occupancy --section SchedulerStats --metrics "$metrics" --csv --page raw \
        "$python" -m benchmarks.gpu_zones --once >"$out/ncu.csv" || { tail -3 "$out/ncu.csv"; return 1; }
    "$python" - "$out/ncu.csv" <<'P'
import csv, sys
rows = list(csv.reader(line for line in open(sys.argv[1]) if line.startswith('"')))
names, units, launches = rows[0], rows[1], rows[2:]
wanted = ("gpu__time_duration.sum", "dram__throughput.avg.pct", "pipe_tensor", "issue_active.avg.pct", "warps_active.avg.pct", "issue_stalled")
for launch in launches:
    print(launch[names.index("Kernel Name")][:90])
    stalls = []
    for name, unit, value in zip(names, units, launch):
        if "issue_stalled" in name and name.endswith("per_warp_active.pct"):
            stalls.append((float(value.replace(",", "") or 0), name.split("issue_stalled_")[1].split("_per")[0]))
        elif any(part in name for part in wanted) and "issue_stalled" not in name:
            print(f"  {name}: {value} {unit}")
    print("  stalls:", ", ".join(f"{name} {value:.1f}" for value, name in sorted(stalls, reverse=True)[:6]))
P
}


faiss() {
    tar -xJf .gpu/faiss_*.tar.xz -C "$site" && "$python" -m benchmarks.gpu_zones --out "$work" --faiss --batches 1 64 1024 &&
        cp "$work/gpu_zones.json" "$out/gpu_zones_faiss.json"
}

: >"$out/summary.txt"
say "$(nvidia-smi -L 2>&1), driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1)"
export -f unpack build profile faiss
export python site out work
step unpack 30 3 bash -c unpack
step build 120 4 bash -c build || tail -n 40 "$work/build.log"
step requests 60 14 "$python" -m benchmarks.gpu_requests
step measure 150 60 "$python" -m benchmarks.gpu_zones --out "$out"
step profile 60 40 bash -c profile
step test 120 12 "$python" -m pytest -q -n 8 -p no:cacheprovider tests/zones/test_cuda.py
for tool in memcheck racecheck synccheck initcheck; do step "$tool" 40 3 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.gpu_requests; done
if compgen -G '.gpu/faiss_*.tar.xz' >/dev/null; then step faiss 60 30 bash -c faiss; fi
exit 0
