#!/bin/bash
# On a GPU machine, in the repository root: starts an engine some times, each time for all workloads of docs/performance.md.
# Usage: tests/gpu/starts.sh OUT_DIR MODEL_DIR CLIENT [STARTS]
# CLIENT is the Python program whose figures the table has, called as CLIENT URL MODEL WORKLOAD key=value ...: it sends the
# same prompts each time, which the prefix cache would serve, so an engine gets each workload once.
set -eu
out=$1 model=$2 client=$3
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
tell_memory() {
    echo "$1: $(nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader) of the device's memory taken"
}
for start in $(seq "${4:-3}"); do
    began=$(date +%s%N)
    python3 -m toka_engine model="$model" served_model_name=m port=10310 >"$out/engine-$start.log" 2>&1 &
    engine=$!
    until grep -q "component=supervisor .* event=ready" "$out/engine-$start.log"; do
        kill -0 $engine
        sleep 0.1
    done
    echo "start $start: ready after $((($(date +%s%N) - began) / 1000000)) ms"
    tell_memory "when ready"
    grep "event=memory\|event=triton_kernels_ready" "$out/engine-$start.log" || true
    for workload in "single N=3" prefill chat "monkeys P=32 n=256" "sharegpt N=8192 C=8192"; do
        # shellcheck disable=SC2086
        python3 "$client" http://127.0.0.1:10310 m $workload
    done
    tell_memory "after all workloads"
    kill $engine
    wait $engine
done
