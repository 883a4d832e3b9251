"""Chat messages to tokens and back to text, and a byte-level tokenizer that takes any text and needs no training."""

from collections.abc import Collection, Iterable

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from m1.errors import UserError

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
        UserError: the tokenizer has no chat template, or the template fails on these messages.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: add chat_template.jinja to its folder, "
            "e.g. the instruct model's"
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except TemplateError as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path} fails on {messages}: {error}") from None


def decode_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int], stop_token_ids: Collection[int] = ()
) -> str:
    """The text of generated tokens, without special tokens and without those that end a sequence."""
    kept = [token for token in token_ids if token not in stop_token_ids]
    return tokenizer.decode(kept, skip_special_tokens=True)
