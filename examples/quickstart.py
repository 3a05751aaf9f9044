"""Load a model, hold a short conversation with it, and show what it cost.

python examples/quickstart.py [FOLDER or REPOSITORY]      without either, the built-in demo model"""

import sys

from mixtral_mlx import Done, Message, Token, load

messages = []

with load(sys.argv[1] if len(sys.argv) > 1 else None) as mixtral:
    for question in ("What is the capital of France?", "And of Italy?", "What is 12 + 30?"):
        messages.append(Message("user", question))
        text = ""
        print(f"> {question}")
        for event in mixtral.chat(messages, max_tokens=200):
            match event:
                case Token():
                    print(event.text, end="", flush=True)
                    text += event.text
                case Done(usage=usage):
                    cached, new = usage.cached_tokens, usage.completion_tokens
                    print(f"\n  [{usage.prompt_tokens} prompt tokens, {cached} cached, {new} new]")
        messages.append(Message("assistant", text))
