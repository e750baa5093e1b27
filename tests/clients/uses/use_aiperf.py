"""Uses aiperf's profile of streamed chats with an exact number of tokens, and of completions; it reads /metrics too."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

url, model_folder = sys.argv[1:]
NUM_REQUESTS, NUM_TOKENS = 4, 8


def profile(name: str, *options: str) -> dict[str, Any]:
    command = [
        str(Path(sys.executable).parent / "aiperf"),
        "profile",
        *("--model", "smollm2", "--url", url, "--tokenizer", model_folder),
        *("--request-count", str(NUM_REQUESTS), "--concurrency", "2", "--isl", "32", "--osl", str(NUM_TOKENS)),
        *("--output-artifact-dir", name, "--ui", "none"),
        *options,
    ]
    subprocess.run(command, check=True)
    report = json.loads((Path(name) / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == NUM_REQUESTS, report["request_count"]
    assert not report["error_summary"], report["error_summary"]
    return report


exact = ("--extra-inputs", f"min_tokens:{NUM_TOKENS}", "--extra-inputs", "ignore_eos:true")
chat = profile("chat", "--endpoint-type", "chat", "--streaming", *exact)
tokens = chat["usage_completion_tokens"]
assert tokens["min"] == tokens["max"] == NUM_TOKENS, tokens
assert 0 < chat["time_to_first_token"]["min"] <= chat["request_latency"]["max"]
assert chat["inter_token_latency"]["max"] > 0
scraped = json.loads((Path("chat") / "server_metrics_export.json").read_text())["summary"]
assert scraped["endpoints_successful"] == [f"{url}/metrics"], scraped
completions = profile("completions", "--endpoint-type", "completions")
assert completions["usage_completion_tokens"]["max"] <= NUM_TOKENS
