"""A conversation of several turns, whose answers are streamed."""

from collections.abc import Generator
from dataclasses import replace

from m1.engine.engine import DEFAULT_MAX_MODEL_LEN
from m1.engine.llm import LLM
from m1.engine.sampling import SamplingParams
from m1.engine.sequence import requests_for
from m1.ops.random_bits import fold_in


class Chat:
    """A conversation with a model. Each turn's question and answer become part of the next turn's prompt.

    Args:
        llm: the model, whose tokenizer has a chat template.
        params: how answers are sampled. Each turn's seed is derived from this one.
        system: the system message; None for the chat template's own, if it has one.

    Raises:
        UserError: the tokenizer has no chat template, or it fails on the system message.

    Attributes:
        messages: the conversation so far, {"role", "content"} each.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None):
        self.llm, self.params = llm, params
        self.start = [] if system is None else [{"role": "system", "content": system}]
        self.messages = self.start
        llm.encode([*self.start, {"role": "user", "content": ""}])
        llm.engine_for([[]], DEFAULT_MAX_MODEL_LEN)  # one engine for many turns

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yields the answer piece by piece.

        If the iterator is closed early, the conversation keeps what was yielded. A question without any answer is
        forgotten.

        Raises:
            UserError: the conversation is too long for the model, or the chat template fails on it.
        """
        messages, answer = [*self.messages, {"role": "user", "content": text}], ""
        params = replace(self.params, seed=fold_in(self.params.seed, len(messages)))
        (request,) = requests_for([self.llm.encode(messages)], params)
        request.resumable = True  # this turn continues the last one's state, and the next one this turn's
        length = len(request.tokens) + params.max_tokens
        if self.llm.engine and length > self.llm.engine.max_model_len:
            self.llm.engine_for([[]], 2 * length)  # a longer engine, for many turns again
        try:
            for sample in self.llm.stream_requests([request]):
                piece, answer = sample.text[len(answer) :], sample.text
                yield piece
        finally:
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]

    def restart(self) -> None:
        """Forgets the conversation, except for the system message."""
        self.messages = self.start
