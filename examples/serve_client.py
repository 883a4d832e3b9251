"""Ask a running server: one streamed answer, and one by vote.

    m1 serve MODEL &
    python examples/serve_client.py http://127.0.0.1:8000/v1 MODEL

Needs `pip install openai`. The key is $M1_API_KEY, if the server has one.
"""

import os
import sys

from openai import OpenAI


def main(url: str, model: str) -> None:
    client = OpenAI(base_url=url, api_key=os.environ.get("M1_API_KEY", "-"))
    chat = [{"role": "user", "content": "What is 6 * 7? Put your final answer within \\boxed{}."}]
    for chunk in client.chat.completions.create(model=model, messages=chat, max_tokens=64, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    voted = client.chat.completions.create(
        model=model, messages=chat, max_tokens=256, extra_body={"vote": {"n": 16, "seconds": 20}}
    )
    print("\nby vote:", voted.vote["answer"], voted.vote["tally"])


if __name__ == "__main__":
    main(*sys.argv[1:])
