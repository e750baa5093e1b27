"""`kubectl_complete-toka`: what kubectl asks when a user presses the tab key behind `kubectl toka`.

kubectl calls it with the words so far, the last one being completed, and takes a suggestion a line, and in the last
line `:` and a number that says what the shell may do besides: 4 is "no file names".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kubectl_toka.kubectl import Kubectl, KubectlError
from kubectl_toka.main import COMMANDS
from kubectl_toka.names import RESOURCE, REVISION_LABEL, revision_selector

_NO_FILES = ":4"
_WITH_VALUE = ("-n", "--namespace", "--context", "--kubeconfig", "--tail", "-m", "--message", "--max-tokens", "--to")


def main() -> None:
    """Entry point of the command `kubectl_complete-toka`."""
    print("\n".join([*suggest(sys.argv[1:]), _NO_FILES]))


def suggest(words: Sequence[str]) -> list[str]:
    """Suggestions for the last of `words`, with a tab and a description where there is one."""
    *before, last = words or [""]
    flags, plain = _take_flags(before)
    if before and before[-1] in ("-n", "--namespace"):
        found = _names(Kubectl(flags), "namespaces", "")
    elif before and before[-1] == "--to" and len(plain) > 1:
        found = _revisions(Kubectl(flags), plain[1])
    elif before and before[-1] in _WITH_VALUE:
        found = []
    elif not plain:
        found = [f"{name}\t{words}" for name, words in COMMANDS.items()]
    elif len(plain) == 1 and plain[0] in COMMANDS:
        found = _names(Kubectl(flags), RESOURCE, "")
    else:
        found = []
    return [one for one in found if one.startswith(last)]


def _take_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """kubectl's own flags among the words, and the words that are no flags."""
    flags, plain, is_value = [], [], False
    for number, word in enumerate(words):
        if is_value:
            is_value = False
        elif word in _WITH_VALUE:
            is_value = True
            if word in ("-n", "--namespace", "--context", "--kubeconfig") and number + 1 < len(words):
                flags += [word, words[number + 1]]
        elif word.startswith(("--namespace=", "--context=", "--kubeconfig=")):
            flags.append(word)
        elif not word.startswith("-"):
            plain.append(word)
    return flags, plain


def _names(kubectl: Kubectl, kind: str, selector: str) -> list[str]:
    """Names of objects; none where the cluster does not answer, since a tab key has no place for errors."""
    try:
        return [item["metadata"]["name"] for item in kubectl.list(kind, selector)]
    except KubectlError:
        return []


def _revisions(kubectl: Kubectl, name: str) -> list[str]:
    try:
        found = kubectl.list("controllerrevisions", revision_selector(name))
    except KubectlError:
        return []
    return [f"{s['metadata']['labels'][REVISION_LABEL]}\tnumber {s['revision']}" for s in found]
