"""One completion: complete.py URL PROMPT MAX_TOKENS. Prints its text."""

import sys

from openai import OpenAI

url, prompt, max_tokens = sys.argv[1:]
client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
model = client.models.list().data[0].id
answer = client.completions.create(model=model, prompt=prompt, max_tokens=int(max_tokens), temperature=0)
print(answer.choices[0].text)
