"""Many clients at once against a server of OpenAI's API: `m1 serve`, or another.

python benchmarks/serve_load.py --url http://127.0.0.1:8000/v1 --model NAME [--requests 256 | --minutes 20]

Each client streams one completion after another, greedily, of its own prompt of random tokens. Prints and, with --out,
writes tokens per second, and percentiles of the time to the first chunk and between two chunks. One request before that
isn't measured. --pid also notes the resident memory of a server on this machine.

--mixed, for `m1 serve`: lengths are random, some requests have 4 samples, aren't streamed or are votes, and some
clients close the connection at a random moment or read slowly.

Exit code 1: an answer was torn, had another status than 200, 429 and 504, or took over --patience seconds.
A key is read from $OPENAI_API_KEY. Needs aiohttp.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch

from m1.jsonl import write_json
from m1.machine import describe_machine

WHOLE, REFUSED, LEFT, OVER = "whole", "refused", "left", "over time"  # what may come of a request; else it's a fault
LEAVING, SLOW, VOTING, FORKED, UNSTREAMED = 0.3, 0.02, 0.2, 0.25, 0.4  # shares of mixed requests
MOST_SECONDS, PAUSE, RETRY = 0.5, 0.2, 0.2  # before a client leaves; after a slow reader's chunk; after a refusal
MEMORY_SECONDS = 10.0  # between two looks at the memory


class Load:
    """The clients, and what they have seen.

    Attributes:
        counts: requests by what came of them.
        first: seconds to the first chunk, of whole streams.
        between: seconds between two chunks, of whole streams.
        tokens: drawn for whole answers.
        memory: resident bytes of the server, by seconds since the start.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.counts: Counter[str] = Counter()
        self.first: list[float] = []
        self.between: list[float] = []
        self.tokens = 0
        self.memory: list[tuple[float, int]] = []
        self._begun = 0  # requests
        self._began = time.monotonic()

    async def run(self, http: aiohttp.ClientSession) -> dict[str, Any]:
        """Runs all clients to their end. Returns what they have seen."""
        watch = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client(http, number) for number in range(self.options.clients)))
        seconds = time.monotonic() - self._began
        watch.cancel()
        return {
            "seconds": seconds,
            "counts": dict(self.counts),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / seconds,
            "seconds_to_first_token": percentiles(self.first),
            "seconds_between_tokens": percentiles(self.between),
            "server_resident_bytes": self.memory,
        }

    async def _client(self, http: aiohttp.ClientSession, number: int) -> None:
        rng = random.Random(f"{self.options.seed}/{number}")
        while self._more():
            self._begun += 1
            leaves = self.options.mixed and rng.random() < LEAVING
            try:
                async with asyncio.timeout(rng.random() * MOST_SECONDS if leaves else self.options.patience):
                    came = await self._ask(http, rng)
            except TimeoutError:
                came = LEFT if leaves else "late"
            except (aiohttp.ClientError, ValueError) as error:
                came = type(error).__name__
            self.counts[came] += 1
            if came != WHOLE:
                await asyncio.sleep(RETRY * (came != LEFT))

    def _more(self) -> bool:
        if self.options.minutes is None:
            return self._begun < self.options.requests
        return time.monotonic() < self._began + 60 * self.options.minutes

    async def _ask(self, http: aiohttp.ClientSession, rng: random.Random) -> str:
        """Sends a request and reads its answer. Returns what came of it."""
        path, body = (mixed_request if self.options.mixed else request)(rng, self.options)
        slow = self.options.mixed and rng.random() < SLOW
        times, last, whole = [time.monotonic()], b"", False
        async with http.post(f"{self.options.url}/{path}", json=body) as answer:
            if answer.status != 200:
                text = await answer.text()
                return {429: REFUSED, 504: OVER}.get(answer.status, f"status {answer.status}: {text[:100]}")
            if not body["stream"]:
                self.tokens += json.loads(await answer.read())["usage"]["completion_tokens"]
                return WHOLE
            async for line in answer.content:
                if line.startswith(b"data: [DONE]"):
                    whole = True
                elif line.startswith(b"data: "):
                    times.append(time.monotonic())
                    last = line
                await asyncio.sleep(PAUSE * slow)
        if not whole:
            return "torn"
        end = json.loads(last.removeprefix(b"data: "))
        if "error" in end:
            return OVER if end["error"]["code"] == 504 else f"{end['error']} in a stream"
        times.pop()  # the usage isn't a token
        self.tokens += end["usage"]["completion_tokens"]
        self.first.append(times[1] - times[0])
        self.between += np.diff(times[1:]).tolist()
        return WHOLE

    async def _watch(self) -> None:
        while self.options.pid:
            fields = Path(f"/proc/{self.options.pid}/status").read_text().split("VmRSS:")[1]
            self.memory.append((round(time.monotonic() - self._began, 1), int(fields.split()[0]) * 1024))
            await asyncio.sleep(MEMORY_SECONDS)


def request(rng: random.Random, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The route and the body of a request as all of them are without --mixed."""
    prompt = [rng.randrange(options.vocabulary) for _ in range(options.prompt_tokens)]
    body = {"model": options.model, "prompt": prompt, "max_tokens": options.max_tokens, "ignore_eos": True}
    return "completions", body | {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}


def mixed_request(rng: random.Random, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The route and the body of a request of any kind."""
    path, body = request(rng, options)
    body["prompt"] = body["prompt"][: rng.randint(1, options.prompt_tokens)]
    body |= {"max_tokens": rng.randint(1, options.max_tokens), "temperature": 1, "stream": rng.random() >= UNSTREAMED}
    if rng.random() < VOTING:
        path = "chat/completions"
        body["messages"] = [{"role": "user", "content": f"{rng.randrange(10)}+{rng.randrange(10)} mod 10"}]
        body["vote"] = {"n": rng.randint(2, 32), "seconds": rng.choice([0.1, 5.0]), "rule": "none"}
    elif rng.random() < FORKED:
        body["n"] = 4
    return path, body


def percentiles(values: list[float]) -> dict[str, float] | None:
    """The median and the 99th percentile."""
    return {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99))} if values else None


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One request alone, then the load."""
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '-')}"}
    settings = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout()}
    async with aiohttp.ClientSession(headers=headers, **settings) as http:
        path, body = request(random.Random(options.seed), options)
        async with http.post(f"{options.url}/{path}", json=body) as answer:
            if answer.status != 200:
                sys.exit(f"{options.url} answers {answer.status}: {await answer.text()}")
        return await Load(options).run(http)


def add_run(options: argparse.Namespace, seen: dict[str, Any]) -> None:
    """Adds a run to the JSON file."""
    own = ("url", "out", "pid", "name", "model", "seed")
    settings = {name: value for name, value in vars(options).items() if name not in own}
    head = {"machine": describe_machine(torch.device("cpu")), "settings": settings}
    found = json.loads(options.out.read_text()) if options.out.exists() else head | {"servers": {}}
    if {name: found[name] for name in head} != head:
        sys.exit(f"{options.out} has runs with other settings or of another machine: choose another file")
    found["servers"].setdefault(options.name, []).append(seen | {"seed": options.seed})
    write_json(options.out, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="ends in /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--minutes", type=float, help="in place of --requests")
    parser.add_argument("--prompt-tokens", type=int, default=160)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000, help="prompts have tokens below it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--patience", type=float, default=600)
    parser.add_argument("--pid", type=int, help="of the server")
    parser.add_argument("--name", default="server", help="of the server in the JSON file")
    parser.add_argument("--out", type=Path, help="a JSON file, to whose runs of this name the run is added")
    options = parser.parse_args()
    seen = asyncio.run(measure(options))
    print(json.dumps(seen))
    if options.out:
        add_run(options, seen)
    if faults := seen["counts"].keys() - {WHOLE, REFUSED, LEFT, OVER}:
        sys.exit(f"faults: {', '.join(sorted(faults))}")


if __name__ == "__main__":
    main()
