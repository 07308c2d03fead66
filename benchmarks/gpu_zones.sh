#!/usr/bin/env bash
# The zone kernels on a machine with a CUDA device and no network, in one call that ends within $BUDGET seconds (default 540).
#   benchmarks/gpu_zones.sh        results in $OUT (default build/gpu_zones): gpu_zones.json, ncu.csv, summary.txt, logs.tar.gz
# In order of value: build, a dozen requests, measure, a timeline of single calls, graphs and search together, profile, correctness suite,
# sanitizers, FAISS-GPU.
# Every step has a limit of its own and none ends the run. Needs nvcc, cmake, ninja and a Python with torch, numpy, nanobind and pytest.
# Wheels in .whl/ (msgspec, where it is missing) and an archive .gpu/faiss_*.tar.xz are unpacked to a temporary folder and used if they
# are there; so are, for graphs and search together, .gpu/ort_gpu*.tar.xz (onnxruntime-gpu) and the models in .gpu/graphs/ (from
# `python -m benchmarks.gpu_graphs_prepare`), which need transformers, onnx, safetensors and tokenizers, too.
cd "$(dirname "$0")/.." || exit
name=gpu_zones BUDGET=${BUDGET:-540}
. benchmarks/gpu_steps.sh
export DQE_REQUIRE_GPU=1

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
    ncu --clock-control none --kernel-name "regex:scan|sieve|screen|zone|sample|hopper" --launch-count 20 --section SpeedOfLight --section WarpStateStats \
        --section MemoryWorkloadAnalysis --section Occupancy --section SchedulerStats --metrics "$metrics" --csv --page raw \
        "$python" -m benchmarks.gpu_zones --once >"$out/ncu.csv" || { tail -3 "$out/ncu.csv"; return 1; }
    "$python" -m benchmarks.ncu_summary "$out/ncu.csv"
}

chain() {
    local libraries folder rc=0
    mkdir -p "$work/ort" && tar -xJf .gpu/ort_gpu*.tar.xz -C "$work/ort" || return
    # ONNX Runtime finds CUDA's libraries where PyTorch has them.
    libraries=$("$python" -c 'import glob, nvidia; print(":".join(glob.glob(f"{list(nvidia.__path__)[0]}/*/lib")))' 2>/dev/null)
    export PYTHONPATH=$work/ort:$PYTHONPATH LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    for folder in .gpu/graphs/small .gpu/graphs/full; do # weights of the full size take a minute to make
        [[ -d $folder ]] || continue
        "$python" -m benchmarks.gpu_chain "$folder" --out "$out" --work "$work/chain" || rc=1
        rm -rf "$work/chain"
    done
    return $rc
}

faiss() {
    tar -xJf .gpu/faiss_*.tar.xz -C "$site" && "$python" -m benchmarks.gpu_zones --out "$work" --faiss --batches 1 64 1024 &&
        cp "$work/gpu_zones.json" "$out/gpu_zones_faiss.json"
}

begin
export -f build chain profile faiss
step wheels 30 3 bash -c wheels
step build 120 4 bash -c build || tail -n 40 "$work/build.log"
step requests 60 14 "$python" -m benchmarks.gpu_requests
step measure 150 100 "$python" -m benchmarks.gpu_zones --out "$out"
step timeline 40 60 "$python" -m benchmarks.gpu_timeline
if compgen -G '.gpu/ort_gpu*.tar.xz' >/dev/null; then step chain 120 30 bash -c chain; fi
step profile 60 14 bash -c profile
step test 120 12 "$python" -m pytest -q -n 8 -p no:cacheprovider tests/zones/test_cuda.py
for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" 40 5 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.gpu_requests
done
if compgen -G '.gpu/faiss_*.tar.xz' >/dev/null; then step faiss 60 30 bash -c faiss; fi
exit 0
