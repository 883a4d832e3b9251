"""Text in, text out: chat templates, stop strings, and streams on top of the engine."""

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine.engine import Engine, stop_tokens
from m1.engine.sampling import SamplingParams
from m1.engine.sequence import Request, Sequence, TopLogprobs, requests_for
from m1.model.checkpoint import load_model
from m1.model.gguf import is_gguf, read_gguf, stored_quantization
from m1.model.tokenizer import decode_text, encode_chat
from m1.ops.backend import default_device

Prompt = str | list[dict[str, str]]  # plain text without a template, or chat messages, which go through the template
UNFINISHED = "\ufffd"  # what a tokenizer returns for a character with missing bytes


class LLM:
    """Generates text from text or chat messages with a model, its tokenizer and an `Engine`.

    Args:
        model: M1, Llama, Qwen2 or Qwen3.
        tokenizer: the model's tokenizer, with a chat template if prompts are messages.
        stop_token_ids: generation stops after any of these tokens; the model's and the tokenizer's eos when None.
        max_model_len: maximum number of tokens of a prompt and its sequence together. When None, the engine is made
            for the first prompts' length, and made again when longer ones come.
        engine_options: further options of `Engine`: max_num_seqs, prefix_cache, quantize, ...

    Attributes:
        engine: the current `Engine`; None before it is first needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Iterable[int] | None = None,
        max_model_len: int | None = None,
        **engine_options: Any,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.stop_token_ids = stop_tokens(model, tokenizer) if stop_token_ids is None else sorted(stop_token_ids)
        self.max_model_len, self.engine_options = max_model_len, engine_options
        self.engine: Engine | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: str | torch.dtype = "auto", device: str | None = None, **options: Any
    ) -> "LLM":
        """Loads the model and the tokenizer of a checkpoint.

        Args:
            folder: the checkpoint's folder, its id on the Hub, or a GGUF file.
            dtype: of the weights, e.g. "bfloat16"; "auto" keeps the checkpoint's own. A GGUF file's are then float32,
                which keeps their values, and on a CPU Q8_0 and Q4_1 layers run as they are, as int8 and int4.
            device: where to put the model; None for the GPU if there is one.
            options: those of `LLM`.

        Raises:
            UserError: as `load_model` and `read_gguf`.
        """
        if not is_gguf(folder):
            return cls(*load_model(folder, device, dtype=dtype), **options)
        exact: Any = "float32" if dtype == "auto" else str(dtype).removeprefix("torch.")
        model, tokenizer = read_gguf(Path(folder), exact)
        device = device or default_device()
        if device == "cpu" and dtype == "auto":
            options["quantize"] = options.get("quantize") or stored_quantization(Path(folder))
        return cls(model.to(device), tokenizer, **options)

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids. Raises UserError if messages have no chat template or the template fails on them."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        return encode_chat(self.tokenizer, prompt)

    def decode(self, token_ids: list[int]) -> str:
        """The text of a sequence's tokens, without special tokens and stop tokens."""
        return decode_text(self.tokenizer, token_ids, self.stop_token_ids)

    def text_of(self, sequence: Sequence) -> "TextSequence":
        """The sequence as text, which grows as you `read` it after each step."""
        skip = frozenset([*self.stop_token_ids, *sequence.request.params.stop_token_ids])
        return TextSequence(sequence, self.tokenizer, skip)

    def length_for(self, prompts: Iterable[list[int]], max_tokens: int) -> int:
        """The max_model_len these prompts need: the longest one and its sequence, at most the model's context."""
        return min(max(map(len, prompts), default=0) + max_tokens, self.model.config.max_position_embeddings)

    def engine_for(self, prompts: Iterable[list[int]], max_tokens: int) -> Engine:
        """The engine to use for these prompts and `max_tokens` more. It is replaced by a larger one if needed.

        With a fixed `max_model_len` the engine has that length, whatever the prompts need.
        """
        length = self.length_for(prompts, max_tokens) if self.max_model_len is None else self.max_model_len
        if self.engine is None or self.engine.max_model_len < length:
            self.engine = None  # its memory is needed for the next one
            self.engine = Engine(self.model, self.stop_token_ids, max_model_len=length, **self.engine_options)
        return self.engine

    def reload_weights(self, model: PreTrainedModel) -> None:
        """Takes over the weights of a model that is being trained, in the own model's dtype (`Engine.load_weights`)."""
        if self.engine is not None:
            self.engine.load_weights(model)

    def generate(self, prompts: list[Prompt], params: SamplingParams) -> list["TextSequence"]:
        """Returns `params.n` samples of each prompt, in the order of the prompts. Raises UserError as `stream`."""
        samples = {(sample.prompt, sample.sequence.index): sample for sample in self.stream(prompts, params)}
        return [samples[i, j] for i in range(len(prompts)) for j in range(params.n)]

    def stream(self, prompts: list[Prompt], params: SamplingParams) -> Iterator["TextSequence"]:
        """Yields a sample whenever its text has grown or ended. Text that was yielded is never taken back.

        Seeds are those of `requests_for`.

        Raises:
            UserError: a prompt the engine refuses, or messages without a chat template.
        """
        yield from self.stream_requests(requests_for([self.encode(prompt) for prompt in prompts], params))

    def stream_requests(self, requests: list[Request]) -> Iterator["TextSequence"]:
        """`stream` for requests, each with its own parameters."""
        with closing(self._steps(self.prepare(requests), requests)) as steps:
            for read in steps:
                yield from read

    def run(self, requests: list[Request]) -> Generator[list["FinishedSample"], None, None]:
        """Runs requests as `Engine.run` does. After each step, yields the samples that ended in it.

        You may append prepared requests to the list (see `prepare`). A sequence's tokens are forgotten once it is
        yielded. The clock of the samples' `seconds` starts when the engine is made, and pauses while the caller works.

        Raises:
            UserError: a prompt the engine refuses.
        """
        engine = self.prepare(requests)
        started = time.monotonic()
        with closing(self._steps(engine, requests, ends_only=True)) as steps:
            for read in steps:
                now = time.monotonic()
                yield [_finished(sample, now - started) for sample in read if sample.sequence.done]
                started += time.monotonic() - now

    def prepare(self, requests: list[Request]) -> Engine:
        """The engine to use for these requests. Their stop strings that are special tokens become stop tokens."""
        for request in requests:
            request.params = self._with_special_stops(request.params)
        longest = max((request.params.max_tokens for request in requests), default=0)
        return self.engine_for([request.tokens for request in requests], longest)

    def _steps(
        self, engine: Engine, requests: list[Request], ends_only: bool = False
    ) -> Generator[list["TextSequence"], None, None]:
        """After each step, yields the samples whose text has grown or ended.

        With `ends_only`, a running sequence is read only if a stop string may end it.
        """
        mine: set[Request] = set()
        texts: dict[Sequence, TextSequence] = {}  # of the running sequences: there may be many more
        with closing(engine.run(requests)) as steps:
            for ended in steps:
                mine.update(requests[len(mine) :])
                running = [s for s in engine.running if s.request in mine and (s.request.params.stop or not ends_only)]
                read = []
                for sequence in [*ended, *running]:
                    sample = texts.pop(sequence, None) or self.text_of(sequence)
                    length = len(sample.text)
                    if sample.read():
                        engine.finish(sequence, "stop")
                    if not sequence.done:
                        texts[sequence] = sample
                    if sequence.done or len(sample.text) != length:
                        read.append(sample)
                yield read

    def _with_special_stops(self, params: SamplingParams) -> SamplingParams:
        """Makes stop strings that are special tokens into stop tokens, since texts don't have them."""
        if not params.stop:  # listing the special tokens takes time, and there may be many requests
            return params
        special = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        found = [special[stop] for stop in params.stop if stop in special]
        return replace(params, stop_token_ids=(*params.stop_token_ids, *found)) if found else params


@dataclass(frozen=True)
class FinishedSample:
    """A sample that has ended.

    Attributes:
        prompt: its request's `id`.
        index: its number among the prompt's samples.
        text: its text, without the stop string that ended it.
        tokens: number of its tokens.
        logprob: sum of their log-probabilities.
        token_logprobs: the tokens, each with its log-probability, if `params.logprobs` is above 0; else empty.
        top_logprobs: as in `Sequence`.
        finish_reason: as in `Sequence`.
        seconds: from the start of the run to its end, without the pauses of the engine.
    """

    prompt: int
    index: int
    text: str
    tokens: int
    logprob: float
    finish_reason: str
    seconds: float
    token_logprobs: list[tuple[int, float]]
    top_logprobs: TopLogprobs


def _finished(sample: "TextSequence", seconds: float) -> FinishedSample:
    sequence = sample.sequence
    length, logprob, top = len(sequence.token_ids), sum(sequence.logprobs), sequence.top_logprobs
    drawn = zip(sequence.token_ids, sequence.logprobs, strict=True)
    of_tokens = list(drawn) if sequence.request.params.logprobs else []
    sequence.forget()
    own = sample.prompt, sequence.index, sample.text, length, logprob, sequence.finish_reason
    return FinishedSample(*own, seconds, of_tokens, top)


@dataclass
class TextSequence:
    """A sample as text: a `Sequence` and its text so far, without the stop string that ended it.

    Attributes:
        sequence: its tokens, log-probabilities and reason to end.
        tokenizer: decodes the tokens.
        skip: stop tokens, which are left out of the text, as special tokens are.
        text: the text so far. It grows with `read`, by whole characters. An end that may become a stop string is held
            back until the next tokens decide.
    """

    sequence: Sequence
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    skip: frozenset[int] = field(repr=False)
    text: str = ""
    _decoded: str = field(default="", repr=False)  # `text` and what is held back
    _seen: int = 0  # number of the sequence's tokens read
    _tokens: list[int] = field(default_factory=list, repr=False)  # the sequence's tokens without `skip`
    _shown: int = 0  # number of _tokens whose text is in `_decoded`
    _context: int = 0  # where decoding starts in _tokens: a token's text can depend on those before it

    @property
    def prompt(self) -> int:
        """Number of its prompt in the list. `sequence.index` is its number among the prompt's samples."""
        return self.sequence.request.id

    def read(self) -> bool:
        """Adds the text of the sequence's new tokens. Returns True if a stop string has ended the text."""
        params = self.sequence.request.params
        if self._seen < params.min_tokens:
            self._decode(params.min_tokens)
        known, stops = len(self._decoded), params.stop
        self._decode()
        found = [self._decoded.find(stop, max(0, known - len(stop) + 1)) for stop in stops]
        cut = min((position for position in found if position >= 0), default=None)
        if cut is not None:
            self.text = self._decoded[:cut]
        elif self.sequence.done:
            self.text = self._decoded
        else:
            self.text = self._decoded[: len(self._decoded) - _begun(self._decoded, stops)]
        return cut is not None

    def _decode(self, end: int | None = None) -> None:
        """Adds the text of the new tokens up to `end` to `_decoded`, except for a character with missing bytes."""
        new = self.sequence.token_ids[self._seen : end]
        self._seen += len(new)
        self._tokens += [token for token in new if token not in self.skip]
        before = decode_text(self.tokenizer, self._tokens[self._context : self._shown])
        text = decode_text(self.tokenizer, self._tokens[self._context :])
        complete = self.sequence.done and self._seen == len(self.sequence.token_ids)
        if len(text) > len(before) and (complete or not text.endswith(UNFINISHED)):
            self._decoded += text[len(before) :]
            self._context, self._shown = self._shown, len(self._tokens)


def _begun(text: str, stops: Iterable[str]) -> int:
    """Length of the longest end of the text with which a stop string begins."""
    lengths = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)
