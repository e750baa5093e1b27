"""The tokens that transformers generates greedily in fp32 from the same folder are the truth of the parity tests.

That takes a minute on two cores, so the answers are kept in the cache folder under a key of all that they depend
on: weights, prompts, versions. `python -m tests.api.reference` makes them ahead of the tests, whose time limit would
count it; otherwise one of several test processes does, and the others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from toka_engine.builtin import cache_dir, ensure_builtin

NUM_TOKENS = 64
ONE_PAGE = 16
"""Tokens with which each answer goes on in another page: for tests that take many steps otherwise."""

_SHARED = (
    "You are the keeper of a lighthouse on a small island in the north. Every evening you climb the two hundred and "
    "twelve steps, clean the lens, wind the clockwork and light the lamp. You write in a log book what ships pass, "
    "what the wind does, how high the waves are and whether the fog signal had to be sounded. You have done this for "
    "thirty-one years. You answer letters from children who ask about the sea, about whales and birds, about storms "
    "and about the ships that were lost. You always answer truthfully, in plain words and in short sentences, and "
    "you never pretend to know what you do not know. A letter has come today, and this is what it asks: "
)
PROMPTS = [
    *(
        _SHARED + question
        for question in (
            "Why is the sea salty?",
            "How do birds find their way?",
            "Have you ever seen a whale?",
            "What is the fog signal for?",
            "Are you lonely?",
            "How far does the light reach?",
            "What was the worst storm?",
            "Who brings you food?",
        )
    ),
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5, 6,",
    "Once upon a time, in a village by the river,",
    "Die Hauptstadt von Deutschland ist",
    "Le chat noir dort sur",
    "SELECT name, age FROM people WHERE",
    '{"name": "Ada", "born": 1815, "known_for": "',
    "The three laws of thermodynamics are:\n\n1.",
    "Q: What is 7 times 8?\nA:",
    "日本の首都は",
    "a",
]


def greedy_answers(model_dir: Path, prompts: Sequence[str]) -> list[list[int]]:
    """The first NUM_TOKENS greedy token ids of each prompt, whatever end token comes."""
    with (model_dir / "model.safetensors").open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256")
    versions = [version(name) for name in ("transformers", "torch")]
    digest.update(json.dumps([list(prompts), NUM_TOKENS, versions]).encode())
    path = cache_dir() / "tests" / f"greedy-{digest.hexdigest()[:32]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            temporary = path.with_suffix(".part")
            temporary.write_text(json.dumps(_generate(model_dir, prompts)))
            temporary.replace(path)
    loaded: list[list[int]] = json.loads(path.read_text())
    return loaded


def _generate(model_dir: Path, prompts: Sequence[str]) -> list[list[int]]:
    """Candidates from one batch, each then proved by a forward pass of its own: what is proved is what counts.

    If every token of an answer is the most likely one after its prompt and the tokens before it, the answer is the
    greedy one, by induction. That takes a fortieth of the time of generating one after another.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    answers = []
    with torch.inference_mode():
        outputs = model.generate(**batch, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
        for ids, mask, output in zip(batch["input_ids"], batch["attention_mask"], outputs, strict=True):
            prompt, answer = ids[mask.bool()], output[ids.shape[0] :]
            logits = model(torch.cat([prompt, answer])[None]).logits[0, prompt.shape[0] - 1 : -1]
            assert torch.equal(logits.argmax(-1), answer), "two tokens are equally likely: take another prompt"
            answers.append(answer.tolist())
    return answers


def find_model() -> Path:
    """The folder of the model under test: MODEL, by default the embedded one (converted on first use)."""
    configured = os.environ.get("MODEL")
    return Path(configured) if configured else ensure_builtin()


if __name__ == "__main__":
    greedy_answers(find_model(), PROMPTS)
