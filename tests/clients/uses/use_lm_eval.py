"""Uses lm-eval on bundled data; answers and logprobs are compared with those of its own transformers backend."""

import logging
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OPENAI_API_KEY="none")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

logging.getLogger().setLevel(logging.ERROR)
url, model_folder = sys.argv[1:]
COMPLETIONS = ("local-completions", "/v1/completions")
CHAT = ("local-chat-completions", "/v1/chat/completions")


def evaluate(tasks: TaskManager, model: object, task: str, chat: bool = False, **options: object) -> tuple[list, dict]:
    """The answer to each request in the order of the documents, and the task's scores."""
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=tasks,
        apply_chat_template=chat,
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    answers = [answer for sample in samples for answer in sample["resps"]]
    scores = {key: score for key, score in found["results"][task].items() if key.split(",")[0] in METRICS}
    assert scores
    return answers, scores


METRICS = ("exact_match", "acc", "bits_per_byte")


def served(tasks: TaskManager, endpoint: tuple[str, str], task: str, **options: object) -> tuple[list, dict]:
    name, path = endpoint
    arguments = {"base_url": url + path, "model": "smollm2", "max_retries": 1, **options}
    return evaluate(tasks, name, task, chat=endpoint is CHAT, model_args=arguments)


def agree(found: object, expected: object) -> bool:
    """Equal, and numbers to four digits."""
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(agree, found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(agree(found[key], expected[key]) for key in expected)
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-4)
    return found == expected


def check(found: tuple[list, dict], expected: tuple[list, dict]) -> None:
    assert agree(found, expected), f"{found} is not {expected}"


def run(tasks: TaskManager) -> None:
    transformers = HFLM(pretrained=model_folder, dtype="float32", device="cpu")
    answers = evaluate(tasks, transformers, "capitals_generate")
    assert all(text.strip() for (text,) in answers[0]), answers
    check(served(tasks, COMPLETIONS, "capitals_generate", num_concurrent=4), answers)
    check(served(tasks, COMPLETIONS, "capitals_generate", batch_size=3, tokenized_requests=False), answers)
    check(
        served(tasks, CHAT, "capitals_generate", num_concurrent=2),
        evaluate(tasks, transformers, "capitals_generate", True),
    )
    choices = evaluate(tasks, transformers, "capitals_choice")
    assert choices[1]["acc,none"] >= 0.5, choices
    check(served(tasks, COMPLETIONS, "capitals_choice", batch_size=2), choices)
    check(served(tasks, COMPLETIONS, "capitals_rolling"), evaluate(tasks, transformers, "capitals_rolling"))


with tempfile.TemporaryDirectory() as folder:
    os.environ["HF_DATASETS_CACHE"] = folder
    source = Path(__file__).parent / "tasks"
    for task in source.glob("*.yaml"):
        (Path(folder) / task.name).write_text(task.read_text().replace("${TASKS}", str(source)))
    run(TaskManager(include_path=folder, include_defaults=False))
