// Uses openai for Node: whole, streamed, parsed by a zod schema, tools that run, responses, an answer that is left early.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "smollm2";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model, temperature: 0, max_tokens: 8 };

const models = await client.models.list();
assert.deepEqual(models.data.map((found) => found.id), [model]);

const { data: whole, request_id: requestId } = await client.chat.completions.create({ ...greedy, messages }).withResponse();
assert.ok(requestId);
const text = whole.choices[0].message.content;
assert.ok(text.trim());
assert.ok(whole.usage.completion_tokens >= 1);

const stream = client.chat.completions.stream({ ...greedy, messages, stream_options: { include_usage: true } });
let streamed = "";
stream.on("content", (piece) => (streamed += piece));
assert.equal((await stream.finalChatCompletion()).choices[0].message.content, text);
assert.equal(streamed, text);
assert.equal((await stream.totalUsage()).completion_tokens, whole.usage.completion_tokens);

const completion = await client.completions.create({ ...greedy, prompt: ["One, two,", "Three, four,"] });
assert.match(completion.choices[0].text, /three/);
assert.equal(completion.choices.length, 2);

const Capital = z.object({ country: z.string().max(16), city: z.string().max(16) });
const parsed = await client.chat.completions.parse({
  ...greedy,
  max_tokens: 128,
  messages: [{ role: "user", content: "The capital of France is Paris." }],
  response_format: zodResponseFormat(Capital, "capital"),
});
assert.ok(Capital.parse(parsed.choices[0].message.parsed));

const asked = [];
const runner = client.chat.completions.runTools(
  {
    ...greedy,
    max_tokens: 128,
    messages: [{ role: "user", content: "What is the weather in Paris?" }],
    tool_choice: { type: "function", function: { name: "weather" } },
    tools: [
      {
        type: "function",
        function: {
          name: "weather",
          description: "Tell the weather of a city.",
          parameters: { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"] },
          parse: JSON.parse,
          function: ({ city }) => {
            asked.push(city);
            return `Sunny in ${city}`;
          },
        },
      },
    ],
  },
);
await runner.done();
assert.equal(asked.length, 1);
assert.ok(["Paris", "Rome"].includes(asked[0]));

const response = await client.responses.create({ model, input: messages, temperature: 0, max_output_tokens: 16 });
assert.ok(response.output_text.trim());
const kinds = new Set();
for await (const event of await client.responses.create({
  model,
  input: messages,
  temperature: 0,
  max_output_tokens: 16,
  stream: true,
})) {
  kinds.add(event.type);
}
assert.ok(kinds.has("response.output_text.delta") && (kinds.has("response.completed") || kinds.has("response.incomplete")));

await assert.rejects(client.chat.completions.create({ ...greedy, messages, temperature: 3 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "temperature");
  return true;
});

const left = await client.chat.completions.create({ model, messages, stream: true });
for await (const chunk of left) {
  assert.equal(chunk.model, model);
  break; // closes the connection; the engine goes on
}
assert.ok((await client.chat.completions.create({ ...greedy, messages })).choices[0].message.content);
