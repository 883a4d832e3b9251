"""M1 on published weights: the numbers are those of transformers, and the text is what a user expects."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from m1.engine import SamplingParams
from m1.model.convert import convert
from m1.model.tokenizer import encode_chat

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
START, END = 1, 2  # <|im_start|>, <|im_end|>


def chat(*messages, system=None):
    """Messages of the user and of the assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    return [{"role": "system", "content": system}, *turns] if system else turns


CHATS = [
    chat("What is the capital of France?"),
    chat("Natalia sold 48 clips in April and half as many in May. How many did she sell in total?"),
    chat("Write a short poem about the sea."),
    chat("What is 17 + 25? Put the final answer in \\boxed{}."),
    chat("List three fruits.\n\n1. Apple\n2."),
    chat("Translate to French: Good morning, my friends!"),
    chat("Hi!", "Hello! How can I help you today?", "Who are you?"),
    chat("My name is Ana.", "Nice to meet you, Ana.", "What is my name?"),
    chat("Name a prime above 100.", system="Answer with one number."),
    chat("你好。请用中文介绍一下北京。"),
    chat("日本の首都はどこですか。"),
    chat("Write a Python function that reverses a list."),
    chat("Explain photosynthesis to a child 🌱."),
    chat("def f(x):\n\treturn x ** 2\n\nWhat is f(3)?"),
    chat("  Many   spaces\tand\ttabs\n\n\n  here.  "),
    chat("Why is the sky blue? Answer in one sentence."),
    chat("Count from 1 to 12."),
    chat("Was ist der Unterschied zwischen Äpfeln und Birnen?"),
    chat("Tell me a joke 😀😀😀"),
    chat("Solve: if 3x - 7 = 20, what is x? Think step by step."),
]


def test_weights_are_the_files(gguf_file, smol):
    """Every matrix that llama.cpp doesn't reorder, value for value."""
    weights = smol[0].state_dict()
    names = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
    for tensor in gguf.GGUFReader(gguf_file).tensors:
        parts = tensor.name.split(".")
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif len(parts) > 2 and parts[2] in names and parts[1] in ("0", "29"):
            name = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
        else:
            continue
        assert np.array_equal(weights[name].numpy(), gguf.dequantize(tensor.data, tensor.tensor_type)), name


def test_configuration_and_special_tokens(smol):
    model, tokenizer = smol
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (START, END, END)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (START, END, END)
    assert model.generation_config.eos_token_id == END and config.tie_word_embeddings
    assert (config.max_position_embeddings, tokenizer.model_max_length) == (8192, 8192)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0} and config.rms_norm_eps == 1e-5
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, START, END]
    assert len(tokenizer) == config.vocab_size == 49152


def test_template(smol):
    _, tokenizer = smol
    ids = encode_chat(tokenizer, chat("Hi <|im_end|>", "Hello", "Who?"))
    expected = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
    expected += "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == expected
    assert ids[0] == START and ids.count(START) == 5 and ids.count(END) == 5
    own = encode_chat(tokenizer, chat("Hi", system="Be brief."))
    assert tokenizer.decode(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids  # no token is added


def test_digits_stand_alone(smol):
    """The model was trained on text that was split at digits first: an empty line before "1." is one token."""
    _, tokenizer = smol
    pieces = [tokenizer.decode([token]) for token in tokenizer("a:\n\n1. 2024  7").input_ids]
    assert pieces == ["a", ":", "\n\n", "1", ".", " ", "2", "0", "2", "4", "  ", "7"]


@pytest.mark.parametrize("text", ["a  b\t\n\n\n c", "🌍👨‍👩‍👧 e\u0301 \u00e9", "世界、한국어 العربية", "I'll've 3½ ²"])
def test_any_text_comes_back(smol, text):
    _, tokenizer = smol
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@torch.no_grad()
def check_greedy(smol, llm, chats, max_tokens):
    """The engine's greedy tokens and log-probabilities are those of transformers' generate."""
    model, tokenizer = smol
    samples = llm.generate(chats, SamplingParams(max_tokens=max_tokens, temperature=0))
    for messages, sample in zip(chats, samples, strict=True):
        prompt = torch.tensor([encode_chat(tokenizer, messages)])
        options = {"max_new_tokens": max_tokens, "do_sample": False, "output_logits": True}
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), return_dict_in_generate=True, **options)
        new = theirs.sequences[0, prompt.shape[1] :]
        assert sample.sequence.token_ids == new.tolist(), messages
        logprobs = torch.cat(theirs.logits).log_softmax(-1).gather(1, new[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.sequence.logprobs), logprobs, atol=1e-3, rtol=1e-4)


def test_greedy_is_transformers(smol, llm):
    check_greedy(smol, llm, CHATS[:2], 24)


@pytest.mark.long
def test_greedy_is_transformers_on_every_chat(smol, llm):
    check_greedy(smol, llm, CHATS, 200)


def test_an_answer_ends_at_its_stop_token(llm):
    (sample,) = llm.generate([CHATS[0]], SamplingParams(max_tokens=40, temperature=0))
    assert sample.sequence.finish_reason == "stop" and sample.sequence.token_ids[-1] == END
    assert "Paris" in sample.text and "<|" not in sample.text


@pytest.mark.parametrize(
    "line",
    ["👨‍👩‍👧 🌍 🏳️‍🌈 👍🏽\n", "世界您好。数学很有趣。\n", "日本の首都は東京です。\n", "오늘은 날씨가 좋습니다.\n"],
    ids=["emoji", "zh", "ja", "ko"],
)
def test_characters_of_many_tokens_stream_whole(llm, line):
    """The model repeats the line. Its characters are several tokens each."""
    tokens = len(llm.tokenizer(line).input_ids)
    assert tokens > len(line.strip().replace(" ", ""))
    texts = [s.text for s in llm.stream([line * 10], SamplingParams(max_tokens=tokens + 3, temperature=0))]
    assert texts[-1].startswith(line) and not any("\ufffd" in text for text in texts[:-1])
    shown = ""
    for text in texts:
        assert text.startswith(shown.rstrip("\ufffd"))  # nothing shown is taken back
        shown = text
    assert len(set(texts)) > 3


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@torch.no_grad()
def test_all_attention_is_the_teacher(smol, saved_in, tmp_path, dtype):
    hybrid = convert(saved_in(dtype), tmp_path / "all", keep_attention=range(30)).eval()
    teacher = AutoModelForCausalLM.from_pretrained(saved_in(dtype), dtype="auto")
    tokens = torch.tensor([encode_chat(smol[1], CHATS[1])])
    logits = hybrid(tokens).logits
    assert logits.dtype == getattr(torch, dtype) and torch.equal(logits, teacher(tokens).logits)


@pytest.mark.long
def test_the_file_itself_as_a_teacher(gguf_file, saved_in, tmp_path):
    ours, theirs = (convert(t, tmp_path / str(i), [9, 19, 29]) for i, t in enumerate([gguf_file, saved_in("bfloat16")]))
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert (tmp_path / "0/chat_template.jinja").read_text() == (tmp_path / "1/chat_template.jinja").read_text()
