#!/bin/sh
# `mixtral-mlx serve` asked with nothing but curl: what is served, an answer as it comes, and an answer held to a choice.
#
# mixtral-mlx serve --model demo &
# sh examples/clients/curl.sh
set -eu
url="${MIXTRAL_URL:-http://127.0.0.1:8080}"
ask() { curl -sS --fail-with-body -H "authorization: Bearer ${MIXTRAL_MLX_API_KEY:-none}" "$@"; }

ask "$url/v1/models"
echo

ask --no-buffer "$url/v1/chat/completions" -H 'content-type: application/json' -d '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "temperature": 0, "stream": true
}'

ask "$url/v1/completions" -H 'content-type: application/json' -d '{
  "prompt": "[INST] What is the opposite of hot? [/INST]",
  "temperature": 0, "response_format": {"type": "choice", "choice": ["cold", "warm"]}
}'
echo
