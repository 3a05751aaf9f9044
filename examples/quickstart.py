"""Load a model, hold a short conversation with it, and show what it cost.

python examples/quickstart.py [FOLDER or REPOSITORY]      without either, the built-in demo model"""

import sys

from mixtral_mlx import Conversation, Message, Sampling, Tokenizer, load, locate, stream_generate

folder = locate(sys.argv[1] if len(sys.argv) > 1 else None)
loaded = load(folder)
tokenizer = Tokenizer.read(folder, loaded.config.vocab_size)
conversation = Conversation(loaded.model)  # Keeps what was read, so a follow-up only reads the new words.
messages = []

for question in ("What is the capital of France?", "And of Italy?", "What is 12 + 30?"):
    messages.append(Message("user", question))
    prompt = tokenizer.encode_chat(messages)
    reply = ""
    print(f"> {question}")
    for chunk in stream_generate(loaded.model, tokenizer, prompt, Sampling(max_tokens=200), conversation=conversation):
        print(chunk.text, end="", flush=True)
        reply += chunk.text
    messages.append(Message("assistant", reply))
    usage = chunk.usage
    print(f"\n  [{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} cached, {usage.completion_tokens} new]")
