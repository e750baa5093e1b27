"""The quickstart's client: a pod that waits, and the program that is run in it and prints an answer as it streams.

ask.py pod CLIENT_IMAGE | kubectl apply -f -
kubectl exec ask -- python -c "$(ask.py program)"
"""

import json
import sys

# Asked at temperature 0, so that the reader can compare the answer with the README's.
_QUESTION = "Why is the sky blue? Answer in two sentences."
_PROGRAM = f"""\
from openai import OpenAI
client = OpenAI(base_url="http://smollm2.default.svc/v1", api_key="none")
question = {{"role": "user", "content": {_QUESTION!r}}}
model = client.models.list().data[0].id
print("model:", model)
print("question:", question["content"])
print("answer: ", end="")
stream = client.chat.completions.create(model=model, messages=[question], max_tokens=100, temperature=0, stream=True)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
print()
"""


def manifest(image: str) -> dict[str, object]:
    """The pod, allowed in a namespace that enforces Pod Security `restricted`."""
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    container = {
        "name": "ask",
        "image": image,
        "args": ["-c", "import signal; signal.pause()"],
        "securityContext": security,
    }
    pod_security = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "securityContext": pod_security,
        "containers": [container],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ask"}, "spec": spec}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["pod", image]:
            print(json.dumps(manifest(image)))
        case ["program"]:
            print(_PROGRAM)
        case _:
            sys.exit(__doc__)
