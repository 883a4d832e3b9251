"""Many clients at once: some leave, some read slowly, some vote. Nobody hangs, and every slot is free afterwards."""

import asyncio
import random

import httpx2
import pytest

KEY = {"Authorization": "Bearer sk-of-the-tests"}
CLIENTS, SECONDS = 200, 60


def body(rng):
    made = {"messages": [{"role": "user", "content": f"{rng.randrange(10)}+{rng.randrange(10)} mod 10"}]}
    made |= {"max_tokens": rng.randint(1, 60), "stream": rng.random() < 0.6, "n": rng.choice([1, 1, 1, 4])}
    if rng.random() < 0.2:
        made |= {"n": 1, "vote": {"n": rng.randint(2, 32), "seconds": rng.choice([0.1, 5]), "rule": "none"}}
    return made


async def client(http, rng, url, counts, ends):
    """Asks again and again. Now and then it leaves before the end of an answer, or reads it slowly."""
    while asyncio.get_running_loop().time() < ends:
        leaves = rng.random() < 0.3
        try:
            async with asyncio.timeout(rng.random() * 0.5 if leaves else 60):
                async with http.stream("POST", url, json=body(rng), headers=KEY, timeout=60) as answer:
                    text = ""
                    async for piece in answer.aiter_text():
                        text += piece
                        await asyncio.sleep(0.2 if rng.random() < 0.02 else 0)
        except TimeoutError:
            assert leaves, "a request hangs"
            counts["left"] += 1
            continue
        counts[answer.status_code] += 1
        if answer.status_code == 200:
            assert text.endswith("data: [DONE]\n\n") or text.startswith("{"), text
        else:
            assert answer.status_code == 429, text
            await asyncio.sleep(0.2)


@pytest.mark.long
def test_a_crowd(serve):
    server = serve(["sk-of-the-tests"], max_waiting=64)
    counts = {"left": 0, 200: 0, 429: 0}

    async def crowd():
        ends = asyncio.get_running_loop().time() + SECONDS
        async with httpx2.AsyncClient(limits=httpx2.Limits(max_connections=CLIENTS)) as http:
            url = f"{server.url}/v1/chat/completions"
            await asyncio.gather(*(client(http, random.Random(i), url, counts, ends) for i in range(CLIENTS)))

    asyncio.run(crowd())
    assert min(counts.values()) > 50, counts
    assert server.idle() and server.loop.engine.free_slots == 8 and server.loop._load == 0
