"""The engine under more load than it has slots, for minutes: memory must not grow, and nobody may starve.

python benchmarks/soak.py [--minutes 20]

Requests of mixed lengths, sample counts, settings and repeated prompts come without pause; some are aborted at random.
After each minute of load, when what was left is finished, it notes the resident memory, the free slots, and the most
steps that a request waited for its first slot: as requests are served as they come, what stands in front of it bounds
that. Writes results/soak.json.
"""

import argparse
import random
import time
from collections import deque
from pathlib import Path

import torch

from m1.bench.decoders import make_model
from m1.engine import Engine, Request, SamplingParams
from m1.jsonl import write_json
from m1.machine import describe_machine

ROOT = Path(__file__).parents[1]
SLOTS, MAX_MODEL_LEN, WAITING = 16, 512, 48  # requests kept in the queue
ABORTED = 0.1  # of the requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    minutes = parser.parse_args().minutes
    engine = Engine(
        make_model("30m", torch.float32, hybrid=True, max_model_len=MAX_MODEL_LEN), [], SLOTS, MAX_MODEL_LEN
    )
    rng, rows, end = random.Random(0), [], time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        rows.append(minute(engine, rng))
        print(rows[-1], flush=True)
        write(rows)


def write(rows: list[dict[str, float]]) -> None:
    machine = describe_machine(torch.device("cpu"))
    facts = {"slots": SLOTS, "waiting": WAITING, "minutes_of_load": rows}
    write_json(ROOT / "results" / "soak.json", {"machine": machine} | facts)


def minute(engine: Engine, rng: random.Random) -> dict[str, float]:
    """A minute of load, and then what is left is finished."""
    waiting: deque[tuple[Request, int]] = deque()  # with the step at which each was submitted
    live: list[Request] = []
    longest = submitted = 0
    began, first = time.monotonic(), engine.stats.steps
    while engine.busy or time.monotonic() < began + 60:
        while time.monotonic() < began + 60 and len(waiting) < WAITING:
            waiting.append((submit(engine, rng), engine.stats.steps))
            submitted += 1
        engine.step()
        while waiting and (waiting[0][0].started or waiting[0][0].done):
            request, since = waiting.popleft()
            longest = max(longest, engine.stats.steps - since)
            live.append(request)
        live = [request for request in live if not request.done]
        if live and rng.random() < ABORTED / 8:
            engine.abort(rng.choice(live))
    return {
        "requests": submitted,
        "steps": engine.stats.steps - first,
        "tokens": engine.stats.decoded,
        "longest_wait_in_steps": longest,
        "free_slots": engine.free_slots,
        "resident_bytes": resident_bytes(),
    }


def submit(engine: Engine, rng: random.Random) -> Request:
    start = rng.randrange(8)  # prompts begin alike now and then, for the prefix cache
    length = rng.choice([1, 5, 40, 200, 380])
    prompt = [(start * 1000 + i * 7) % engine.vocab_size for i in range(length)]
    params = SamplingParams(
        max_tokens=rng.choice([1, 8, 30, 100]), temperature=rng.choice([0.0, 0.7, 1.0]), top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 20]), seed=rng.randrange(1000), n=rng.choice([1, 1, 1, 4, 20]),
    )  # fmt: skip
    request = Request(prompt, params)
    engine.submit(request)
    return request


def resident_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    main()
