"""Uses guidellm's benchmark with its defaults: it asks /health first, then streams with usage in every event."""

import json
import subprocess
import sys
from pathlib import Path

url, model_folder = sys.argv[1:]
command = [
    str(Path(sys.executable).parent / "guidellm"),
    "run",
    *("--backend", f"kind=openai_http,target={url}"),  # the model is asked for
    *("--profile", "kind=concurrent,streams=2"),
    *("--constraint", "kind=max_requests,count=4"),
    *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
    *("--tokenizer", f"kind=hf_auto,model={model_folder}"),
    *("--output", "kind=json,path=report.json"),
    "--disable-console-interactive",
]
subprocess.run(command, check=True)
(benchmark,) = json.loads(Path("report.json").read_text())["benchmarks"]
metrics = benchmark["metrics"]
assert metrics["request_totals"]["successful"] == 4, metrics["request_totals"]
assert metrics["request_totals"]["errored"] == 0, metrics["request_totals"]
tokens = metrics["output_token_count"]["successful"]
assert tokens["min"] == tokens["max"] == 8, tokens
first = metrics["time_to_first_token_ms"]["successful"]
assert 0 < first["min"] <= first["max"] < metrics["request_latency"]["successful"]["max"] * 1000
assert metrics["inter_token_latency_ms"]["successful"]["max"] > 0
