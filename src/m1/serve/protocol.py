"""OpenAI's API as data: the requests that are understood, and the answers. Names and defaults are vLLM's."""

import itertools
import json
import secrets
import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from m1.engine import LLM, SamplingParams
from m1.engine.llm import TextSequence
from m1.engine.sequence import Request, Sequence
from m1.errors import UserError
from m1.grading.spelling import normalize
from m1.reasoning.solution import Solution
from m1.serve.thoughts import Thoughts
from m1.text import encodable

MOST_TOP_LOGPROBS = 20
MOST_STOPS = 16
LEAST_LOGPROB = -9999.0  # for -inf, which JSON doesn't have; vLLM's number
# Fields that would change the answer, and that this server can't honour, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "prompt_logprobs": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "documents": (None, []),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "thinking_token_budget": (None,),
}


def whole_text(text: Any) -> Any:
    """Refuses half a character, which JSON can hold and no tokenizer takes."""
    if isinstance(text, str) and not encodable(text):
        raise ValueError("the text has half of a character (a lone surrogate)")
    return text


Text = Annotated[str, BeforeValidator(whole_text)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    include_usage: bool = False


class VoteOptions(BaseModel):
    """A vote instead of one sample: how many samples, how many seconds, when to stop, and how votes are weighed."""

    model_config = ConfigDict(extra="forbid")

    n: int | None = Field(None, ge=1)
    seconds: Finite | None = Field(None, gt=0)
    rule: Literal["none", "decided", "confident"] = "decided"
    weights: Literal["uniform", "logprob"] = "uniform"
    show_samples: bool = False  # a stream then also has the samples' texts, as they grow


class SamplingFields(BaseModel):
    """The fields that chat and plain completions share. Unknown fields are ignored, as in vLLM."""

    model_config = ConfigDict(extra="allow")
    usual_tokens: ClassVar[int | None] = None  # the default of max_tokens where the context has room for more

    model: Text | None = None
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: Finite = Field(1.0, ge=0)
    top_p: Finite = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: Finite = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    presence_penalty: Finite = Field(0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(0.0, ge=-2, le=2)
    repetition_penalty: Finite = Field(1.0, ge=0.01, le=100)
    logit_bias: dict[int, Finite] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, fields: Any) -> Any:
        """A null asks for the default."""
        if isinstance(fields, dict):
            return {name: value for name, value in fields.items() if value is not None}
        return fields

    @model_validator(mode="after")
    def _supported(self) -> "SamplingFields":
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
                text = "{field} is not supported by this server: leave it out"
                raise PydanticCustomError("unsupported", text, {"field": name})
        if len(self.stops) > MOST_STOPS:
            raise ValueError(f"stop has {len(self.stops)} strings: at most {MOST_STOPS}")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def likeliest(self) -> int:
        """Number of likeliest tokens to return at each position."""
        return 0

    def params(self, prompt: int, context: int) -> SamplingParams:
        """The engine's parameters. Raises UserError for a value out of range, or for tokens beyond the context.

        Args:
            prompt: number of tokens of the longest prompt.
            context: maximum number of tokens of a prompt and its sample. What a prompt leaves is the default of
                max_tokens.
        """
        room = context - prompt
        if room < 1:
            raise UserError(
                f"the prompt has {prompt} tokens, which leaves no room in the context of {context}: shorten it"
            )
        asked = min(room, self.usual_tokens or room) if self.max_tokens is None else self.max_tokens
        if asked > room:
            raise UserError(
                f"max_tokens={asked}: the prompt of {prompt} tokens leaves {room} in the context of {context}"
            )
        return SamplingParams(
            n=self.n,
            max_tokens=asked,
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            seed=secrets.randbits(62) if self.seed is None else self.seed,
            stop=tuple(self.stops),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            logprobs=self.likeliest,
        )


class ContentPart(BaseModel):
    """A part of a message's content. Only text is understood."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A chat message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart] | None = ""

    def plain(self) -> dict[str, str]:
        """The message as chat templates read it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP_LOGPROBS)
    vote: VoteOptions | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.vote and (self.n > 1 or self.logprobs or self.stop):
            raise ValueError("vote goes without n (vote.n is its number of samples), logprobs and stop")
        return self

    @property
    def likeliest(self) -> int:
        """Number of likeliest tokens to return at each position."""
        return self.top_logprobs

    def plain_messages(self) -> list[dict[str, str]]:
        """The conversation as chat templates read it."""
        return [message.plain() for message in self.messages]


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    usual_tokens: ClassVar[int | None] = 16
    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool = False  # the prompt is a part of the text, and its tokens have log-probabilities if asked for

    @property
    def likeliest(self) -> int:
        """Number of likeliest tokens to return at each position."""
        return self.logprobs or 0

    def prompts(self, llm: LLM) -> list[list[int]]:
        """The token ids of each prompt. Raises UserError if there is none."""
        if not self._given:
            raise UserError("prompt is an empty list: give at least one")
        return [llm.encode(prompt) if isinstance(prompt, str) else prompt for prompt in self._given]

    def echoes(self, llm: LLM) -> list[str]:
        """What the text of each sample begins with: its prompt, or nothing."""
        texts = [
            (prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)) if self.echo else ""
            for prompt in self._given
        ]
        return [text for text in texts for _ in range(self.n)]

    @property
    def _given(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if one else list(self.prompt)  # type: ignore[list-item, arg-type]


class TokenizeRequest(BaseModel):
    """The body of /tokenize: a prompt or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True  # to a prompt; a conversation has those of its template
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def encoded(self, llm: LLM) -> list[int]:
        """The token ids."""
        if self.messages is not None:
            return llm.encode([message.plain() for message in self.messages])
        return llm.tokenizer(self.prompt, add_special_tokens=self.add_special_tokens).input_ids


class DetokenizeRequest(BaseModel):
    """The body of /detokenize."""

    model: Text | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


# Answers


class Envelope:
    """What all parts of one answer share: its id, its time and its model's name."""

    def __init__(self, kind: Literal["chatcmpl", "cmpl"], model: str):
        self.id, self.created, self.model = f"{kind}-{secrets.token_hex(12)}", int(time.time()), model

    def __call__(self, object_: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An answer, or a chunk of one."""
        own = {"id": self.id, "object": object_, "created": self.created, "model": self.model, "choices": choices}
        return own | more


def finish_reason(sequence: Sequence) -> str:
    """OpenAI's word for why a sample ended: the engine's, but "error" for NaN in the model's logits."""
    return "error" if sequence.finish_reason == "nan" else sequence.finish_reason


def usage(llm: LLM, requests: list[Request], thoughts: list[str] | None = None) -> dict[str, Any]:
    """The tokens of the prompts, each counted once, and of their samples."""
    prompt = sum(len(request.tokens) for request in requests)
    drawn = sum(len(sequence.token_ids) for request in requests for sequence in request.sequences)
    return usage_of(llm, prompt, drawn, sum(request.cached for request in requests), thoughts)


def usage_of(llm: LLM, prompt: int, drawn: int, cached: int, thoughts: list[str] | None) -> dict[str, Any]:
    """OpenAI's usage object. `thoughts` are texts, whose tokens are counted."""
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
    counts["prompt_tokens_details"] = {"cached_tokens": cached}
    if thoughts is not None:
        length = sum(len(llm.tokenizer(text, add_special_tokens=False).input_ids) for text in thoughts if text)
        counts["completion_tokens_details"] = {"reasoning_tokens": min(length, drawn)}
    return counts


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(logprob, LEAST_LOGPROB)


def chat_logprobs(llm: LLM, sequence: Sequence, begin: int, end: int) -> dict[str, Any]:
    """Log-probabilities of a chat completion's tokens from `begin` to `end`."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = llm.tokenizer.decode([token])
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}

    content = []
    for i in range(begin, end):
        top = sequence.top_logprobs[i] if sequence.top_logprobs else []
        drawn = entry(sequence.token_ids[i], sequence.logprobs[i])
        content.append(drawn | {"top_logprobs": [entry(token, logprob) for token, logprob in top]})
    return {"content": content, "refusal": None}


def completion_logprobs(llm: LLM, sequence: Sequence, begin: int, end: int, offset: int, echo: bool) -> dict[str, Any]:
    """Log-probabilities of a plain completion's tokens from `begin` to `end`.

    With `echo`, the prompt's tokens come before them, the first without a log-probability. `offset`: of the first
    token's text.
    """
    tokens, logprobs = sequence.token_ids[begin:end], sequence.logprobs[begin:end]
    likeliest = sequence.top_logprobs[begin:end] or [[] for _ in tokens]
    if echo:
        request = sequence.request
        tokens = request.tokens + tokens
        logprobs = request.logprobs + logprobs
        likeliest = (request.top_logprobs or [[] for _ in request.logprobs]) + likeliest
    texts = [llm.tokenizer.decode([token]) for token in tokens]
    offsets = list(itertools.accumulate(map(len, texts), initial=offset))[:-1]
    top = []
    for text, logprob, pairs in zip(texts[echo:], logprobs, likeliest, strict=True):
        row: dict[str, float] = {}
        for other, value in [*((llm.tokenizer.decode([token]), value) for token, value in pairs), (text, logprob)]:
            row.setdefault(other, finite(value))  # of tokens with the same text, the likeliest one
        top.append(row)
    first: list[None] = [None] * echo
    chosen = [*first, *map(finite, logprobs)]
    return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": [*first, *top], "text_offset": offsets}


def message(thought: str, reply: str) -> dict[str, Any]:
    """The assistant's message, or what a chunk adds to it. A thought has both names that clients know."""
    own: dict[str, Any] = {"content": reply}
    return own | ({"reasoning": thought, "reasoning_content": thought} if thought else {})


def chat_choice(llm: LLM, index: int, sample: TextSequence, opened: bool, logprobs: bool) -> tuple[dict[str, Any], str]:
    """A finished sample as a choice of a chat completion, and its thought."""
    thought, reply = Thoughts(opened).split(sample.text, done=True)
    sequence = sample.sequence
    made = {"role": "assistant", **message(thought, reply), "refusal": None}
    choice = {"index": index, "message": made, "finish_reason": finish_reason(sequence)}
    choice["logprobs"] = chat_logprobs(llm, sequence, 0, len(sequence.token_ids)) if logprobs else None
    return choice, thought


def vote_of(solution: Solution) -> dict[str, Any]:
    """The vote so far: as `m1 solve --json`, without the samples, and with the leader's confidence."""
    known = solution.as_json()
    return {name: known[name] for name in known if name != "samples"} | {"confidence": solution.vote.confidence()}


def voted(llm: LLM, solution: Solution, prompt: int, envelope: Envelope) -> dict[str, Any]:
    """A vote as a chat completion. Its text is that of the first sample with the winning answer.

    If no sample has an answer, it is the first sample's; if none has finished, it is empty.
    """
    winners = (s for s in solution.samples if s.answer is not None and normalize(s.answer) == solution.answer)
    winner = next(winners, next(iter(solution.samples), None))
    text, reason = (winner.text, winner.finish_reason) if winner else ("", "length")
    thought, reply = Thoughts(False).split(text, done=True)  # a sample's text has the <think> that its prompt opened
    made = {"role": "assistant", **message(thought, reply), "refusal": None}
    choice = {"index": 0, "message": made, "finish_reason": reason, "logprobs": None}
    counts = usage_of(llm, prompt, solution.tokens, 0, [thought])
    return envelope("chat.completion", [choice], usage=counts, vote=vote_of(solution))


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"
