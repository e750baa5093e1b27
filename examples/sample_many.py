"""Draw 256 samples of one question over HTTP with the stock OpenAI client, and count the answers.

pip install openai; python examples/sample_many.py [BASE_URL] [N]    (TOKA_API_KEY, if the server wants a key)
"""

import os
import sys
from collections import Counter

from openai import OpenAI

QUESTION = "Name one planet of the solar system. Answer with its name only."


def main() -> None:
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:10210/v1"
    num_samples = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    with OpenAI(base_url=base_url, api_key=os.environ.get("TOKA_API_KEY", "none"), timeout=600) as client:
        model = client.models.list().data[0].id
        # One request: the question is computed once, and its KV cache is shared by all samples.
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], n=num_samples, max_tokens=12
        )
    counts = Counter((choice.message.content or "").strip() for choice in answer.choices)
    for text, count in counts.most_common(10):
        print(f"{count:5d}  {text!r}")
    print(f"{len(answer.choices)} samples, {len(counts)} different ones")


if __name__ == "__main__":
    main()
