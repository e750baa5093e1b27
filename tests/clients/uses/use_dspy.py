"""Uses dspy: its language model, over chat and over completions."""

import sys

import dspy

lm = dspy.LM("openai/smollm2", api_base=sys.argv[1] + "/v1", api_key="none", max_tokens=32, temperature=0, cache=False)
dspy.configure(lm=lm)
(answer,) = lm("What is the capital of France?")
assert answer.strip()
assert lm("What is the capital of France?") == [answer]
assert all(text.strip() for text in lm("Say hello.", n=2, temperature=1.0))
text = dspy.LM(
    "text-completion-openai/smollm2",
    api_base=sys.argv[1] + "/v1",
    api_key="none",
    model_type="text",
    max_tokens=8,
    temperature=0,
    cache=False,
)
(completed,) = text("One, two,")  # in a form of dspy's own, so that the model need not count on
assert completed.strip()
assert text("One, two,") == [completed]
