"""Text in, text out, around the engine: chat templates, stop strings, streams, and whole files of prompts."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m1.engine.engine import Engine, max_len_for, stop_tokens
from m1.engine.sampling import SamplingParams, stream_of
from m1.engine.sequence import Completion
from m1.errors import UserError
from m1.jsonl import append_jsonl, drop_torn_line, read_jsonl
from m1.model.checkpoint import load_model
from m1.model.tokenizer import conversation_tokens

Prompt = str | list[dict[str, str]]  # plain text as it is, or a chat's messages, which go through its template
UNFINISHED = "�"  # what a tokenizer makes of a character whose bytes are not all there


@dataclass
class TextCompletion:
    """A sample's text, without the stop string that ended it, as far as it is known; and what is behind it."""

    completion: Completion
    sample: int
    text: str = ""

    @property
    def prompt(self) -> int:
        return self.completion.prompt

    @property
    def done(self) -> bool:
        return self.completion.done


@dataclass
class _Reader:
    """Turns a growing list of tokens into growing text, a few tokens at a time."""

    output: TextCompletion
    tokenizer: PreTrainedTokenizerBase
    stop: Sequence[str]
    skip: frozenset[int]  # stop tokens, which are no text
    seen: int = 0  # of the completion's tokens
    tokens: list[int] = field(default_factory=list)  # those of them that are text
    shown: int = 0  # tokens whose text is in output
    context: int = 0  # where decoding starts: tokenizers glue a token to those before it

    def read(self) -> bool:
        """Takes in the new tokens. True if a stop string ended the text."""
        new = self.output.completion.token_ids[self.seen :]
        self.seen += len(new)
        self.tokens += [token for token in new if token not in self.skip]
        before = self.tokenizer.decode(self.tokens[self.context : self.shown])
        text = self.tokenizer.decode(self.tokens[self.context :])
        if len(text) <= len(before) or (text.endswith(UNFINISHED) and not self.output.done):
            return False
        known = len(self.output.text)
        self.output.text += text[len(before) :]
        self.context, self.shown = self.shown, len(self.tokens)
        return self._cut(known)

    def _cut(self, known: int) -> bool:
        found = [self.output.text.find(stop, max(0, known - len(stop) + 1)) for stop in self.stop]
        if not any(position >= 0 for position in found):
            return False
        self.output.text = self.output.text[: min(position for position in found if position >= 0)]
        return True


@dataclass
class LLM:
    """A model and its tokenizer behind an engine.

    Args:
        engine_options: `Engine`'s: max_batch, max_len, ...
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stop_token_ids = stop_tokens(self.model, self.tokenizer)
        self.engine = Engine(self.model, self.stop_token_ids, **self.engine_options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **engine_options: Any) -> "LLM":
        """The model and tokenizer of a checkpoint folder."""
        return cls(*load_model(folder), engine_options)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int = 1, stop: Sequence[str] = ()
    ) -> list[TextCompletion]:
        """n samples a prompt; completion i belongs to prompt i // n. Arguments as `stream`."""
        samples = {(sample.prompt, sample.sample): sample for sample in self.stream(prompts, params, n, stop)}
        return [samples[i, j] for i in range(len(prompts)) for j in range(n)]

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams, n: int = 1, stop: Sequence[str] = ()
    ) -> Iterator[TextCompletion]:
        """Samples whose text has grown or ended, each as often as that happens.

        Args:
            stop: strings that end a sample, which keeps what is in front of them. They may begin inside a token.

        Raises:
            UserError: a prompt the engine refuses, no chat template for messages, or an empty stop string.
        """
        yield from self._stream([encode(self.tokenizer, prompt) for prompt in prompts], params, n, stop)

    def _stream(
        self, prompts: Sequence[list[int]], params: SamplingParams, n: int, stop: Sequence[str]
    ) -> Iterator[TextCompletion]:
        """`stream` of encoded prompts."""
        if not all(stop):
            raise UserError("stop: an empty string would end every sample at once")
        requests, readers = [], []
        try:
            for i, prompt in enumerate(prompts):
                seeded = replace(params, seed=stream_of(params.seed, i))
                requests.append(self.engine.submit(prompt, seeded, n, prompt=i))
                outputs = [TextCompletion(c, j) for j, c in enumerate(requests[-1].completions)]
                skip = frozenset([*self.stop_token_ids, *params.stop_token_ids])
                readers += [_Reader(output, self.tokenizer, stop, skip) for output in outputs]
            while readers:
                self.engine.step()
                for reader in readers:
                    length = len(reader.output.text)
                    if reader.read() and not reader.output.done:
                        self.engine.finish(reader.output.completion, "stop")
                    if reader.output.done or len(reader.output.text) != length:
                        yield reader.output
                readers = [reader for reader in readers if not reader.output.done]
        finally:
            for request in requests:
                if not request.done:
                    self.engine.abort(request)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """A prompt's tokens. Raises UserError for messages without a chat template, or that break it."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    return conversation_tokens(tokenizer, prompt, add_generation_prompt=True)


def generate_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Path,
    out: Path,
    params: SamplingParams,
    n: int = 1,
    stop: Sequence[str] = (),
    max_batch: int = 256,
    quantize: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, float]:
    """Samples every prompt of a JSONL file; a sample is a line of `out` as soon as it is finished.

    A row has `prompt` (plain text), `problem` (a user's message) or `messages`, and may have an `id`, else its number
    is one. Prompts whose n samples are all in `out` are left alone; others are sampled whole.

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
    missing = [i for i, name in enumerate(ids) if any((name, j) not in done for j in range(n))]
    on_progress((len(ids) - len(missing)) * n, len(ids) * n)
    if not missing:
        return 0, 0.0
    encoded = [encode(tokenizer, texts[i]) for i in missing]
    max_len = max_len_for(model, encoded, params.max_tokens)
    options = {"max_batch": min(max_batch, len(missing) * n), "max_len": max_len, "quantize": quantize}
    llm = LLM(model, tokenizer, options)
    began, finished, tokens = time.monotonic(), (len(ids) - len(missing)) * n, 0
    for sample in llm._stream(encoded, params, n, stop):
        if not sample.done:
            continue
        completion = sample.completion
        finished, tokens = finished + 1, tokens + len(completion.token_ids)
        name = ids[missing[sample.prompt]]
        if (name, sample.sample) not in done:
            row = {"id": name, "sample": sample.sample, "text": sample.text, "finish_reason": completion.finish_reason}
            append_jsonl(out, [row | {"tokens": len(completion.token_ids), "logprob": sum(completion.logprobs)}])
        on_progress(finished, len(ids) * n)
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
