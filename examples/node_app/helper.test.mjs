// What the example promises, with the real helper: node --test

import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { after, test } from "node:test";

import { backoff, Helper, HelperError, Lines } from "./helper.mjs";

const command = JSON.parse(process.env.HELPER_COMMAND ?? '["mixtral-mlx", "helper"]');
const HELLO = [{ role: "user", content: "Hello" }];
const ENDLESS = { messages: HELLO, min_tokens: 900, max_tokens: 900 };
const HELLO_1 = { type: "hello", protocol: 1, version: "0", pid: 0 };
const running = [];

async function started(options = {}) {
  const helper = new Helper({ command, ...options });
  running.push(helper);
  await helper.start();
  return helper;
}

/** A helper that says only this, a message or a line each, and stays until its stdin ends. */
const saying = (...lines) => {
  const said = lines.map((line) => (typeof line === "string" ? line : JSON.stringify(line)) + "\n").join("");
  return [process.execPath, "-e", `process.stdout.write(${JSON.stringify(said)}); process.stdin.resume()`, "--"];
};

after(() => Promise.all(running.map((helper) => helper.stop())));

const text = async (messages) => {
  let said = "";
  for await (const message of messages) if (message.type === "text") said += message.text;
  return said;
};
const state = (helper, wanted) =>
  new Promise((resolve) => helper.on("state", (state) => state === wanted && resolve()));
const exists = (pid) => {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
};

test("lines are put together, wherever the chunks end", () => {
  const whole = Buffer.from('{"a":1}\n{"b":"é"}\n\n{"c":3}\n');
  for (let cut = 0; cut <= whole.length; cut++) {
    const lines = new Lines();
    assert.deepEqual([...lines.add(whole.subarray(0, cut)), ...lines.add(whole.subarray(cut))], [
      '{"a":1}',
      '{"b":"é"}',
      '{"c":3}',
    ]);
  }
});

test("waits double up to half a minute", () => {
  assert.deepEqual([1, 2, 3, 7, 50].map(backoff), [500, 1000, 2000, 30_000, 30_000]);
});

test("a model is loaded with progress and an answer is streamed", async () => {
  const helper = await started();
  assert.equal(helper.hello.pid, helper.pid);
  const progress = [];
  const ready = await helper.load("demo", { onProgress: (message) => progress.push(message) });
  assert.equal(ready.model, "demo");
  assert.equal(progress.at(-1).done_bytes, progress.at(-1).total_bytes);
  const types = [];
  for await (const message of helper.chat({ messages: HELLO, max_tokens: 5 })) types.push(message.type);
  assert.equal(types.at(-1), "done");
  assert.ok(types.includes("text"));
  await helper.stop();
});

test("two answers at once, one of them stopped, and then another", async () => {
  const helper = await started();
  await helper.load("demo");
  const alone = await text(helper.chat({ messages: HELLO, max_tokens: 20, temperature: 0 }));
  const stopped = new AbortController();
  let last;
  const endless = (async () => {
    for await (last of helper.chat(ENDLESS, { signal: stopped.signal })) if (last.type === "text") stopped.abort();
  })();
  assert.equal(await text(helper.chat({ messages: HELLO, max_tokens: 20, temperature: 0 })), alone);
  await endless;
  assert.deepEqual(last.finish_reasons, ["cancelled"]);
  for await (const message of helper.chat(ENDLESS)) if (message.type === "text") break; // Leaving cancels as well.
  assert.equal(await text(helper.chat({ messages: HELLO, max_tokens: 20, temperature: 0 })), alone);
  await helper.stop();
});

test("what cannot be is an error with a code, and the helper goes on", async () => {
  const helper = await started();
  await assert.rejects(helper.load("/nowhere"), (error) => error instanceof HelperError && error.code === "no_model");
  await assert.rejects(text(helper.chat({ messages: HELLO })), { code: "not_loaded" });
  await helper.load("demo");
  await assert.rejects(text(helper.chat({ messages: HELLO, colour: 1 })), HelperError);
  await helper.memoryPressure(2);
  assert.equal((await helper.stats()).state, "ready");
  await helper.unload();
  assert.equal((await helper.stats()).state, "no_model");
  await helper.stop();
});

test("a helper that is killed ends its answers, comes back, and brings its model back", async () => {
  const helper = await started({ wait: () => 1 });
  await helper.load("demo");
  const first = helper.pid;
  const again = new Promise((resolve) => helper.on("model", resolve));
  const waiting = state(helper, "waiting");
  await assert.rejects(
    (async () => {
      for await (const message of helper.chat(ENDLESS)) if (message.type === "text") process.kill(first, "SIGKILL");
    })(),
    { code: "helper_gone", retryable: true },
  );
  await waiting;
  assert.equal((await again).model, "demo");
  assert.notEqual(helper.pid, first);
  assert.ok(await text(helper.chat({ messages: HELLO, max_tokens: 5 })));
  await helper.stop();
});

test("a helper that cannot start is given up", async () => {
  const missing = new Helper({ command: ["/nowhere/mixtral-mlx", "helper"] });
  await assert.rejects(missing.start(), { code: "helper_gone" });
  assert.equal(missing.state, "failed");
  const wrong = new Helper({ command, args: ["--no-such-option"] });
  await assert.rejects(wrong.start(), /exit code 2/);
  assert.equal(wrong.state, "failed");
});

test("a line that is no message is a line of the log", async () => {
  const noise = ["a wrapper says hello", "null", "17", "{"];
  const helper = new Helper({ command: saying(...noise, HELLO_1) });
  const log = [];
  helper.on("log", (line) => log.push(line));
  await helper.start();
  assert.deepEqual(log, noise);
  assert.equal(helper.state, "running");
  await helper.stop();
});

test("a message of a type that is not known is ignored, and the others are told apart", async () => {
  const unasked = [
    { type: "news" },
    { type: "constructor" },
    { type: "state", state: "unloaded" },
    { type: "loading", model: "demo", done_bytes: 1, total_bytes: 2 },
    { type: "ready", model: "demo" },
    { type: "error", code: "no_id", message: "?", retryable: false },
  ];
  const helper = new Helper({ command: saying(HELLO_1, ...unasked) });
  const told = [];
  for (const name of ["model", "loading"]) helper.on(name, (message) => told.push([name, message.type]));
  const refused = new Promise((resolve) => helper.on("refused", resolve));
  await helper.start();
  assert.equal((await refused).code, "no_id");
  assert.deepEqual(told, [["model", "state"], ["loading", "loading"], ["model", "ready"]]);
  await helper.stop();
});

test("a helper of another protocol is given up, also when it comes after a restart", async () => {
  const other = saying({ ...HELLO_1, protocol: 2 });
  const first = new Helper({ command: other });
  await assert.rejects(first.start(), { code: "protocol" });
  assert.equal(first.state, "failed");
  await first.stop();

  const folder = await mkdtemp(path.join(tmpdir(), "helper-"));
  const script = path.join(folder, "helper.mjs");
  const says = (protocol) => writeFile(script, saying({ ...HELLO_1, protocol })[2]);
  await says(1);
  const second = new Helper({ command: [process.execPath, script], wait: () => 1 });
  await second.start();
  await says(2); // An update, say.
  const [failed, refused] = [state(second, "failed"), new Promise((resolve) => second.on("refused", resolve))];
  process.kill(second.pid, "SIGKILL");
  assert.equal((await refused).code, "protocol");
  await failed;
  await second.stop();
  await rm(folder, { recursive: true });
});

test("to start what runs starts nothing more", async () => {
  const helper = await started();
  const { pid } = helper;
  assert.equal((await helper.start()).pid, pid);
  assert.equal(helper.pid, pid);
  await helper.stop();
});

test("stop leaves no process, whatever it is doing", async () => {
  const helper = await started();
  await helper.load("demo");
  // It is cut short, or was not begun.
  const answer = text(helper.chat(ENDLESS)).catch(({ code }) => assert.equal(code, "closed"));
  const { pid } = helper;
  const began = Date.now();
  await helper.stop();
  await answer;
  assert.ok(Date.now() - began < 3000);
  assert.ok(!exists(pid));
});
