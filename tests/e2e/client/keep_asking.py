"""keep_asking.py URL SECONDS: one completion after another, each on a new connection; a JSON line for each.

A line has the time, and either the text or the error. Nothing is retried.
"""

import json
import sys
import time

from openai import APIError, OpenAI

url, seconds = sys.argv[1], float(sys.argv[2])
deadline = time.monotonic() + seconds
while time.monotonic() < deadline:
    line: dict[str, object] = {"at": time.time()}
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        try:
            answer = client.completions.create(model="smollm2", prompt="Hello", max_tokens=4, temperature=0)
            line["text"] = answer.choices[0].text
        except APIError as error:
            line["error"] = repr(error)
    print(json.dumps(line), flush=True)
