"""Draws samples from servers with OpenAI's chat completions API, such as vLLM.

Several threads send requests to each. Temporary errors are retried with growing waits: status 429 and 5xx, time-outs,
broken connections, replies that aren't chat completions. If a server refuses a request, the evaluation ends at once. So
it does if the only server can't be reached at all; of several, the others take over.
"""

import json
import logging
import math
import queue
import random
import ssl
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx2

from m1.engine import SamplingParams, fold_in
from m1.errors import UserError
from m1.evaluation.deadline import bounded_client
from m1.evaluation.samplers import Sample, SampleRequest, Samples
from m1.options import MAX_SECONDS, check_count, fitted
from m1.secrets import HIDDEN, SHORTEST, api_key, redact

logger = logging.getLogger(__name__)

FEWER_TRIES = 3  # to connect, before another server gets the request
LONGEST_WAIT = 60.0  # seconds between two tries
LONGEST_REASON = 100  # characters of a finish reason
LOOPBACK = ("127.0.0.1", "::1", "localhost")
LARGEST_ANSWER = 2**25  # bytes, with the log-probabilities of all tokens
# Fields that are left out if a server refuses them: what it can't do, and filters that are off. They are asked for
# although they are off, since vLLM's own defaults come from the model's generation_config.json.
OPTIONAL = {"seed", "logprobs"}
OFF = {"top_k": 0, "min_p": 0.0}

PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty", "min_tokens")  # asked for if they are on
PLAIN = SamplingParams()

Choice = tuple[str, int | None, float | None, str]  # text, tokens, log-probability, finish reason


class ServerLost(UserError):
    """A server can't be reached, or fails in all tries of a request."""


class Job(NamedTuple):
    """One HTTP request: samples of one problem.

    Attributes:
        request: the problem.
        rounds: numbers of the samples.
    """

    request: SampleRequest
    rounds: tuple[int, ...]


@dataclass
class EndpointSampler:
    """Draws an evaluation's samples from one or several servers with OpenAI's chat completions API.

    Servers take requests from one queue, each as fast as it answers. One that fails is left out from then on, and
    others repeat its requests. The last one's failure ends the evaluation.

    Args:
        url: base URL of the API, e.g. http://localhost:8000/v1, or several. The key is $OPENAI_API_KEY, if set.
        model: the model's name on these servers.
        concurrency: maximum number of samples that a server is asked for at the same time.
        timeout: maximum seconds until a request's answer is complete.
        tries: number of tries per request before a server counts as failed. One that refuses connections, while there
            are others, has FEWER_TRIES.
        wait: seconds before the second try. The wait doubles with each further try, up to LONGEST_WAIT.
        samples_per_request: maximum number of a problem's samples in one request, for which a server prefills the
            prompt once. They have one seed, from which the server derives theirs.
        left_out: fields of OPTIONAL that no request has.
        opens_thought: whether a prompt ends with <think>. Servers leave it out of their texts, and samples get it back.

    Raises:
        UserError: a malformed URL, a number out of range, or a key that no HTTP header can hold.
    """

    url: str | Sequence[str]
    model: str
    concurrency: int = 256
    timeout: float = 3600.0
    tries: int = 6
    wait: float = 1.0
    samples_per_request: int = 1
    left_out: Collection[str] = ()
    opens_thought: bool = False

    def __post_init__(self) -> None:
        urls = [self.url] if isinstance(self.url, str) else list(self.url)
        self.servers = [Server(url, self) for url in urls]
        if min(self.concurrency, self.samples_per_request, len(urls)) < 1 or not 0 < self.timeout <= MAX_SECONDS:
            raise UserError(
                f"concurrency={self.concurrency}, samples_per_request={self.samples_per_request}, "
                f"timeout={self.timeout}: must be positive, and the timeout at most {MAX_SECONDS:.0f} seconds"
            )
        self._lock = threading.Lock()

    def identity(self) -> dict[str, str]:
        """The kind "endpoint", and the model's name on the servers."""
        return {"sampler": "endpoint", "model": self.model}

    def facts(self) -> dict[str, Any]:
        """The URLs, without secrets."""
        return {"endpoint": ", ".join(redact(server.url) for server in self.servers)}

    def generate(
        self, requests: Sequence[SampleRequest], params: SamplingParams, left: Callable[[], float] = lambda: math.inf
    ) -> Samples:
        """Yields samples in the order in which they arrive. The clock never pauses.

        A request's seed is that of its first sample.

        Args:
            left: how many seconds are left. After them the unfinished samples are dropped.

        Raises:
            UserError: no server can be reached, one refuses a request, or all have failed.
        """
        most = self.samples_per_request
        fresh = (  # jobs are made when servers take them: a vote within seconds has 100,000 samples and never needs all
            Job(request, request.rounds[first : first + most])
            for request in requests
            for first in range(0, len(request.rounds), most)
        )
        taking = threading.Lock()
        jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # what remains of others
        total, threads = sum(len(request.rounds) for request in requests), max(1, self.concurrency // most)
        results: queue.SimpleQueue[Sample | BaseException] = queue.SimpleQueue()
        stop = threading.Event()
        started = time.monotonic()

        def take() -> Job | None:
            with taking:
                job = None if stop.is_set() else next(fresh, None)
            return job or jobs.get()

        def work(server: Server) -> None:
            try:
                while job := take():
                    try:
                        choices = server.ask(self._body(job, params), stop)
                    except ServerLost as error:
                        jobs.put(job)
                        return None if stop.is_set() else self._leave_out(server, error)
                    for round_, choice in zip(job.rounds, choices, strict=False):
                        text = f"<think>{choice[0]}" if self.opens_thought else choice[0]
                        ended = time.monotonic() - started
                        results.put(Sample(job.request.problem, round_, text, *choice[1:], ended))
                    for round_ in job.rounds[len(choices) :]:  # of a server that gives one sample per request
                        jobs.put(Job(job.request, (round_,)))
            except BaseException as error:  # raised in the thread that waits for the results
                results.put(error)

        try:
            for server in self.servers:
                server.open(threads)
            workers = [server for server in self.servers for _ in range(min(threads, total))]
            for server in workers:
                threading.Thread(target=work, args=(server,), daemon=True).start()
            for _ in range(total):
                try:
                    result = results.get(timeout=min(max(left(), 0.0), MAX_SECONDS))
                except queue.Empty:
                    return
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:  # also after Ctrl-C: the threads are daemons, so open requests don't delay the exit
            stop.set()
            for server in self.servers:
                server.close()
            for _ in range(len(self.servers) * min(threads, total)):
                jobs.put(None)

    def _body(self, job: Job, params: SamplingParams) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": job.request.messages,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "seed": fold_in(job.request.seed, job.rounds[0]) % 2**31,
            "logprobs": True,
            **({"n": len(job.rounds)} if len(job.rounds) > 1 else {}),
            **({"stop": list(params.stop)} if params.stop else {}),
            **{name: getattr(params, name) for name in PENALTIES if getattr(params, name) != getattr(PLAIN, name)},
        }

    def prepare(self) -> None:
        """Does what `generate` would do first, and takes time, so that a clock can be started after it."""
        for server in self.servers:
            server.open(1)
            server.close()

    def others(self, server: "Server") -> bool:
        """Whether another server can take a request of this one."""
        return any(other.alive for other in self.servers if other is not server)

    def _leave_out(self, server: "Server", error: ServerLost) -> None:
        """Notes that a server has failed. Raises the error if it was the last one."""
        with self._lock:
            if server.alive and self.others(server):
                logger.warning("%s; the other servers take over", error)
            server.alive = False
            if not any(other.alive for other in self.servers):
                raise error


class Server:
    """One server of an `EndpointSampler`.

    Args:
        url: base URL of its API.
        sampler: whose settings it follows.

    Attributes:
        alive: whether it has not failed.
    """

    def __init__(self, url: str, sampler: EndpointSampler):
        try:
            parsed = httpx2.URL(url)
        except (httpx2.InvalidURL, TypeError) as error:
            raise UserError(f"endpoint {redact(repr(url))}: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            example = "http://localhost:8000/v1"
            raise UserError(f"endpoint {redact(repr(url))}: give its base URL, such as {example}")
        self.url, self.sampler, self.alive = url, sampler, True
        self.address = parsed.copy_with(path=parsed.path.rstrip("/") + "/chat/completions")
        self._shown = redact(str(self.address))
        self._key = api_key()
        # A dummy key, such as "x" for a local server, is a part of words and numbers.
        self._secret = self._key if self._key and len(self._key) >= SHORTEST else None
        self._unknown = set(sampler.left_out)  # and the fields that this server refused
        self._single = False  # whether it refused several samples per request
        self._reached = False
        self._client: httpx2.Client | None = None
        self._certificates: ssl.SSLContext | None = None

    def open(self, connections: int) -> None:
        """Gets ready for up to `connections` requests at a time. Raises UserError if the environment forbids them."""
        timeout = self.sampler.timeout
        try:
            self._certificates = self._certificates or httpx2.create_ssl_context()  # slow
            self._client, self._allowance = bounded_client(
                verify=self._certificates,
                # Not compressed, since a small answer could unpack to any size.
                headers={"Accept-Encoding": "identity"}
                | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
                timeout=httpx2.Timeout(timeout, connect=min(timeout, 30.0), pool=None),
                limits=httpx2.Limits(max_connections=connections),
                trust_env=self.address.host not in LOOPBACK,  # no proxy leads to this machine
            )
        except Exception as error:
            raise UserError(
                f"can't ask {self._shown}: {redact(str(error))}; check $HTTP_PROXY, $HTTPS_PROXY and $SSL_CERT_FILE"
            ) from None

    def close(self) -> None:
        """Closes all connections, by which a server learns that nobody waits for its samples."""
        if self._client:
            self._client.close()

    def ask(self, body: dict[str, Any], stop: threading.Event) -> "list[Choice]":
        """Sends one HTTP request and returns its samples, some of those asked for. Temporary errors are retried.

        Raises:
            ServerLost: the server can't be reached, or all tries have failed.
            UserError: it refuses the request.
        """
        assert self._client
        if "n" in body and self._single:
            return []
        wait, problem, attempt = self.sampler.wait, "another request failed", 0
        while attempt < self.sampler.tries and self.alive:
            if attempt and stop.wait(min(wait * random.uniform(0.8, 1.2), LONGEST_WAIT)):
                break
            wait = self.sampler.wait * 2**attempt
            attempt += 1
            asked = {name: value for name, value in body.items() if name not in self._unknown}
            try:
                self._allowance.begin(self.sampler.timeout, LARGEST_ANSWER * body.get("n", 1))
                with self._client.stream("POST", self.address, json=asked) as response:
                    if response.headers.get("content-encoding", "identity") != "identity":
                        raise httpx2.DecodingError("the answer is compressed, though it shouldn't be")
                    text = response.read().decode("utf-8", "replace")
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                if not self._reached:
                    raise ServerLost(f"can't reach {self._shown}: {redact(str(error))}") from None
                problem = str(error)
                if self.sampler.others(self) and attempt >= FEWER_TRIES:
                    break
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
                    return _choices(json.loads(text), self._secret)
                except Exception as error:
                    problem = f"a reply that isn't a chat completion ({type(error).__name__}: {_excerpt(text)})"
            elif response.status_code in (400, 422) and (named := _named(text, asked)):
                self._unknown.add(named)
                wait = 0.0
            elif response.status_code in (400, 422) and "n" in asked:
                self._single = True
                return []  # each sample is asked for alone
            elif response.status_code == 429 or response.status_code >= 500:
                wait = max(wait, _retry_after(response))
            else:
                raise UserError(f"{self._shown} answers {redact(problem)}")
        raise ServerLost(
            f"{self._shown}: gave up after {attempt} tries, the last: {redact(problem)}; finished samples are "
            "saved: run it again to resume"
        )


def _choices(answer: dict[str, Any], key: str | None) -> "list[Choice]":
    """The choices of a chat completion, one at least. If a text repeats the API key, the key is removed.

    Raises:
        Exception: any, if it isn't a chat completion, or a number in it is impossible.
    """
    first, *others = answer["choices"]
    # the usage is that of all choices
    count = None if others else (answer.get("usage") or {}).get("completion_tokens")
    return [_choice(choice, count, key) for choice in (first, *others)]


def _choice(choice: dict[str, Any], count: int | None, key: str | None) -> Choice:
    message = choice["message"]
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
