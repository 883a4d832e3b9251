"""Text in, text out: chat templates, stop strings, and streams on top of the engine."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine.engine import Engine, stop_tokens
from m1.engine.sampling import SamplingParams
from m1.engine.sequence import Request, Sequence, requests_for
from m1.model.checkpoint import load_model
from m1.model.tokenizer import encode_chat

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
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "LLM":
        """Loads the model and the tokenizer of a checkpoint folder. `options` are those of `LLM`."""
        return cls(*load_model(folder), **options)

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids. Raises UserError if messages have no chat template or the template fails on them."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        return encode_chat(self.tokenizer, prompt)

    def decode(self, token_ids: list[int]) -> str:
        """The text of the tokens, without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

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

    def generate(self, prompts: list[Prompt], params: SamplingParams) -> list["TextSequence"]:
        """Returns `params.n` samples of each prompt, in the order of the prompts. Raises UserError as `stream`."""
        samples = {(sample.prompt, sample.sequence.index): sample for sample in self.stream(prompts, params)}
        return [samples[i, j] for i in range(len(prompts)) for j in range(params.n)]

    def stream(self, prompts: list[Prompt], params: SamplingParams) -> Iterator["TextSequence"]:
        """Yields a sample whenever its text has grown or ended. Seeds are those of `requests_for`.

        Raises:
            UserError: a prompt the engine refuses, or messages without a chat template.
        """
        yield from self.stream_requests(requests_for([self.encode(prompt) for prompt in prompts], params))

    def stream_requests(self, requests: list[Request]) -> Iterator["TextSequence"]:
        """`stream` for requests, each with its own parameters."""
        longest = max((request.params.max_tokens for request in requests), default=0)
        engine = self.engine_for([request.tokens for request in requests], longest)
        samples = [
            TextSequence(sequence, self.tokenizer, frozenset([*self.stop_token_ids, *request.params.stop_token_ids]))
            for request in requests
            for sequence in request.sequences
        ]
        with closing(engine.run(requests)) as steps:
            for _ in steps:
                for sample in samples:
                    length = len(sample.text)
                    if sample.read() and not sample.sequence.done:
                        engine.finish(sample.sequence, "stop")
                    if sample.sequence.done or len(sample.text) != length:
                        yield sample
                samples = [sample for sample in samples if not sample.sequence.done]


@dataclass
class TextSequence:
    """A sample as text: a `Sequence` and its text so far, without the stop string that ended it.

    Attributes:
        sequence: its tokens, log-probabilities and reason to end.
        tokenizer: decodes the tokens.
        skip: stop tokens, which are left out of the text.
        text: the text so far. It grows with `read`, by whole characters.
    """

    sequence: Sequence
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    skip: frozenset[int] = field(repr=False)
    text: str = ""
    _tokens: list[int] = field(default_factory=list, repr=False)  # the sequence's tokens without `skip`
    _seen: int = 0  # number of the sequence's tokens read
    _shown: int = 0  # number of _tokens whose text is in `text`
    _context: int = 0  # where decoding starts in _tokens: a token's text can depend on those before it

    @property
    def prompt(self) -> int:
        """Number of its prompt in the list. `sequence.index` is its number among the prompt's samples."""
        return self.sequence.request.id

    def read(self) -> bool:
        """Adds the text of the sequence's new tokens. Returns True if a stop string has ended the text."""
        new = self.sequence.token_ids[self._seen :]
        self._seen += len(new)
        self._tokens += [token for token in new if token not in self.skip]
        before = self.tokenizer.decode(self._tokens[self._context : self._shown])
        text = self.tokenizer.decode(self._tokens[self._context :])
        if len(text) <= len(before) or (text.endswith(UNFINISHED) and not self.sequence.done):
            return False
        known = len(self.text)
        self.text += text[len(before) :]
        self._context, self._shown = self._shown, len(self._tokens)
        stops = self.sequence.request.params.stop
        found = [self.text.find(stop, max(0, known - len(stop) + 1)) for stop in stops]
        cut = min((position for position in found if position >= 0), default=None)
        self.text = self.text[:cut]
        return cut is not None
