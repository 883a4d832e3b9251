"""Chat messages to tokens and back to text, and a byte-level tokenizer that takes any text and needs no training."""

import signal
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from jinja2 import Environment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from m1.errors import UserError
from m1.options import MAX_SHOWN, shown

TEMPLATE_SECONDS = 10.0  # maximum time of a chat template; the slowest take milliseconds
SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(model_max_length: int = 4096) -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and five special tokens (261 ids). It saves and loads like any fast tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: str | list[dict[str, str]], add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of chat messages: those of `render_chat`'s text, without special tokens added. Arguments as there."""
    text = render_chat(tokenizer, messages, add_generation_prompt)
    return tokenizer(text, add_special_tokens=False).input_ids


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: str | list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """The text of chat messages, through the tokenizer's chat template.

    Args:
        messages: a list of {"role", "content"}; a string is a single user message.
        add_generation_prompt: whether to end with the beginning of the assistant's next message.

    Raises:
        UserError: the tokenizer has no chat template, or the template fails on these messages or takes too long.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: add chat_template.jinja to its folder, "
            "e.g. the instruct model's"
        )
    try:
        _refuse_powers(str(tokenizer.chat_template))
        with time_limit(TEMPLATE_SECONDS):
            return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a template is a program
        what = " ".join(str(error).split())[:MAX_SHOWN] or type(error).__name__
        raise UserError(f"the chat template of {tokenizer.name_or_path} fails on {shown(messages)}: {what}") from None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside the context after some seconds. Only the main thread can be interrupted.

    Contexts can be nested; an outer one's clock goes on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} seconds")

    before, started = signal.signal(signal.SIGALRM, stop), time.monotonic()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - started), 1e-3))


@lru_cache(maxsize=64)
def _refuse_powers(template: str) -> None:
    """Raises ValueError for a template with `**`: one power can take hours in which nothing interrupts it."""
    if any(kind == "operator" and text == "**" for _, kind, text in Environment().lex(template)):
        raise ValueError("it computes a power, which M1 doesn't allow")


def decode_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int], stop_token_ids: Collection[int] = ()
) -> str:
    """The text of generated tokens, without special tokens and without those that end a sequence."""
    kept = [token for token in token_ids if token not in stop_token_ids]
    return tokenizer.decode(kept, skip_special_tokens=True)
