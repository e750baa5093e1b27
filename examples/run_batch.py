"""Send a file of questions as a batch with the stock OpenAI client, wait for it, and print the answers.

pip install openai; python examples/run_batch.py [BASE_URL]    (TOKA_API_KEY, if the server wants a key)

The server needs a folder for batches: toka ... data_dir=/var/lib/toka
"""

import json
import os
import sys
import time

from openai import OpenAI

QUESTIONS = [f"What is the capital of {country}?" for country in ("France", "Japan", "Kenya", "Peru")]
URL = "/v1/chat/completions"


def main() -> None:
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:10210/v1"
    with OpenAI(base_url=base_url, api_key=os.environ.get("TOKA_API_KEY", "none"), timeout=600) as client:
        model = client.models.list().data[0].id
        lines = [
            {
                "custom_id": question,
                "method": "POST",
                "url": URL,
                "body": {
                    "model": model,
                    "messages": [{"role": "user", "content": question}],
                    "max_tokens": 24,
                    "temperature": 0,
                },
            }
            for question in QUESTIONS
        ]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = client.files.create(file=("questions.jsonl", data), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        while batch.status in ("validating", "in_progress", "finalizing"):
            time.sleep(0.5)
            batch = client.batches.retrieve(batch.id)
        print(f"{batch.id}: {batch.status}, {batch.request_counts.completed} of {batch.request_counts.total} answered")
        if batch.output_file_id:
            for line in client.files.content(batch.output_file_id).text.splitlines():
                answer = json.loads(line)
                print(f"{answer['custom_id']}  {answer['response']['body']['choices'][0]['message']['content']!r}")


if __name__ == "__main__":
    main()
