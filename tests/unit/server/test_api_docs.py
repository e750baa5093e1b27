"""docs/api.md: its field tables are those of the code, and its prose names every field that has an effect."""

from __future__ import annotations

import re
import subprocess
import sys

from toka_engine.server.chat_plan import ChatRequest
from toka_engine.server.endpoints.completions import CompletionRequest
from toka_engine.server.fields import HINTS

from tests.engine_process import ROOT

_PAGE = ROOT / "docs" / "api.md"


def test_the_field_tables_are_those_of_the_structs() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "api_docs.py"), "--print"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert _PAGE.read_text() == printed, "run scripts/api_docs.py"


def test_the_prose_says_what_each_field_does() -> None:
    prose = re.sub(r"<!-- begin: .*<!-- end: ", "", _PAGE.read_text(), flags=re.DOTALL)
    named = set(re.findall(r"`(\w+)", prose))
    for struct in (CompletionRequest, ChatRequest):
        assert set(struct.__struct_fields__) - set(HINTS) - named == set()
