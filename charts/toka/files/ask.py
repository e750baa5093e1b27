"""Asks an OpenAI-compatible endpoint for its models and for one completion; fails unless both are answered."""

import json
import os
import time
import urllib.error
import urllib.request

URL = os.environ["URL"]
DEADLINE = time.monotonic() + float(os.environ["TIMEOUT_SECONDS"])


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except OSError as error:
            is_refusal = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if is_refusal or time.monotonic() > DEADLINE:
                raise SystemExit(f"{URL}{path}: {error}") from error
            time.sleep(1)


model = ask("/models")["data"][0]["id"]
text = ask("/completions", {"model": model, "prompt": "Hello", "max_tokens": 8})["choices"][0]["text"]
print(f"{model} answered: {text!r}")
