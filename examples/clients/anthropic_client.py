"""Anthropic's own client, asking `mixtral-mlx serve` instead of Anthropic.

pip install anthropic; mixtral-mlx serve --model demo &
python examples/clients/anthropic_client.py "What is the capital of France?" """

import os
import sys

from anthropic import Anthropic

client = Anthropic(
    base_url=os.environ.get("MIXTRAL_URL", "http://127.0.0.1:8080"),
    api_key=os.environ.get("MIXTRAL_MLX_API_KEY", "none"),
)
question = sys.argv[1] if len(sys.argv) > 1 else "What is the capital of France?"

with client.messages.stream(
    model="default",
    max_tokens=200,
    messages=[{"role": "user", "content": question}],
    extra_body={"temperature": 0},  # The server takes it, though this client no longer has a name for it.
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    print()
    usage = stream.get_final_message().usage
print(f"[{usage.input_tokens} + {usage.output_tokens} tokens]", file=sys.stderr)
