// Uses the Vercel AI SDK with both providers: the OpenAI one over /v1/responses, its default, and over chat.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const baseURL = `${process.argv[2]}/v1`;
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "toka",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const prompt = "What is the capital of France?";
const greedy = { temperature: 0, maxOutputTokens: 16, maxRetries: 0 };
const Capital = z.object({ country: z.string().max(16), city: z.string().max(16) });

for (const model of [openai("smollm2"), openai.chat("smollm2"), compatible("smollm2")]) {
  const name = model.provider;
  const whole = await generateText({ model, prompt, ...greedy });
  assert.ok(whole.text.trim(), name);
  assert.ok(whole.usage.outputTokens >= 1, name);
  assert.ok(["stop", "length"].includes(whole.finishReason), name);

  const stream = streamText({ model, prompt, ...greedy, onError: ({ error }) => assert.fail(String(error)) });
  let streamed = "";
  for await (const piece of stream.textStream) streamed += piece;
  assert.equal(streamed, whole.text, name);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens, name);

  const { output } = await generateText({
    model,
    prompt: "The capital of France is Paris.",
    output: Output.object({ schema: Capital }),
    ...greedy,
    maxOutputTokens: 128,
  });
  assert.ok(Capital.parse(output), name);

  const asked = [];
  const weather = tool({
    description: "Tell the weather of a city.",
    inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }),
    execute: async ({ city }) => {
      asked.push(city);
      return `Sunny in ${city}`;
    },
  });
  const called = await generateText({
    model,
    prompt: "What is the weather in Paris?",
    tools: { weather },
    toolChoice: { type: "tool", toolName: "weather" },
    stopWhen: stepCountIs(1),
    ...greedy,
    maxOutputTokens: 128,
  });
  assert.deepEqual(called.toolResults.map((result) => result.output), [`Sunny in ${asked[0]}`], name);
}

const { text } = await generateText({ model: compatible.completionModel("smollm2"), prompt: "One, two,", ...greedy });
assert.match(text, /three/i);
