"""An answer that is always the JSON you asked for: the schema holds the model to it, token by token.

pip install openai pydantic; mixtral-mlx serve --model demo &
python examples/clients/structured_output.py"""

import os
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel, ConfigDict


class Capital(BaseModel):
    model_config = ConfigDict(extra="forbid")

    city: Literal["Lima", "Oslo", "Paris", "Rome", "Tokyo"]
    sure: bool


client = OpenAI(
    base_url=os.environ.get("MIXTRAL_URL", "http://127.0.0.1:8080") + "/v1",
    api_key=os.environ.get("MIXTRAL_MLX_API_KEY", "none"),
)
said = client.chat.completions.parse(
    model="default",
    messages=[{"role": "user", "content": "What is the capital of Japan?"}],
    temperature=0,
    response_format=Capital,
)
print(said.choices[0].message.parsed)
