#!/bin/bash
# On a GPU machine, in the repository root: correctness first, then timing. Usage: tests/gpu/run.sh OUT_DIR MODEL_DIR [PART ...]
# MODEL_DIR holds a model of the Llama-3.2-1B shape; TOKA_BUILTIN_DIR may name a folder with the built-in one. Details go to
# OUT_DIR; each part, or each that is named, runs whatever the others gave; the exit code is 1 if one of them failed.
out=$1
model=$2
shift 2
wanted=" $* "
num_wanted=$#
failed=0
export PYTHONUNBUFFERED=1 TOKA_TEST_KERNELS=gpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    [[ $wanted = "  " || $wanted = *" $name "* ]] || return 0
    num_wanted=$((num_wanted - 1))
    local began=$SECONDS code=0
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1 || code=$? failed=1
    echo "== $name rc=$code $((SECONDS - began)) s"
    tail -n "${lines:-15}" "$out/$name.log" | cut -c-400
}
pytest="python3 -m pytest -c tests/gpu/pytest.ini --rootdir . -q --tb=short -p no:cacheprovider"
part kernels 150 $pytest tests/unit/kernels --ignore tests/unit/kernels/test_paged_attention.py \
    --ignore tests/unit/kernels/test_fp8_paged_attention.py --ignore tests/unit/kernels/test_gluon_simulator.py
part attention 100 $pytest tests/gpu/test_attention.py
part parity 120 $pytest tests/gpu/test_parity.py
part torch_compile 300 $pytest tests/gpu/test_torch_compile.py
part smollm2 120 $pytest tests/gpu/test_smollm2.py
part fp8 150 $pytest -rP tests/gpu/test_fp8.py tests/unit/kernels/test_fp8_kernels.py
part decode_graphs 90 $pytest tests/gpu/test_decode_graphs.py
part layer_graphs 150 $pytest tests/gpu/test_layer_graphs.py
part memory 60 $pytest tests/gpu/test_memory.py
part penalties 90 $pytest tests/gpu/test_penalties.py
part logit_edits 90 $pytest tests/gpu/test_logit_edits.py
part grammars 90 $pytest tests/gpu/test_grammars.py
part built_kernels 120 $pytest tests/gpu/test_built_kernels.py
part running_ahead 120 $pytest tests/gpu/test_running_ahead.py
[[ $(nvidia-smi --list-gpus | wc -l) -lt 2 && $wanted != *" tensor_parallel "* ]] ||
    part tensor_parallel 460 $pytest -s tests/gpu/test_tensor_parallel.py tests/gpu/test_tensor_parallel_text.py
part async_tensor_parallel 240 $pytest -s tests/gpu/test_async_tensor_parallel.py
[[ $(nvidia-smi --list-gpus | wc -l) -lt 2 && $wanted != *" pipeline_parallel "* ]] ||
    part pipeline_parallel 300 $pytest -s tests/gpu/test_pipeline_parallel.py
lines=60 part bench_kernels 60 python3 tests/gpu/bench_kernels.py
lines=90 part bench_gemv 60 python3 tests/gpu/bench_gemv.py
lines=60 part bench_fp8 90 python3 -m tests.gpu.bench_fp8
lines=60 part bench_async_tp 120 python3 -m tests.gpu.bench_async_tp
lines=160 part bench_fp8_cache 120 python3 -m tests.gpu.bench_fp8_cache
lines=90 part bench_decode_attention 60 python3 -m tests.gpu.bench_decode_attention
lines=90 part bench_prefix_attention 60 python3 -m tests.gpu.bench_prefix_attention
lines=190 part bench_suffix_attention 90 python3 -m tests.gpu.bench_suffix_attention
lines=25 part bench_step 120 python3 tests/gpu/bench_step.py "$model" "$out"
lines=25 part bench_step_large_graphs 120 python3 tests/gpu/bench_step.py "$model" "$out" 4096
lines=25 part bench_step_compiled 180 python3 tests/gpu/bench_step.py "$model" "$out" 4096 torch_compile=T
lines=60 part versus_compiled 180 python3 -m toka_engine.benchmarks.step "$model" --rows 1,64,1024 --suffix 512 \
    --prefill 2048,8192 --key kv_cache_num_tokens=700000 --versus torch_compile=T
lines=90 part mixed_steps 180 python3 -m toka_engine.benchmarks.step "$model" --rows 64,256 --suffix 512 --prefill 256 \
    --mixed 64,256,700 --key kv_cache_num_tokens=300000 --key cudagraph_max_prefill_size=0 \
    --versus cudagraph_max_prefill_size=1024
part soak 640 python3 -m toka_engine.benchmarks.soak "$model" minutes=8 check_minutes=1 clients=64 checkers=64
if [[ $num_wanted -gt 0 ]]; then
    echo "no such part: $wanted" >&2
    failed=1
fi
exit $failed
