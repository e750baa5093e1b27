"""batch_lives.py URL LINES: a batch through the Service, polled until it is over; one JSON line of what came of it.

Every request is on a connection of its own, so that polls reach any pod. 503 is tried again, as the openai client does.
"""

import io
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from openai import APIError, OpenAI

url, num_lines = sys.argv[1], int(sys.argv[2])
refusals: list[str] = []
OVER = ("completed", "failed", "expired", "cancelled")


def ask(action: Callable[[OpenAI], Any]) -> Any:
    """The answer of a call, however often a pod has to be tried."""
    while True:
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            try:
                return action(client)
            except APIError as error:
                if getattr(error, "status_code", 503) != 503:
                    raise
                refusals.append(str(error))
        time.sleep(0.5)


body = {"model": "smollm2", "prompt": "Hello", "max_tokens": 8}
lines = [
    {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
    for number in range(num_lines)
]
data = "".join(json.dumps(line) + "\n" for line in lines).encode()
file = ask(lambda client: client.files.create(file=("lines.jsonl", io.BytesIO(data)), purpose="batch"))
batch = ask(
    lambda client: client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
)
print(json.dumps({"batch": batch.id, "file": file.id}), flush=True)


def poll(client: OpenAI) -> Any:
    return client.batches.retrieve(batch.id)


seen = -1
while batch.status not in OVER:
    batch = ask(poll)
    if batch.request_counts and batch.request_counts.completed != seen:
        seen = batch.request_counts.completed
        print(json.dumps({"completed": seen}), flush=True)
    time.sleep(0.5)
content = ask(lambda client: client.files.content(batch.output_file_id).content)
names = [json.loads(line)["custom_id"] for line in content.splitlines()]
listed = [found.id for found in ask(lambda client: client.batches.list()).data]
print(
    json.dumps(
        {
            "status": batch.status,
            "lost": num_lines - len(set(names)),
            "repeated": len(names) - len(set(names)),
            "errors": batch.error_file_id,
            "is_listed": batch.id in listed,
            "refusals": len(refusals),
        }
    ),
    flush=True,
)
