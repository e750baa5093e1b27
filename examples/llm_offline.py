"""Sample in a script, without a server: one engine, in processes of its own, that ends with the `with` block.

pip install 'toka[engine]'; python examples/llm_offline.py [MODEL_FOLDER_OR_HUB_NAME]
"""

import sys

from toka_engine import LLM

QUESTIONS = ["What is the capital of France?", "Name a prime number above 100."]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "builtin://smollm2"
    with LLM(model, kv_cache_num_tokens=32 * 1024) as llm:
        # Each prompt is computed once, however many samples are drawn from it.
        for output in llm.generate(["The three primary colours are", "Once upon a time"], n=4, max_tokens=16):
            print(f"{output.prompt} ...")
            for choice in output.choices:
                print(f"  {choice.index}: {choice.text!r} ({choice.finish_reason})")

        conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
        for question, output in zip(QUESTIONS, llm.chat(conversations, max_tokens=48, temperature=0), strict=True):
            print(f"{question}\n  {output.texts[0]}")

        print("A stream: The sea is", end="", flush=True)
        for piece in llm.stream("The sea is", max_tokens=16, temperature=0):
            print(piece.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
