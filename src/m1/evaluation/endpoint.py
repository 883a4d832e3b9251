"""Draws samples from a server with OpenAI's chat completions API, such as vLLM.

Several threads send requests. Temporary errors are retried with growing waits: status 429 and 5xx, time-outs, broken
connections, replies that aren't chat completions. If the server can't be reached at all or refuses a request, the
evaluation ends at once.
"""

import json
import math
import queue
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from m1.engine import SamplingParams, fold_in
from m1.errors import UserError
from m1.evaluation.deadline import bounded_client
from m1.evaluation.samplers import Sample, SampleRequest, Samples
from m1.options import MAX_SECONDS, check_count, fitted
from m1.secrets import HIDDEN, SHORTEST, api_key, redact

LONGEST_WAIT = 60.0  # seconds between two tries
LONGEST_REASON = 100  # characters of a finish reason
LARGEST_ANSWER = 2**25  # bytes, with the log-probabilities of all tokens
# Fields that are left out if a server refuses them: what it can't do, and filters that are off. They are asked for
# although they are off, since vLLM's own defaults come from the model's generation_config.json.
OPTIONAL = {"seed", "logprobs"}
OFF = {"top_k": 0, "min_p": 0.0}

Choice = tuple[str, int | None, float | None, str]  # text, tokens, log-probability, finish reason


@dataclass
class EndpointSampler:
    """Draws an evaluation's samples from a server with OpenAI's chat completions API.

    Args:
        url: base URL of the API, e.g. http://localhost:8000/v1. The key is $OPENAI_API_KEY, if set.
        model: the model's name on that server.
        concurrency: maximum number of open requests, one sample each.
        timeout: maximum seconds until a sample's answer is complete.
        tries: number of tries per request before the evaluation gives up.
        wait: seconds before the second try. The wait doubles with each further try, up to LONGEST_WAIT.

    Raises:
        UserError: a malformed URL, a number out of range, or a key that no HTTP header can hold.
    """

    url: str
    model: str
    concurrency: int = 256
    timeout: float = 3600.0
    tries: int = 6
    wait: float = 1.0

    def __post_init__(self) -> None:
        try:
            url = httpx2.URL(self.url)
        except (httpx2.InvalidURL, TypeError) as error:
            raise UserError(f"endpoint {redact(repr(self.url))}: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            example = "http://localhost:8000/v1"
            raise UserError(f"endpoint {redact(repr(self.url))}: give its base URL, such as {example}")
        if self.concurrency < 1 or not 0 < self.timeout <= MAX_SECONDS:
            raise UserError(
                f"concurrency={self.concurrency}, timeout={self.timeout}: must be positive, and the timeout at most "
                f"{MAX_SECONDS:.0f} seconds"
            )
        self.address = url.copy_with(path=url.path.rstrip("/") + "/chat/completions")
        self._shown = redact(str(self.address))
        self._key = api_key()
        # A dummy key, such as "x" for a local server, is a part of words and numbers.
        self._secret = self._key if self._key and len(self._key) >= SHORTEST else None
        self._unknown: set[str] = set()  # fields that this server refused
        self._reached = False

    def identity(self) -> dict[str, str]:
        """The kind "endpoint", and the model's name on the server."""
        return {"sampler": "endpoint", "model": self.model}

    def facts(self) -> dict[str, Any]:
        """The URL, without secrets."""
        return {"endpoint": redact(self.url)}

    def generate(self, requests: Sequence[SampleRequest], params: SamplingParams) -> Samples:
        """Sends one request per sample, with a seed of its own. The clock never pauses.

        Raises:
            UserError: the server can't be reached, refuses a request, or fails in all tries of one.
        """
        jobs: queue.SimpleQueue[tuple[SampleRequest, int]] = queue.SimpleQueue()
        for request in requests:
            for round_ in request.rounds:
                jobs.put((request, round_))
        total = jobs.qsize()
        results: queue.SimpleQueue[Sample | BaseException] = queue.SimpleQueue()
        stop = threading.Event()
        started = time.monotonic()

        def work() -> None:
            try:
                while not stop.is_set():
                    results.put(self._sample(client, *jobs.get_nowait(), params, started, stop))
            except queue.Empty:
                pass
            except BaseException as error:  # raised in the thread that waits for the results
                results.put(error)

        try:
            client, self._allowance = bounded_client(
                # Not compressed, since a small answer could unpack to any size.
                headers={"Accept-Encoding": "identity"}
                | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
                timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, 30.0), pool=None),
                limits=httpx2.Limits(max_connections=self.concurrency),
            )
        except Exception as error:
            raise UserError(
                f"can't ask {self._shown}: {redact(str(error))}; check $HTTP_PROXY, $HTTPS_PROXY and $SSL_CERT_FILE"
            ) from None
        try:
            for _ in range(min(self.concurrency, total)):
                threading.Thread(target=work, daemon=True).start()
            for _ in range(total):
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:  # also after Ctrl-C: the threads are daemons, so open requests don't delay the exit
            stop.set()
            client.close()

    def _sample(
        self,
        client: httpx2.Client,
        request: SampleRequest,
        round_: int,
        params: SamplingParams,
        started: float,
        stop: threading.Event,
    ) -> Sample:
        body = {
            "model": self.model,
            "messages": request.messages,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "seed": fold_in(request.seed, round_) % 2**31,
            "logprobs": True,
        }
        choice = self._post(client, body, stop)
        return Sample(request.problem, round_, *choice, time.monotonic() - started)

    def _post(self, client: httpx2.Client, body: dict[str, Any], stop: threading.Event) -> Choice:
        """Sends one HTTP request and returns its sample. Temporary errors are retried."""
        wait, problem = self.wait, ""
        for attempt in range(self.tries):
            if attempt and stop.wait(min(wait * random.uniform(0.8, 1.2), LONGEST_WAIT)):
                break
            wait = self.wait * 2**attempt
            asked = {name: value for name, value in body.items() if name not in self._unknown}
            try:
                self._allowance.begin(self.timeout, LARGEST_ANSWER)
                with client.stream("POST", self.address, json=asked) as response:
                    if response.headers.get("content-encoding", "identity") != "identity":
                        raise httpx2.DecodingError("the answer is compressed, though it shouldn't be")
                    text = response.read().decode("utf-8", "replace")
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                if not self._reached:
                    raise UserError(f"can't reach {self._shown}: {redact(str(error))}") from None
                problem = str(error)
                continue
            except httpx2.HTTPError as error:
                problem = str(error) or type(error).__name__
                continue
            except ValueError as error:  # a host's name that can't be encoded
                raise UserError(f"can't ask {self._shown}: {redact(str(error))}") from None
            self._reached = True
            problem = f"{response.status_code} {_excerpt(text)}"
            if response.status_code == 200:
                try:
                    return _choice(json.loads(text), self._secret)
                except Exception as error:
                    problem = f"a reply that isn't a chat completion ({type(error).__name__}: {_excerpt(text)})"
            elif response.status_code == 400 and (named := _named(text, asked)):
                self._unknown.add(named)
                wait = 0.0
            elif response.status_code == 429 or response.status_code >= 500:
                wait = max(wait, _retry_after(response))
            else:
                raise UserError(f"{self._shown} answers {redact(problem)}")
        raise UserError(
            f"{self._shown}: gave up after {self.tries} tries, the last: {redact(problem)}; finished samples are "
            "saved: run it again to resume"
        )


def _choice(answer: dict[str, Any], key: str | None) -> Choice:
    """The first choice of a chat completion. If a text repeats the API key, the key is removed.

    Raises:
        Exception: any, if it isn't a chat completion, or a number in it is impossible.
    """
    choice = answer["choices"][0]
    message, count = choice["message"], (answer.get("usage") or {}).get("completion_tokens")
    text, reason = message.get("content") or "", str(choice.get("finish_reason") or "unknown")[:LONGEST_REASON]
    # Servers with a reasoning parser return a sample in two parts. Answers are extracted from the joined text.
    if reasoning := message.get("reasoning_content") or message.get("reasoning"):
        text = f"<think>\n{reasoning}\n</think>\n{text}"
    text, reason = (part.replace(key, HIDDEN) if key else part for part in (text, reason))
    text, reason = (part.encode("utf-8", "replace").decode() for part in (text, reason))  # JSON has half characters
    logprob = None
    if content := (choice.get("logprobs") or {}).get("content"):
        logprob, count = sum(float(token["logprob"]) for token in content), len(content)
        if not math.isfinite(logprob):
            raise ValueError(f"logprobs with the sum {logprob}")
    if count is not None:
        check_count(fitted(count, int, "completion_tokens"), "completion_tokens")
    return text, count, logprob, reason


def _named(text: str, asked: dict[str, Any]) -> str | None:
    """The field that the error message names, among those that can be left out; else None."""
    left_out = (name for name, value in asked.items() if name in OPTIONAL or OFF.get(name) == value)
    return next((name for name in left_out if name in text), None)


def _retry_after(response: httpx2.Response) -> float:
    try:
        return float(response.headers.get("retry-after", 0))
    except ValueError:  # a date
        return 0.0


def _excerpt(text: str) -> str:
    return " ".join(text[:1000].split())[:200]
