"""One streamed chat: stream.py URL QUESTION MAX_TOKENS [ignore_eos]. Prints a JSON line for each chunk.

Each line has the time at which its chunk came; the last has the whole text, its finish reason and the usage.
"""

import json
import sys
import time

from openai import OpenAI

url, question, max_tokens, *flags = sys.argv[1:]
client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
model = client.models.list().data[0].id
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    max_tokens=int(max_tokens),
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"ignore_eos": True} if flags else {},
)
text, finish_reason, num_tokens = "", None, None
for chunk in stream:
    if chunk.usage is not None:
        num_tokens = chunk.usage.completion_tokens
    for choice in chunk.choices:
        text += choice.delta.content or ""
        finish_reason = choice.finish_reason or finish_reason
        if choice.delta.content:
            print(json.dumps({"at": time.time(), "text": choice.delta.content}), flush=True)
end = {"at": time.time(), "whole": text, "finish_reason": finish_reason, "num_tokens": num_tokens}
print(json.dumps(end), flush=True)
