#!/bin/bash
# On a GPU machine, in the repository root: engines in bf16, in fp8, and with the KV cache in fp8 as well, each under the workloads of
# docs/performance.md.
# Usage: tests/gpu/fp8.sh OUT_DIR MODEL_DIR CLIENT [WORKLOAD ...]
# CLIENT is called as CLIENT URL MODEL WORKLOAD key=value ...; a WORKLOAD is one word or several in quotes.
set -eu
out=$1 model=$2 client=$3
shift 3
[[ $# -gt 0 ]] || set -- "single N=3" "prefill N=128" "chat N=512" "monkeys P=16 n=128" "sharegpt N=2048 C=2048"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
for settings in "quantization=none" "quantization=fp8" "quantization=fp8 kv_cache_dtype=fp8"; do
    name=${settings// /-}
    began=$(date +%s%N)
    # shellcheck disable=SC2086
    python3 -m toka_engine model="$model" served_model_name=m port=10310 $settings >"$out/engine-$name.log" 2>&1 &
    engine=$!
    until grep -q "component=supervisor .* event=ready" "$out/engine-$name.log"; do
        kill -0 $engine || { tail -n 20 "$out/engine-$name.log" | cut -c-400; exit 1; }
        sleep 0.1
    done
    echo "$settings: ready after $((($(date +%s%N) - began) / 1000000)) ms"
    grep -h "event=memory\|event=fp8\|event=dequantised\|event=no_kv_scales\|event=triton_kernels" "$out/engine-$name.log" || true
    for workload in "$@"; do
        # shellcheck disable=SC2086
        python3 "$client" http://127.0.0.1:10310 m $workload
    done
    kill $engine
    wait $engine
done
