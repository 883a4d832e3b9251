"""The text of a conversation and the tokens of it to train, for any chat template.

A turn's trained text is a prefix difference: the conversation up to the turn's end token, minus the turn's prompt. The
prompt is the messages before the turn, with the generation prompt. Both must be prefixes of the whole text. Otherwise
the turn isn't trained: Qwen3's template drops the thoughts of earlier turns, for example. The last turn must be.

Templates of R1-distilled models drop the thoughts of all turns, and may open one in the generation prompt. There, the
last turn is the generation prompt, continued by the answer. The answer must begin with what the prompt opens.
"""

from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

from m1.errors import UserError
from m1.model.tokenizer import render_chat
from m1.tasks.prompts import Messages

IGNORED = -100  # the label of a token that isn't trained
PROBE = "PROBE"
Span = tuple[int, int]  # the first character, and the one after the last


class Conversation(NamedTuple):
    """The messages of a row.

    Attributes:
        where: the row's source and number, for error messages.
        messages: {"role", "content"} each.
        first: the first message that may be trained.
    """

    where: str
    messages: Messages
    first: int = 0


@dataclass(frozen=True)
class Example:
    """A tokenized conversation.

    Attributes:
        input_ids: int32 [tokens].
        labels: int32 [tokens], the same ids, IGNORED where a token isn't trained.
    """

    input_ids: np.ndarray
    labels: np.ndarray


class ChatEncoder:
    """Tokenizes conversations and marks the tokens to train.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        assistant_only: whether to train assistant turns, with their end token, or all tokens.

    Attributes:
        end: what ends an assistant turn, and is trained.
        tail: this, and what the template puts after it at the end of a conversation.
        untrained: number of characters of the latter.

    Raises:
        UserError: a slow tokenizer, no chat template, or one that leaves out an assistant's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool = True):
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} isn't a fast one: give it a tokenizer.json")
        self.tokenizer, self.assistant_only = tokenizer, assistant_only
        _, found, self.tail = self._probe([{"role": "user", "content": "question"}])
        if not found:
            raise UserError(f"the chat template of {tokenizer.name_or_path} leaves out what the assistant says")
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        ends = [self.tail.index(token) + len(token) for token in special if token in self.tail]
        end = min(ends, default=len(self.tail.rstrip()))
        self.end, self.untrained = self.tail[:end], len(self.tail) - end

    def encode(self, conversations: list[Conversation]) -> list[Example]:
        """Tokenizes conversations. Raises UserError as `render`."""
        rendered = []
        for where, messages, first in conversations:
            try:
                rendered.append(self.render(messages, first))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        encoded = self._tokenize([text for text, _ in rendered])
        return [self._example(encoded, i, text, spans) for i, (text, spans) in enumerate(rendered)]

    def render(self, messages: Messages, first: int = 0) -> tuple[str, list[Span]]:
        """The text of a conversation up to its last assistant turn, and the spans of characters to train.

        Args:
            messages: the conversation.
            first: the first message that may be trained.

        Raises:
            UserError: no assistant turn that answers something, a template that fails on the messages, or an inference
                prompt that the training text doesn't begin with.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= max(first, 1)]
        if not turns:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"no assistant turn to train on (roles: {roles}); remove the row or add one")
        last = turns[-1]
        text, prompt, answer = (
            self._text(messages[: last + 1]),
            self._prompt(messages[:last]),
            messages[last]["content"],
        )
        if not text.startswith(prompt) or not _holds(text[len(prompt) :], answer):
            text = self._continued(prompt, messages[:last], answer)
        spans = [(len(prompt), len(text) - self.untrained if text.endswith(self.tail) else len(text))]
        for i in turns[:-1]:
            prompt, turn = self._prompt(messages[:i]), self._text(messages[: i + 1])
            stop = len(turn) - self.untrained
            same = text.startswith(prompt) and turn.endswith(self.tail) and text.startswith(turn[:stop])
            if same and _holds(text[len(prompt) : stop], messages[i]["content"]):
                spans.append((len(prompt), stop))
        return text, spans

    def _continued(self, prompt: str, before: Messages, answer: str) -> str:
        """The prompt and the answer, of which the prompt may open the first tag already."""
        head, _, tail = self._probe(before)
        opened = prompt.removeprefix(head).strip()
        if not prompt.startswith(head) or not answer.lstrip().startswith(opened):
            raise UserError(
                f"the inference prompt ends with {prompt[-30:]!r} and the training text doesn't go on from "
                f"there: begin the answer with {opened[-30:]!r}, or give another `chat_template`"
            )
        return prompt + (answer.lstrip().removeprefix(opened).lstrip("\n") if opened else answer) + tail

    def _probe(self, before: Messages) -> tuple[str, str, str]:
        """What the template puts before and after an assistant turn."""
        return self._text([*before, {"role": "assistant", "content": PROBE}]).rpartition(PROBE)

    def _example(self, encoded: BatchEncoding, i: int, text: str, spans: list[Span]) -> Example:
        """Labels text i. Its pieces are tokenized anew if a prompt's last token has merged with the answer's first."""
        merged = [start for start, _ in spans if _token_at(encoded, i, start, text)[1] < start]
        if merged:
            bounds = list(pairwise([0, *sorted(merged), len(text)]))
            pieces = self._tokenize([text[start:stop] for start, stop in bounds])
            parts = [self._labelled(pieces, k, text[a:b], _within(spans, a, b)) for k, (a, b) in enumerate(bounds)]
            return Example(*(np.concatenate(arrays) for arrays in zip(*map(astuple, parts), strict=True)))
        return self._labelled(encoded, i, text, spans)

    def _labelled(self, encoded: BatchEncoding, i: int, text: str, spans: list[Span]) -> Example:
        ids = np.array(encoded["input_ids"][i], dtype=np.int32)
        if not self.assistant_only:
            return Example(ids, ids)
        labels = np.full_like(ids, IGNORED)
        for start, stop in spans:
            after, begins = _token_at(encoded, i, stop, text)
            trained = slice(_token_at(encoded, i, start, text)[0], after + (begins < stop))
            labels[trained] = ids[trained]
        return Example(ids, labels)

    def _tokenize(self, texts: list[str]) -> BatchEncoding:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)

    def _text(self, messages: Messages) -> str:
        return render_chat(self.tokenizer, messages, add_generation_prompt=False)

    def _prompt(self, messages: Messages) -> str:
        return render_chat(self.tokenizer, messages)


def _holds(text: str, answer: str) -> bool:
    """Whether a rendered turn has all of the answer, whatever the template does to white space."""
    return answer.strip() in text or "".join(answer.split()) in "".join(text.split())


def _token_at(encoded: BatchEncoding, i: int, position: int, text: str) -> tuple[int, int]:
    """The token with this character of text i, or with the next one that has a token, and where that token begins."""
    for character in range(position, len(text)):
        token = encoded.char_to_token(i, character)
        if token is not None:
            return token, encoded.token_to_chars(i, token).start
    return len(encoded["input_ids"][i]), len(text)


def _within(spans: list[Span], start: int, stop: int) -> list[Span]:
    """The spans in a piece of the text, counted from its beginning."""
    return [(max(a, start) - start, min(b, stop) - start) for a, b in spans if a < stop and b > start]
