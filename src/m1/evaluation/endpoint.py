"""Samples from a server that speaks OpenAI's chat completions: vLLM, for instance, or a cluster behind one address.

Several threads post requests. What may pass is tried again, later and later: 429 and 5xx, time-outs, broken
connections, answers that aren't completions. A server that can't be reached at all, or that refuses a request, ends the
evaluation at once.
"""

import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from m1.engine import SamplingParams
from m1.errors import UserError
from m1.evaluation.generators import Ask, Sample, Samples

CHOICES = 8  # samples of a request at most: an answer with log-probabilities has some 100 bytes a token
LONGEST_WAIT = 60.0  # seconds between two tries
REQUESTED_IF_KNOWN = ("seed", "logprobs")  # fields that are left out where a server refuses them

Choice = tuple[str, int | None, float | None, str]  # text, tokens, log-probability, finish reason


@dataclass
class EndpointGenerator:
    """
    Args:
        url: the API's base, e.g. http://localhost:8000/v1. The key is $OPENAI_API_KEY, if set.
        model: its name on that server.
        concurrency: requests at a time.
        timeout: seconds the server may be silent; it is so while it generates.
        tries: of a request, before the evaluation is given up.
        wait: seconds before the second try, doubled with each further one.

    Raises:
        UserError: a malformed URL, or a number that can't be.
    """

    url: str
    model: str
    concurrency: int = 64
    timeout: float = 3600.0
    tries: int = 6
    wait: float = 1.0
    by_round = False

    def __post_init__(self) -> None:
        try:
            url = httpx2.URL(self.url)
        except (httpx2.InvalidURL, TypeError) as error:
            raise UserError(f"endpoint {self.url!r}: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError(f"endpoint {self.url!r}: give its base URL, such as http://localhost:8000/v1")
        if self.concurrency < 1 or not self.timeout > 0:
            raise UserError(f"concurrency={self.concurrency}, timeout={self.timeout}: must be positive")
        self.address = self.url.rstrip("/") + "/chat/completions"
        self._unknown: set[str] = set()  # of REQUESTED_IF_KNOWN, what this server refused
        self._reached = False

    def identity(self) -> dict[str, str]:
        return {"generator": "endpoint", "model": self.model}

    def facts(self) -> dict[str, Any]:
        return {"endpoint": self.url}

    def generate(self, asks: Sequence[Ask], params: SamplingParams) -> Samples:
        """Requests of up to CHOICES samples each, the first rounds' before the later ones'. The clock never stops."""
        parts = [_part(ask, first) for ask in asks for first in range(0, len(ask.rounds), CHOICES)]
        jobs: queue.SimpleQueue[Ask] = queue.SimpleQueue()
        for part in sorted(parts, key=lambda part: part.rounds[0]):
            jobs.put(part)
        results: queue.SimpleQueue[Sample | BaseException] = queue.SimpleQueue()
        stop = threading.Event()
        started = time.monotonic()

        def work() -> None:
            try:
                while not stop.is_set():
                    for sample in self._sample(client, jobs.get_nowait(), params, started, stop):
                        results.put(sample)
            except queue.Empty:
                pass
            except BaseException as error:  # it is the caller's, who waits for the results
                results.put(error)

        key = os.environ.get("OPENAI_API_KEY")
        client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, 30.0), pool=None),
            limits=httpx2.Limits(max_connections=self.concurrency),
        )
        try:
            for _ in range(min(self.concurrency, len(parts))):
                threading.Thread(target=work, daemon=True).start()
            for _ in range(sum(len(part.rounds) for part in parts)):
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:  # also after Ctrl-C: the threads are daemons, nobody waits for their requests
            stop.set()
            client.close()

    def _sample(
        self, client: httpx2.Client, ask: Ask, params: SamplingParams, started: float, stop: threading.Event
    ) -> Iterator[Sample]:
        """All samples of an ask. A server that gives fewer choices than it is asked for is asked again."""
        rounds = list(ask.rounds)
        while rounds:
            body = {
                "model": self.model,
                "messages": [{"role": "user", "content": ask.prompt}],
                "n": len(rounds),
                "max_tokens": params.max_tokens,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "seed": (ask.seed + rounds[0] - ask.rounds[0]) % 2**31,
                "logprobs": True,
            }
            for text, tokens, logprob, finish_reason in self._post(client, body, stop)[: len(rounds)]:
                seconds = time.monotonic() - started
                yield Sample(ask.problem, rounds.pop(0), text, tokens, logprob, finish_reason, seconds)

    def _post(self, client: httpx2.Client, body: dict[str, Any], stop: threading.Event) -> list[Choice]:
        """The choices of one request, tried again as long as that may help."""
        wait, problem = self.wait, ""
        for attempt in range(self.tries):
            if attempt and stop.wait(min(wait * random.uniform(0.8, 1.2), LONGEST_WAIT)):
                break
            wait = self.wait * 2**attempt
            asked = {name: value for name, value in body.items() if name not in self._unknown}
            try:
                response = client.post(self.address, json=asked)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                if not self._reached:
                    raise UserError(f"can't reach {self.address}: {error}") from None
                problem = str(error)
                continue
            except httpx2.HTTPError as error:
                problem = str(error) or type(error).__name__
                continue
            self._reached = True
            problem = f"{response.status_code} {_excerpt(response)}"
            if response.status_code == 200:
                try:
                    return _choices(response.json())
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    problem = f"an answer that isn't a chat completion ({type(error).__name__}: {_excerpt(response)})"
            elif response.status_code == 400 and (named := _named(response, asked)):
                self._unknown.add(named)
                wait = 0.0
            elif response.status_code == 429 or response.status_code >= 500:
                wait = max(wait, _retry_after(response))
            else:
                raise UserError(f"{self.address} answers {problem}")
        raise UserError(
            f"{self.address}: given up after {self.tries} tries, the last: {problem}; finished samples are saved: "
            "run it again to go on"
        )


def _part(ask: Ask, first: int) -> Ask:
    return Ask(ask.problem, ask.prompt, ask.rounds[first : first + CHOICES], ask.seed + first)


def _choices(answer: dict[str, Any]) -> list[Choice]:
    """A completion's choices.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it isn't a chat completion.
    """
    choices = answer["choices"]
    if not choices:
        raise ValueError("no choices")
    counts: list[int | None] = [None] * len(choices)
    if (used := (answer.get("usage") or {}).get("completion_tokens")) is not None:
        # the server counts all choices together: an even split is wrong for each, but right for their sum
        counts = [used // len(choices) + (i < used % len(choices)) for i in range(len(choices))]
    return [_choice(choice, count) for choice, count in zip(choices, counts, strict=True)]


def _choice(choice: dict[str, Any], count: int | None) -> Choice:
    message = choice["message"]
    text = message.get("content") or ""
    # servers with a reasoning parser give a sample in two parts; answers are looked for in the whole of it
    if reasoning := message.get("reasoning_content") or message.get("reasoning"):
        text = f"<think>\n{reasoning}\n</think>\n{text}"
    text = text.encode("utf-8", "replace").decode()  # JSON can hold half a character, a file can't
    logprob = None
    if content := (choice.get("logprobs") or {}).get("content"):
        logprob, count = sum(float(token["logprob"]) for token in content), len(content)
    return text, count, logprob, str(choice.get("finish_reason") or "unknown")


def _named(response: httpx2.Response, asked: dict[str, Any]) -> str | None:
    """Which field of the request, of those that can be left out, an error message is about."""
    return next((name for name in REQUESTED_IF_KNOWN if name in asked and name in response.text), None)


def _retry_after(response: httpx2.Response) -> float:
    try:
        return float(response.headers.get("retry-after", 0))
    except ValueError:  # a date
        return 0.0


def _excerpt(response: httpx2.Response) -> str:
    return " ".join(response.text.split())[:200]
