#!/usr/bin/env bash
# The exported graphs on a machine with a CUDA device and no network, in one call that ends within $BUDGET seconds (default 230).
#   benchmarks/gpu_graphs.sh FOLDER        results in $OUT (default build/gpu_graphs): gpu_graphs.json, summary.txt, logs.tar.gz
# FOLDER: from `python -m benchmarks.gpu_graphs_prepare`, with small/ and full/, and if it is there ort_gpu.tar.xz (onnxruntime-gpu,
# unpacked to a temporary folder). In order of value: the small model's graphs, the full-size query encoder, the full-size vision tower,
# PyTorch compiled. Needs a Python with torch, transformers, onnx, safetensors and tokenizers, and 7 GB of disk or shared memory.
cd "$(dirname "$0")/.." || exit
folder=${1:?folder with the graphs}
name=gpu_graphs BUDGET=${BUDGET:-230}
. benchmarks/gpu_steps.sh
graphs=$work
room() { df --output=avail -B1G "$1" 2>/dev/null | tail -1; }
if [[ -w /dev/shm ]] && (($(room /dev/shm) > 24)); then graphs=$(mktemp -d /dev/shm/dqe_gpu.XXXX); fi
trap '[[ $graphs == "$work" ]] || rm -rf "$graphs"' EXIT
export PYTHONPATH=$work/ort:$PYTHONPATH folder

unpack() {
    wheels || return
    if [[ -f $folder/ort_gpu.tar.xz ]]; then
        mkdir -p "$work/ort" && tar -xJf "$folder/ort_gpu.tar.xz" -C "$work/ort" || return
    fi
    "$python" -c 'import torch, onnxruntime as o, transformers, onnx; print("onnxruntime", o.__version__, o.get_available_providers()); print("torch", torch.__version__, "transformers", transformers.__version__, "onnx", onnx.__version__, "CUDA", torch.cuda.is_available())'
    "$python" -c 'import tensorrt; print("tensorrt", tensorrt.__version__)' || true
}

run() { # run NAME SECONDS WHAT MODEL GRAPHS-AND-OPTIONS...
    local name=$1 limit=$2 what=$3 model=$4
    shift 4
    step "$name" "$limit" 60 "$python" -m benchmarks.gpu_graphs "$what" "$folder/$model" "$@" --out "$out" --work "$graphs/$model" \
        --device "${DEVICE:-cuda}"
    rm -rf "${graphs:?}/$model"
}

begin
# ONNX Runtime finds CUDA's libraries where PyTorch has them.
libraries=$("$python" -c 'import glob, nvidia; print(":".join(glob.glob(f"{list(nvidia.__path__)[0]}/*/lib")))' 2>/dev/null)
export -f unpack
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
step unpack 60 6 bash -c unpack
run small 45 measure small query_encoder vision_encoder --seconds 0.3
run query 75 measure full query_encoder --layers
run vision 120 measure full vision_encoder --layers
run query_compiled 90 compile full query_encoder --batches 1 64
run vision_compiled 150 compile full vision_encoder --batches 1 64
exit 0
