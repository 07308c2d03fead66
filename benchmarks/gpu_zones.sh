#!/usr/bin/env bash
# One run on a machine with a CUDA device and no network: build, test, check with compute-sanitizer, measure.
#   benchmarks/gpu_zones.sh [all|build|test|sanitize|measure|profile]      results in $OUT (default build/gpu_zones)
# Needs nvcc, cmake and a Python with torch, numpy, nanobind and pytest. Wheels in .whl/ (msgspec, where it is missing) and an
# archive .gpu/faiss_*.tar.xz are unpacked to a temporary folder and used if they are there.
set -euo pipefail
cd "$(dirname "$0")/.."
step=${1:-all}
out=${OUT:-build/gpu_zones}
python=$(command -v "${PYTHON:-python3}")
site=${TMPDIR:-/tmp}/dqe_gpu_site
mkdir -p "$out" "$site"
export PYTHONUNBUFFERED=1 PYTHONPATH=$site:$PWD${PYTHONPATH:+:$PYTHONPATH}

wants() { [[ $step == all || $step == "$1" ]]; }

if compgen -G '.whl/*.whl' >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
fi
if compgen -G '.gpu/faiss_*.tar.xz' >/dev/null; then tar -xJf .gpu/faiss_*.tar.xz -C "$site"; fi

if wants build; then
    architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    cmake -S cpp_ext -B build/gpu -DDQE_CUDA=ON -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
        -DCMAKE_CUDA_ARCHITECTURES="$architecture-real" >"$out/build.log"
    cmake --build build/gpu -j "$(nproc)" >>"$out/build.log" 2>&1 || { tail -50 "$out/build.log"; exit 1; }
    cp build/gpu/_kernels*.so build/gpu/cuda/_kernels_cuda*.so dqe_engine/ # git ignores them
fi

if wants test; then
    "$python" -m pytest -q -p no:cacheprovider tests/zones/test_cuda.py 2>&1 | tee "$out/tests.log" | tail -15
fi

if wants sanitize; then
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck initcheck synccheck; do
            # Some 20 requests of every kind; torch's own kernels are left out, since not all of them pass initcheck.
            check=("$python" -m pytest -q -p no:cacheprovider tests/zones/test_cuda.py -k '4097 and 17 or workspace or (129 and 257)')
            verdict=clean
            compute-sanitizer --tool "$tool" --kernel-name kns=dqe --error-exitcode 9 "${check[@]}" >"$out/$tool.log" 2>&1 || verdict="exit $?"
            if ! grep -q SUMMARY "$out/$tool.log"; then # another version of the tool, which filters by another name
                verdict=clean
                compute-sanitizer --tool "$tool" --error-exitcode 9 "${check[@]}" >"$out/$tool.log" 2>&1 || verdict="exit $?"
            fi
            echo "compute-sanitizer $tool: $verdict; $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.log" | tail -1)"
        done
    else
        echo "no compute-sanitizer here"
    fi
fi

if wants measure; then "$python" -m benchmarks.gpu_zones --out "$out" 2>&1 | tee "$out/measure.log"; fi

if wants profile && command -v ncu >/dev/null; then
    ncu --clock-control none --set full --kernel-name regex:scan_kernel --csv --page details \
        "$python" -m benchmarks.gpu_zones --once >"$out/ncu.csv" 2>"$out/ncu.err" || echo "ncu failed: $(tail -1 "$out/ncu.err")"
fi
