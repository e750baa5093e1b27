"""Says what to do instead where a request asks for a path that this server does not have.

Owns: the paths of OpenAI's API, and of servers like this one, that are not served, with the way out of each; and the
path that was probably meant where one is misspelt. Pure: no I/O, no state.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_TEXT_ALONE = "this server makes text alone"
_OTHER_MODEL = "run a server for such a model beside it"
_CHAT = "send messages to /v1/chat/completions"
_LORA = "this server loads no adapters: merge the adapter into the model's folder"
_ONE_MODEL = "this server has the one model that GET /v1/models names"
_RESTART = "this server is started, stopped and set by its command line alone"
_OLLAMA = f"Ollama's API is not spoken here: {_CHAT}"
_ELSEWHERE = {
    "/v1/embeddings": "this server has no embeddings: run a server for an embedding model beside it",
    "/v1/rerank": f"this server has no reranking: {_OTHER_MODEL}",
    "/v2/rerank": f"this server has no reranking: {_OTHER_MODEL}",
    "/v1/score": f"this server has no scoring: {_OTHER_MODEL}",
    "/v1/classify": f"this server has no classes: {_OTHER_MODEL}, or give `guided_choice` to /v1/chat/completions",
    "/v1/pooling": f"this server has no pooled states: {_OTHER_MODEL}",
    "/v1/moderations": "this server has no moderation",
    "/v1/images": _TEXT_ALONE,
    "/v1/audio": _TEXT_ALONE,
    "/v1/videos": _TEXT_ALONE,
    "/v1/realtime": _TEXT_ALONE,
    "/v1/uploads": "send the whole file to /v1/files",
    "/v1/fine_tuning": "this server does not train",
    "/v1/evals": "this server runs no evaluations: a harness such as lm-eval runs them against /v1/completions",
    "/v1/assistants": _CHAT,
    "/v1/threads": _CHAT,
    "/v1/chatkit": _CHAT,
    "/v1/conversations": "continue a response by `previous_response_id` of /v1/responses, or send all messages",
    "/v1/prompts": "this server keeps no prompts: send the whole text",
    "/v1/responses/compact": "`truncation` of /v1/responses leaves out the oldest turns",
    "/v1/responses/*/cancel": "responses are not made in the background here: close the connection",
    "/v1/chat/completions/*": "chat completions are not kept: /v1/responses keeps what it answers",
    "/v1/chat/completions/batch": "send a file to /v1/files and name it in /v1/batches",
    "/v1/messages/batches": "send a file to /v1/files and name it in /v1/batches",
    "/v1/vector_stores": "this server searches no files",
    "/v1/containers": "this server runs no code: let the client run what the model calls",
    "/v1/skills": "this server runs no code: let the client run what the model calls",
    "/v1/organization": "keys are in the file that `api_keys_file` names, their use in GET /metrics",
    "/v1/engines": "name the model in the body of /v1/completions",
    "/v1/complete": "send messages to /v1/messages",
    "/v1/load_lora_adapter": _LORA,
    "/v1/unload_lora_adapter": _LORA,
    "/invocations": _CHAT,
    "/server_info": "GET /version has the version, GET /v1/models the model, GET /metrics the rest",
    "/get_server_info": "GET /version has the version, GET /v1/models the model, GET /metrics the rest",
    "/get_model_info": "GET /v1/models has the model",
    "/info": "GET /version has the version, GET /v1/models the model",
    "/props": "GET /tokenizer_info has the chat template, GET /v1/models the limits",
    "/slots": "GET /metrics has what runs",
    "/generate": "send a prompt to /v1/completions",
    "/generate_stream": "send a prompt to /v1/completions with `stream`",
    "/completion": "send a prompt to /v1/completions",
    "/infill": "send a prompt to /v1/completions",
    "/apply-template": "POST /tokenize renders a conversation",
    "/health_generate": "GET /health says whether the engine serves",
    "/api/chat": _OLLAMA,
    "/api/generate": _OLLAMA,
    "/api/embed": _OLLAMA,
    "/api/embeddings": _OLLAMA,
    "/api/show": _OLLAMA,
    "/api/tags": _OLLAMA,
    "/sleep": _RESTART,
    "/wake_up": _RESTART,
    "/is_sleeping": _RESTART,
    "/pause": _RESTART,
    "/resume": _RESTART,
    "/update_weights": _RESTART,
    "/start_profile": _RESTART,
    "/stop_profile": _RESTART,
    "/scale_elastic_ep": _RESTART,
    "/reset_prefix_cache": "the prefix cache gives way by itself; `use_prefix_cache=F` starts the engine without it",
    "/flush_cache": "the prefix cache gives way by itself; `use_prefix_cache=F` starts the engine without it",
    "/models/load": _ONE_MODEL,
    "/models/unload": _ONE_MODEL,
}
"""The way out, by path; `*` stands for one part. A path below another one goes by its line, too."""
_MAX_PARTS = 5
_MAX_MISTAKEN_PATH = 200


def find_instead(path: str) -> str | None:
    """Return what to do instead of asking for a path that this server does not have."""
    parts = path.rstrip("/").split("/")[1 : _MAX_PARTS + 1]
    if not parts:
        return None
    return _find_by_parts(parts) or _find_by_parts(["v1", *parts])


def _find_by_parts(parts: list[str]) -> str | None:
    for length in range(len(parts), 0, -1):
        exact = parts[:length]
        found = _ELSEWHERE.get("/" + "/".join(exact))
        for index in range(2, length) if found is None else ():
            found = found or _ELSEWHERE.get("/" + "/".join([*exact[:index], "*", *exact[index + 1 :]]))
        if found:
            return found
    return None


def find_meant(path: str, known: Collection[str]) -> str | None:
    """Return the path of `known` that was probably meant: without slashes too many, or with a base that is missing or
    too much.
    """
    plain = re.sub("/+", "/", path.lower()[:_MAX_MISTAKEN_PATH]).rstrip("/")
    meant = [other for other in known if plain.endswith(other) or other == f"/v1{plain}"]
    return max(meant, key=len, default=None)
