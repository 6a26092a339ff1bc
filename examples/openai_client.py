"""A policy for each request of the OpenAI client: python openai_client.py [URL] [POLICY]"""

import sys

from openai import BadRequestError, OpenAI

URL, POLICY = [*sys.argv[1:], *("http://127.0.0.1:30000", "oea-k3")[len(sys.argv) - 1 :]]
HEADER = {"X-MoE-Routing-Policy": POLICY}
QUESTION = [{"role": "user", "content": "Once upon a time"}]

client = OpenAI(base_url=f"{URL}/v1", api_key="none")

answer = client.chat.completions.create(
    model="demo", messages=QUESTION, max_tokens=16, extra_headers=HEADER
)
print(f"{answer.sglext['moe_routing_policy']}: {answer.choices[0].message.content!r}")

# every request of a client: OpenAI(..., default_headers=HEADER), or the model's alias
stream = client.chat.completions.create(
    model=f"demo@{POLICY}", messages=QUESTION, max_tokens=16, stream=True
)
parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
print("streamed:", repr("".join(parts)))

try:
    client.completions.create(model="demo@nonesuch", prompt="It was")
except BadRequestError as error:
    print("refused:", error.message)
