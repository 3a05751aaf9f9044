// The server as openai-node meets it: fifteen things that programs do. SERVER_URL and SERVER_KEY say where it is,
// NODE_PACKAGES where openai is installed, TOOLS_URL and TOOLS_KEY where a model is that calls tools.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { test } from "node:test";

const { OpenAI } = createRequire(`${process.env.NODE_PACKAGES}/`)("openai");
const client = (baseURL, apiKey = process.env.SERVER_KEY) =>
  new OpenAI({ baseURL: `${baseURL}/v1`, apiKey, maxRetries: 0 });
const openai = client(process.env.SERVER_URL);
const withTools = client(process.env.TOOLS_URL, process.env.TOOLS_KEY);
const HELLO = [{ role: "user", content: "Hello" }];
const asked = (more = {}) => ({ model: "default", messages: HELLO, temperature: 0, max_tokens: 12, ...more });
const create = (more) => openai.chat.completions.create(asked(more));

const PARAMETERS = {
  type: "object",
  properties: { city: { enum: ["Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const WEATHER = { type: "function", function: { name: "weather", parameters: PARAMETERS } };
const callWeather = (more = {}) =>
  withTools.chat.completions.create(
    asked({ tools: [WEATHER], tool_choice: "required", parallel_tool_calls: false, max_tokens: 100, ...more }),
  );

test("models", async () => {
  const ids = [];
  for await (const model of await openai.models.list()) ids.push(model.id);
  assert.deepEqual(ids, ["demo"]);
});

test("plain", async () => {
  const said = await create();
  assert.equal(said.object, "chat.completion");
  assert.equal(said.choices[0].message.role, "assistant");
  assert.ok(said.choices[0].message.content);
});

test("stream", async () => {
  const chunks = [];
  for await (const chunk of await create({ stream: true })) chunks.push(chunk);
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(text, (await create()).choices[0].message.content);
  assert.equal(chunks.filter((chunk) => chunk.choices[0]?.finish_reason).length, 1);
});

test("usage", async () => {
  const plain = await create({ max_tokens: 5 });
  assert.equal(plain.usage.total_tokens, plain.usage.prompt_tokens + plain.usage.completion_tokens);
  let last;
  for await (last of await create({ max_tokens: 5, stream: true, stream_options: { include_usage: true } }));
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage.completion_tokens, plain.usage.completion_tokens);
});

test("stop", async () => {
  const whole = (await create()).choices[0].message.content;
  const stop = whole[4];
  const said = (await create({ stop: [stop] })).choices[0];
  assert.equal(said.message.content, whole.slice(0, whole.indexOf(stop)));
  assert.equal(said.finish_reason, "stop");
});

test("tools", async () => {
  const { message } = (await callWeather()).choices[0];
  assert.equal(message.tool_calls[0].function.name, "weather");
  assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { city: "Rome" });
});

test("parallel tools, streamed", async () => {
  const calls = [];
  for await (const chunk of await callWeather({ stream: true, parallel_tool_calls: true })) {
    for (const delta of chunk.choices[0]?.delta.tool_calls ?? []) {
      calls[delta.index] ??= { id: "", name: "", arguments: "" };
      calls[delta.index].id += delta.id ?? "";
      calls[delta.index].name += delta.function?.name ?? "";
      calls[delta.index].arguments += delta.function?.arguments ?? "";
    }
  }
  assert.ok(calls.length >= 1);
  assert.deepEqual(JSON.parse(calls[0].arguments), { city: "Rome" });
  assert.equal(new Set(calls.map((call) => call.id)).size, calls.length);
});

test("tool results", async () => {
  const { message } = (await callWeather()).choices[0];
  const { id } = message.tool_calls[0];
  const messages = [...HELLO, message, { role: "tool", tool_call_id: id, content: "sunny" }];
  const said = await withTools.chat.completions.create(asked({ messages, tools: [WEATHER], tool_choice: "none" }));
  assert.equal(typeof said.choices[0].message.content, "string");
});

test("JSON schema", async () => {
  const schema = { type: "object", properties: { n: { enum: [7] } }, required: ["n"], additionalProperties: false };
  const said = await create({ response_format: { type: "json_schema", json_schema: { name: "n", schema } }, max_tokens: 50 });
  assert.deepEqual(JSON.parse(said.choices[0].message.content), { n: 7 });
});

test("logprobs", async () => {
  const { logprobs, message } = (await create({ logprobs: true, top_logprobs: 3, max_tokens: 4 })).choices[0];
  assert.equal(logprobs.content.map(({ token }) => token).join(""), message.content);
  for (const { logprob, top_logprobs } of logprobs.content) {
    assert.equal(top_logprobs.length, 3);
    assert.ok(logprob <= 0);
  }
});

test("n", async () => {
  const { choices } = await create({ n: 3, temperature: 1, seed: 5 });
  assert.deepEqual(choices.map(({ index }) => index), [0, 1, 2]);
});

test("seed", async () => {
  const [one, same] = await Promise.all([create({ temperature: 1, seed: 1 }), create({ temperature: 1, seed: 1 })]);
  assert.equal(one.choices[0].message.content, same.choices[0].message.content);
});

test("error", async () => {
  await assert.rejects(create({ messages: [] }), OpenAI.BadRequestError);
  await assert.rejects(create({ model: "gpt-nonsense" }), OpenAI.NotFoundError);
  await assert.rejects(client(process.env.SERVER_URL, "guessed").models.list(), OpenAI.AuthenticationError);
});

test("cancel", async () => {
  const stream = await create({ stream: true, min_tokens: 900, max_tokens: 900 });
  for await (const chunk of stream) if (chunk.choices[0]?.delta.content) break; // Leaving closes the connection.
  assert.ok((await create()).choices[0].message.content);
});

test("long prompt", async () => {
  const content = "one two three ".repeat(150);
  const said = await create({ messages: [{ role: "user", content }], max_tokens: 2 });
  assert.ok(said.usage.prompt_tokens > 400);
  await assert.rejects(create({ messages: [{ role: "user", content: content.repeat(10) }] }), OpenAI.BadRequestError);
});
