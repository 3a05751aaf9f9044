"""A model that calls your functions until it has what it needs. Tools are for 8x22B: 8x7B has no tokens for them.

pip install openai; mixtral-mlx serve --model ~/models/mixtral-8x22b-q4 &
python examples/clients/tool_loop.py "How warm is it in Rome?" """

import json
import os
import sys
from typing import Any

from openai import OpenAI

ROUNDS = 4
TEMPERATURES = {"Rome": 24, "Oslo": 9}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "temperature",
            "description": "How warm it is in a city now, in degrees Celsius.",
            "strict": True,  # What is called is held to the parameters.
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": list(TEMPERATURES)}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]

client = OpenAI(
    base_url=os.environ.get("MIXTRAL_URL", "http://127.0.0.1:8080") + "/v1",
    api_key=os.environ.get("MIXTRAL_MLX_API_KEY", "none"),
)
question = sys.argv[1] if len(sys.argv) > 1 else "How warm is it in Rome?"
messages: list[Any] = [{"role": "user", "content": question}]

for turn in range(ROUNDS):
    # First it has to look; then it may look again, and in the last round it has to answer.
    choice: Any = "required" if turn == 0 else "none" if turn == ROUNDS - 1 else "auto"
    said = client.chat.completions.create(
        model="default", messages=messages, tools=TOOLS, tool_choice=choice, temperature=0, max_tokens=200
    )
    message = said.choices[0].message
    messages.append(message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
    if not message.tool_calls:
        print(message.content)
        break
    for call in message.tool_calls:
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        print(f"{call.function.name}({arguments['city']})", file=sys.stderr)
        result = json.dumps({"celsius": TEMPERATURES[arguments["city"]]})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
