// Ask a question from the command line: node main.mjs "What is MLX?"
//
// MIXTRAL_MLX is the program to start, MODEL what it loads (mixtral-mlx; demo).

import { Helper } from "./helper.mjs";

const helper = new Helper({ command: [process.env.MIXTRAL_MLX ?? "mixtral-mlx", "helper"] });
helper.on("log", (line) => console.error(`helper: ${line}`));
helper.on("state", (state) => state === "waiting" && console.error("The helper has died and is started again."));

try {
  await helper.start();
  await helper.load(process.env.MODEL ?? "demo", {
    onProgress: ({ phase, done_bytes, total_bytes }) =>
      process.stderr.isTTY && process.stderr.write(`\r${phase} ${Math.round((100 * done_bytes) / total_bytes)} % `),
  });
  const content = process.argv.slice(2).join(" ") || "Hello";
  const stopped = new AbortController();
  process.once("SIGINT", () => stopped.abort());
  const body = { messages: [{ role: "user", content }], max_tokens: 400 };
  for await (const message of helper.chat(body, { signal: stopped.signal })) {
    if (message.type === "text") process.stdout.write(message.text);
    if (message.type === "done") console.error(`\n[${message.usage.completion_tokens} tokens]`);
  }
} catch (error) {
  console.error(`error[${error.code}]: ${error.message} ${error.hint ?? ""}`);
  process.exitCode = 1;
} finally {
  await helper.stop();
}
