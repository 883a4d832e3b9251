"""The trained tokens of conversations under published chat templates, against marks made by hand."""

# ruff: noqa: RUF001  DeepSeek's tokens have wide bars

from pathlib import Path

import pytest
import trl

from m1.errors import UserError
from m1.model.tokenizer import byte_tokenizer
from m1.train.data_mask import IGNORED, ChatEncoder, Conversation
from m1.train.data_report import marked

LOOP = "{% for message in messages %}"
TURNS = (
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = LOOP + TURNS
SMOLLM2 = (
    LOOP + "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}" + TURNS
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
OWN = {"chatml": CHATML, "smollm2": SMOLLM2, "mistral": MISTRAL}
LLAMA3 = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
IM = "<|im_start|>", "<|im_end|>"
R1 = "<｜User｜>", "<｜Assistant｜>"
SYSTEM_2024 = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def tokenizer_of(name, bos="<s>", eos="</s>", special=()):
    """The byte tokenizer with a template, and with its special tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos, "additional_special_tokens": list(special)})
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = OWN.get(name) or (templates / f"{name}.jinja").read_text()
    if name == "llama3_2":  # the date of the day
        tokenizer.chat_template = tokenizer.chat_template.replace('strftime_now("%d %b %Y")', '"26 Jul 2024"')
    return tokenizer


def chat(*turns, system=None):
    """Messages of the user and of the assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def marks(tokenizer, messages):
    example = ChatEncoder(tokenizer).encode([Conversation("row 1", messages)])[0]
    return marked(tokenizer, vars(example))


def llama3(before_user):
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    return (
        f"<|begin_of_text|>{before_user}{header('user')}2+2?<|eot_id|>{header('assistant')}⟦4<|eot_id|>⟧"
        f"{header('user')}3+3?<|eot_id|>{header('assistant')}⟦6 🙂<|eot_id|>⟧"
    )


def llama31(system):
    return llama3(f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM_2024}{system}<|eot_id|>")


TWO = chat("2+2?", "4", "3+3?", "6 🙂")
BY_HAND = {
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", llama3("")),
    "llama3_1": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", llama31("")),
    "llama3_2": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", llama31("")),
    "qwen2_5": (
        IM, "<s>", "<|im_end|>",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n⟦6 🙂<|im_end|>⟧\n",
    ),
    "qwen3": (
        IM, "<s>", "<|im_end|>",
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n6 🙂<|im_end|>⟧\n",
    ),
    "smollm2": (
        IM, "<|im_start|>", "<|im_end|>",
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n⟦6 🙂<|im_end|>⟧\n",
    ),
    "chatml": (
        IM, "<s>", "</s>",
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n⟦6 🙂<|im_end|>⟧\n",
    ),
    "mistral": ((), "<s>", "</s>", "<s>[INST] 2+2? [/INST]⟦ 4</s>⟧[INST] 3+3? [/INST]⟦ 6 🙂</s>⟧"),
    "phi3": (
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<s>", "<|endoftext|>",
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦4<|end|>⟧\n"
        "<|user|>\n3+3?<|end|>\n<|assistant|>\n⟦6 🙂<|end|>⟧\n<|endoftext|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_every_answer_and_its_end_token_are_trained(name):
    special, bos, eos, expected = BY_HAND[name]
    assert marks(tokenizer_of(name, bos, eos, special), TWO) == expected


def test_end_tokens_that_are_plain_text():
    """A template for another tokenizer: its end token is spelt out, and trained."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    expected = "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n⟦1<|im_end|>⟧\n"
    assert marks(tokenizer, chat("1?", "1")) == expected


def test_system_prompt_and_a_last_question():
    """What follows the last answer is left out: nothing in it is trained."""
    messages = chat("2+2?", " 4 ", "3+3?", system="Add.")
    expected = llama31("Add.").partition("⟧")[0] + "⟧"
    assert marks(tokenizer_of("llama3_1", "<|begin_of_text|>", "<|eot_id|>", LLAMA3), messages) == expected


THOUGHTS = chat("2+2?", "<think>\neasy\n</think>\n\n4", "3+3?", "<think>\nhm\n</think>\n\n6")


def test_qwen3_drops_earlier_thoughts_and_trains_the_last_turn():
    expected = (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\n6<|im_end|>⟧\n"
    )
    assert marks(tokenizer_of("qwen3", eos="<|im_end|>", special=IM), THOUGHTS) == expected


@pytest.mark.parametrize("bos", ["<｜begin▁of▁sentence｜>", "<s>"], ids=["llama", "qwen"])
def test_r1_distilled_models_train_the_thought(bos):
    """Their template drops thoughts and opens one in the prompt. Plain rendering trains answers without a thought."""
    tokenizer = tokenizer_of("deepseek_r1_distill", bos, "<｜end▁of▁sentence｜>", R1)
    end = "<｜end▁of▁sentence｜>"
    expected = (
        f"{bos}<｜User｜>2+2?<｜Assistant｜>\n\n4{end}<｜User｜>3+3?<｜Assistant｜><think>\n⟦hm\n</think>\n\n6{end}⟧"
    )
    assert marks(tokenizer, THOUGHTS) == expected
    with pytest.raises(UserError, match=r"row 1: the inference prompt ends with .*begin the answer with '<think>'"):
        marks(tokenizer, chat("2+2?", "4"))


def test_a_template_that_drops_thoughts_without_a_trace():
    """DeepSeek-R1's first template: its prompt opens no thought. Plain rendering trains answers without one."""
    template = TURNS.replace("message['content']", "message['content'].split('</think>')[-1]")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LOOP + template
    expected = (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n\n\n4<|im_end|>\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\n6<|im_end|>⟧\n"
    )
    assert marks(tokenizer, THOUGHTS) == expected


def test_rows_without_an_answer():
    for messages in (chat("2+2?"), [{"role": "assistant", "content": "Hello!"}]):
        with pytest.raises(UserError, match="row 1: no assistant turn to train on"):
            marks(byte_tokenizer(), messages)


def test_all_tokens():
    example = ChatEncoder(byte_tokenizer(), assistant_only=False).encode([Conversation("row 1", TWO)])[0]
    assert IGNORED not in example.labels and (example.labels == example.input_ids).all()
