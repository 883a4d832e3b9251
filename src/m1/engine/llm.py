"""Text in, text out, around the engine: chat templates, stop strings, streams, and whole files of prompts."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine.engine import Engine, stop_tokens
from m1.engine.sampling import SamplingParams
from m1.engine.sequence import Sequence, requests_for
from m1.errors import UserError
from m1.jsonl import append_jsonl, drop_torn_line, read_jsonl
from m1.model.checkpoint import load_model
from m1.model.tokenizer import encode_chat

Prompt = str | list[dict[str, str]]  # plain text as it is, or a chat's messages, which go through its template
UNFINISHED = "\ufffd"  # what a tokenizer makes of a character whose bytes are not all there


class LLM:
    """A model, its tokenizer, and an engine for them.

    Args:
        stop_token_ids: generation stops after any of these tokens; the model's and the tokenizer's eos when None.
        max_model_len: tokens of a prompt and its sequence together. None: as many as what is asked for needs; the
            engine is then made when first needed, and again when more is asked for.
        engine_options: `Engine`'s: max_num_seqs, prefix_cache, quantize, ...
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
        """The model and tokenizer of a checkpoint folder."""
        return cls(*load_model(folder), **options)

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's tokens. Raises UserError for messages without a chat template, or that break it."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        return encode_chat(self.tokenizer, prompt)

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def length_for(self, prompts: Iterable[list[int]], max_tokens: int) -> int:
        """Tokens of the longest prompt and its sequence, but no more than the model's context, past which `Engine`
        refuses."""
        return min(max(map(len, prompts), default=0) + max_tokens, self.model.config.max_position_embeddings)

    def engine_for(self, prompts: Iterable[list[int]], max_tokens: int) -> Engine:
        """An engine with room for any of these prompts and `max_tokens` more: the one there is, or a larger one."""
        length = self.length_for(prompts, max_tokens) if self.max_model_len is None else self.max_model_len
        if self.engine is None or self.engine.max_model_len < length:
            self.engine = None  # its memory is needed for the next one
            self.engine = Engine(self.model, self.stop_token_ids, max_model_len=length, **self.engine_options)
        return self.engine

    def generate(self, prompts: list[Prompt], params: SamplingParams) -> list["TextSequence"]:
        """`params.n` samples of each prompt, prompt by prompt. Raises UserError as `stream`."""
        samples = {(sample.prompt, sample.sequence.index): sample for sample in self.stream(prompts, params)}
        return [samples[i, j] for i in range(len(prompts)) for j in range(params.n)]

    def stream(self, prompts: list[Prompt], params: SamplingParams) -> Iterator["TextSequence"]:
        """Samples whose text has grown or ended, each as often as that happens. Seeds are those of `requests_for`.

        Raises:
            UserError: a prompt the engine refuses, or messages without a chat template.
        """
        yield from self.stream_tokens([self.encode(prompt) for prompt in prompts], params)

    def stream_tokens(self, prompts: list[list[int]], params: SamplingParams) -> Iterator["TextSequence"]:
        """`stream` of encoded prompts."""
        requests = requests_for(prompts, params)
        engine = self.engine_for(prompts, params.max_tokens)
        skip = frozenset([*self.stop_token_ids, *params.stop_token_ids])
        samples = [TextSequence(s, self.tokenizer, skip) for request in requests for s in request.sequences]
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
    """A sequence and its text so far, without the stop string that ended it."""

    sequence: Sequence
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    skip: frozenset[int] = field(repr=False)  # stop tokens, which are no text
    text: str = ""
    _tokens: list[int] = field(default_factory=list, repr=False)  # those that are text
    _seen: int = 0  # of the sequence's tokens
    _shown: int = 0  # of _tokens: they are in `text`
    _context: int = 0  # where decoding starts: tokenizers glue a token to those before it

    @property
    def prompt(self) -> int:
        """The number of its prompt. `sequence.index` is its number among the prompt's samples."""
        return self.sequence.request.id

    def read(self) -> bool:
        """Takes in the new tokens. True if a stop string ended the text."""
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


def generate_file(
    llm: LLM,
    prompts: Path,
    out: Path,
    params: SamplingParams,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, float]:
    """Samples every prompt of a JSONL file; a sample is a line of `out` as soon as it is finished.

    A row has `prompt` (plain text), `problem` (a user's message) or `messages`, and may have an `id`, else its number
    is one. Prompts whose samples are all in `out` are left alone; others are sampled whole.

    Returns:
        New tokens and seconds.

    Raises:
        UserError: a row without a prompt, or an id twice.
    """
    rows = list(read_jsonl(prompts))
    ids = [str(row.get("id", i)) for i, row in enumerate(rows)]
    if len(set(ids)) != len(ids):
        raise UserError(f"{prompts}: ids are not unique")
    texts = [_prompt_of(row, f"{prompts}, row {i + 1}") for i, row in enumerate(rows)]
    drop_torn_line(out)
    done = {(row.get("id"), row.get("sample")) for row in read_jsonl(out)} if out.exists() else set()
    missing = [i for i, name in enumerate(ids) if any((name, j) not in done for j in range(params.n))]
    total, finished, tokens = len(ids) * params.n, (len(ids) - len(missing)) * params.n, 0
    on_progress(finished, total)
    if not missing:
        return 0, 0.0
    encoded = [llm.encode(texts[i]) for i in missing]
    llm.engine_for(encoded, params.max_tokens)  # packing its weights isn't on the clock
    began = time.monotonic()
    for sample in llm.stream_tokens(encoded, params):
        sequence = sample.sequence
        if not sequence.done:
            continue
        finished, tokens = finished + 1, tokens + len(sequence.token_ids)
        name = ids[missing[sample.prompt]]
        if (name, sequence.index) not in done:
            row = {"id": name, "sample": sequence.index, "text": sample.text, "finish_reason": sequence.finish_reason}
            append_jsonl(out, [row | {"tokens": len(sequence.token_ids), "logprob": sum(sequence.logprobs)}])
        on_progress(finished, total)
    return tokens, time.monotonic() - began


def _prompt_of(row: dict[str, Any], where: str) -> Prompt:
    match row:
        case {"messages": list(messages)}:
            return messages
        case {"problem": str(problem)}:
            return [{"role": "user", "content": problem}]
        case {"prompt": str(prompt)}:
            return prompt
    raise UserError(f"{where}: needs `prompt` or `problem` (text) or `messages` (a list); has {sorted(row)}")
