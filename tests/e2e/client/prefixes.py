"""prefixes.py URL MODEL PREFIXES REPEATS WORDS CLIENTS SEED: requests of which several begin with the same words.

So many prefixes, each of so many words, are asked so many times each, every time with another end, in an order that
the seed gives, by so many clients, each on a connection of its own for each request. Prints one JSON line: how many
answers came, what else did, and how long all took. Nothing is retried.
"""

import asyncio
import json
import random
import sys
import time

import httpx2
from openai import AsyncOpenAI, OpenAIError

url, model = sys.argv[1], sys.argv[2]
num_prefixes, num_repeats, num_words, num_clients, seed = map(int, sys.argv[3:])
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"]


async def ask(prompt: str) -> str:
    """The error of one request; empty if it was answered."""
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
        try:
            await client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0)
        except (OpenAIError, httpx2.HTTPError, OSError) as error:
            return repr(error)
    return ""


async def main() -> None:
    chance, errors = random.Random(seed), []
    prefixes = [" ".join(chance.choices(WORDS, k=num_words)) for _ in range(num_prefixes)]
    prompts = [f"{prefix} number {number}" for prefix in prefixes for number in range(num_repeats)]
    chance.shuffle(prompts)

    async def go_on() -> None:
        while prompts:
            errors.append(await ask(prompts.pop()))

    began = time.time()
    await asyncio.gather(*(go_on() for _ in range(num_clients)))
    failed = [error for error in errors if error]
    print(json.dumps({"answered": len(errors) - len(failed), "failed": failed, "seconds": time.time() - began}))


asyncio.run(main())
