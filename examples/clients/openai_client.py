"""OpenAI's own client, asking `mixtral-mlx serve` instead of OpenAI.

pip install openai; mixtral-mlx serve --model demo &
python examples/clients/openai_client.py "What is the capital of France?" """

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("MIXTRAL_URL", "http://127.0.0.1:8080") + "/v1",
    api_key=os.environ.get("MIXTRAL_MLX_API_KEY", "none"),  # Only asked for where the server was given one.
)
question = sys.argv[1] if len(sys.argv) > 1 else "What is the capital of France?"

stream = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": question}],
    temperature=0,
    max_tokens=200,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]", file=sys.stderr)
