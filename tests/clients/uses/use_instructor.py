"""Uses instructor in its default mode, and with JSON schemas."""

import sys

import instructor
import openai
from pydantic import BaseModel, Field


class Capital(BaseModel):
    country: str = Field(max_length=16)
    city: str = Field(max_length=16)


plain = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", timeout=240)
ask = [{"role": "user", "content": "The capital of France is Paris."}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(plain, mode=mode)
    found = client.chat.completions.create(
        model="smollm2", response_model=Capital, messages=ask, max_tokens=200, temperature=0
    )
    assert isinstance(found, Capital), mode
