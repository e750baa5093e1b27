"""load.py URL MODEL CLIENTS TOKENS PAUSE: so many clients stream one completion after another, until SIGTERM.

Half of the clients keep their connection, half make a new one for each request, as programs do. Each pauses for so many
seconds between two requests. The first line is this process's pid. A JSON line for each request says when it began and
ended and, if not every token came, what broke. Nothing is retried. A line with `stalled_s` says that this process
itself stood still for so long until then, as it does where it gets no processor.
"""

import asyncio
import json
import os
import signal
import sys
import time

import httpx2
from openai import AsyncOpenAI, OpenAIError

url, model, num_clients, num_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pause_s, STALLED_S = float(sys.argv[5]), 2.0
is_over = asyncio.Event()


def connect() -> AsyncOpenAI:
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)


async def ask(client: AsyncOpenAI) -> dict[str, object]:
    line: dict[str, object] = {"began": time.time()}
    came, reason = 0, None
    try:
        stream = await client.completions.create(
            model=model,
            prompt="Tell me a story.",
            max_tokens=num_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            came = chunk.usage.completion_tokens if chunk.usage else came
            reason = next((choice.finish_reason for choice in chunk.choices if choice.finish_reason), reason)
        if (came, reason) != (num_tokens, "length"):
            line["error"] = f"the stream ended after {came} tokens with {reason}"
    except (OpenAIError, httpx2.HTTPError, OSError) as error:
        line["error"] = repr(error)
    return {**line, "ended": time.time()}


async def go_on(number: int) -> None:
    kept = connect() if number % 2 else None
    while not is_over.is_set():
        client = kept or connect()
        print(json.dumps(await ask(client)), flush=True)
        if kept is None:
            await client.close()
        await asyncio.sleep(pause_s)


async def watch_clock() -> None:
    while not is_over.is_set():
        before = time.time()
        await asyncio.sleep(0.2)
        stalled_s = time.time() - before - 0.2
        if stalled_s > STALLED_S:
            print(json.dumps({"stalled_s": round(stalled_s, 1), "at": time.time()}), flush=True)


async def main() -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, is_over.set)
    print(json.dumps({"pid": os.getpid()}), flush=True)
    await asyncio.gather(watch_clock(), *(go_on(number) for number in range(num_clients)))


asyncio.run(main())
