// A helper whose answers end when they are cancelled and not before; with DEAF=1 not even then. Like the real one it leaves
// Ctrl-C to who has started it.

import { createInterface } from "node:readline";

const say = (message) => process.stdout.write(JSON.stringify(message) + "\n");
const done = { type: "done", finish_reasons: ["cancelled"], usage: { completion_tokens: 1 } };
const answers = {
  load: ({ id }) => say({ type: "ready", id, model: "endless" }),
  chat: ({ id }) => say({ type: "text", id, text: "Once" }),
  cancel: ({ id, request }) => {
    console.error("asked to cancel");
    if (process.env.DEAF !== "1") say({ ...done, id: request });
    say({ type: "ok", id });
  },
};

process.on("SIGINT", () => {});
say({ type: "hello", protocol: 1, version: "0", pid: process.pid });
for await (const line of createInterface({ input: process.stdin })) {
  const message = JSON.parse(line);
  answers[message.type]?.(message);
}
