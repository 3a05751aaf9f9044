// OpenAI's own client for Node, asking `mixtral-mlx serve` instead of OpenAI.
//
// npm install openai; mixtral-mlx serve --model demo &
// node examples/clients/openai_client.mjs "What is the capital of France?"

import OpenAI from "openai";

const client = new OpenAI({
  baseURL: `${process.env.MIXTRAL_URL ?? "http://127.0.0.1:8080"}/v1`,
  apiKey: process.env.MIXTRAL_MLX_API_KEY ?? "none", // Only asked for where the server was given one.
});
const question = process.argv[2] ?? "What is the capital of France?";

const stream = await client.chat.completions.create({
  model: "default",
  messages: [{ role: "user", content: question }],
  temperature: 0,
  max_tokens: 200,
  stream: true,
});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta.content ?? "");
console.log();
