"""Uses dspy: its language model, and a prediction in its default format where the small model manages it."""

import sys

import dspy

lm = dspy.LM("openai/smollm2", api_base=sys.argv[1] + "/v1", api_key="none", max_tokens=32, temperature=0, cache=False)
dspy.configure(lm=lm)
assert lm("Say hello.")
assert len(lm("Say hello.", n=2, temperature=1.0)) == 2
text = dspy.LM(
    "text-completion-openai/smollm2",
    api_base=sys.argv[1] + "/v1",
    api_key="none",
    model_type="text",
    max_tokens=8,
    cache=False,
)
assert text("One, two,")
