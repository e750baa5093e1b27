"""with_keys.py URL KEY...: one completion with each key; prints a JSON object of the texts, or the errors' statuses."""

import json
import sys

from openai import APIStatusError, OpenAI

url, *keys = sys.argv[1:]
found: dict[str, object] = {}
for key in keys:
    with OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as client:
        try:
            answer = client.completions.create(model="smollm2", prompt="Hello", max_tokens=4, temperature=0)
            found[key] = answer.choices[0].text
        except APIStatusError as error:
            found[key] = error.status_code
print(json.dumps(found))
