"""Uses lm-eval on bundled data: generation and multiple choice over completions, generation over chat."""

import logging
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OPENAI_API_KEY="none")

import lm_eval
from lm_eval.tasks import TaskManager

logging.getLogger().setLevel(logging.ERROR)
url = sys.argv[1]
source = Path(__file__).parent.parent / "tasks"
with tempfile.TemporaryDirectory() as folder:
    os.environ["HF_DATASETS_CACHE"] = folder
    for task in source.glob("*.yaml"):
        (Path(folder) / task.name).write_text(task.read_text().replace("${TASKS}", str(source)))
    tasks = TaskManager(include_path=folder, include_defaults=False)

    def evaluate(model: str, path: str, task: str, **options: object) -> dict:
        arguments = {"base_url": url + path, "model": "smollm2", "max_retries": 1, **options}
        found = lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=[task], task_manager=tasks, apply_chat_template="chat" in model
        )
        return found["results"][task]

    completions = "/v1/completions"
    assert evaluate("local-completions", completions, "capitals_generate", num_concurrent=4)["exact_match,none"] >= 0.0
    assert evaluate("local-completions", completions, "capitals_generate", batch_size=3, tokenized_requests=False)
    assert evaluate("local-completions", completions, "capitals_choice", batch_size=2)["acc,none"] >= 0.5
    assert evaluate("local-chat-completions", "/v1/chat/completions", "capitals_generate", num_concurrent=2)
