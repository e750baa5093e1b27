#!/bin/bash
# On a GPU machine, in the repository root: an engine in bf16, then one in fp8, each under the workloads of docs/performance.md.
# Usage: tests/gpu/fp8.sh OUT_DIR MODEL_DIR CLIENT [WORKLOAD ...]
# CLIENT is called as CLIENT URL MODEL WORKLOAD key=value ...; a WORKLOAD is one word or several in quotes.
set -eu
out=$1 model=$2 client=$3
shift 3
[[ $# -gt 0 ]] || set -- "single N=3" "prefill N=128" "chat N=512" "monkeys P=16 n=128" "sharegpt N=2048 C=2048"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
for quantization in none fp8; do
    began=$(date +%s%N)
    python3 -m toka_engine model="$model" served_model_name=m port=10310 quantization=$quantization \
        >"$out/engine-$quantization.log" 2>&1 &
    engine=$!
    until grep -q "component=supervisor .* event=ready" "$out/engine-$quantization.log"; do
        kill -0 $engine || { tail -n 20 "$out/engine-$quantization.log" | cut -c-400; exit 1; }
        sleep 0.1
    done
    echo "quantization=$quantization: ready after $((($(date +%s%N) - began) / 1000000)) ms"
    grep -h "event=memory\|event=fp8\|event=dequantised\|event=triton_kernels" "$out/engine-$quantization.log" || true
    for workload in "$@"; do
        # shellcheck disable=SC2086
        python3 "$client" http://127.0.0.1:10310 m $workload
    done
    kill $engine
    wait $engine
done
