"""Hybrids of published weights, not trained: what is exact on random weights is exact on these."""

import copy
from dataclasses import replace

import pytest
import torch
from test_smollm2 import CHATS
from transformers import DynamicCache
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from m1.engine import LLM, Engine, SamplingParams
from m1.engine.sampling import SamplingBatch
from m1.model.convert import convert
from m1.model.tokenizer import encode_chat

pytestmark = pytest.mark.long
GREEDY = SamplingParams(max_tokens=40, temperature=0)


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def hybrid(request, smol_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("hybrid")
    return convert(smol_dir, out, attention_ratio=0.34, mixer=request.param).eval()


@pytest.fixture(scope="module")
def prompts(smol):
    return [encode_chat(smol[1], messages) for messages in CHATS[:4]]


@torch.no_grad()
def test_the_engine_is_the_full_forward(hybrid, prompts):
    for sequence, prompt in zip(Engine(hybrid, max_model_len=256).generate(prompts, GREEDY), prompts, strict=True):
        tokens = torch.tensor(sequence.token_ids)
        logprobs = hybrid(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert torch.equal(logprobs.argmax(-1), tokens)
        mine = logprobs.gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.logprobs), mine, atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_before_a_step_and_between_chunks(hybrid, prompts, side):
    """5 padding tokens beside a prompt, then a token, then 3 more padding tokens and another."""
    for prompt in prompts:
        tokens, pad = torch.tensor([prompt]), torch.full((1, 5), 7)
        cache = DynamicCache(config=hybrid.config)
        padded = [pad, tokens] if side == "left" else [tokens, pad]
        mask = torch.cat([torch.ones_like(t) * (t is tokens) for t in padded], dim=1)
        hybrid(torch.cat(padded, dim=1), attention_mask=mask, past_key_values=cache)
        for chunk, real in ([[11]], [[1]]), ([[7, 7, 7, 12]], [[0, 0, 0, 1]]):
            mask = torch.cat([mask, torch.tensor(real)], dim=1)
            logits = hybrid(torch.tensor(chunk), attention_mask=mask, past_key_values=cache).logits[:, -1]
        expected = hybrid(torch.tensor([[*prompt, 11, 12]])).logits[:, -1]
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)


def test_assistance_and_masks_that_cannot_be_followed_are_refused(hybrid, smol, prompts):
    prompt = torch.tensor(prompts[:1])
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": smol[0]}, {"assistant_early_exit": 4}):
        with pytest.raises(ValueError, match="stateful models"):
            hybrid.generate(prompt, max_new_tokens=8, do_sample=False, **options)
    with pytest.raises(ValueError, match="Mamba layers can follow a 2D mask only"):
        hybrid(prompt, attention_mask=torch.ones(1, 1, prompt.shape[1], prompt.shape[1]).tril())


def test_a_long_neighbour_does_not_choose_the_frequencies(smol, prompts):
    """Rope type "longrope", with its switch between two prompts' lengths."""
    model = copy.deepcopy(smol[0])
    short, long = min(prompts, key=len), [*max(prompts, key=len), *range(100, 160)]
    factors = {"short_factor": [1 + 0.02 * i for i in range(32)], "long_factor": [1 + 0.2 * i for i in range(32)]}
    model.config.rope_parameters |= {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": len(short) + 50, **factors
    }  # fmt: skip
    model = type(model)(model.config).eval()
    model.load_state_dict(smol[0].state_dict())
    assert len(long) > len(short) + 50
    alone = [Engine(model, max_model_len=256).generate([prompt], GREEDY)[0] for prompt in (short, long)]
    for sequence, other in zip(alone, Engine(model, max_model_len=256).generate([short, long], GREEDY), strict=True):
        assert (sequence.token_ids, sequence.logprobs) == (other.token_ids, other.logprobs)
    out = model.generate(torch.tensor([short]), max_new_tokens=40, do_sample=False)[0, len(short) :]
    assert alone[0].token_ids == out.tolist()


@torch.no_grad()
def test_truncation_is_transformers_but_for_ties(smol, saved_in, prompts):
    """bfloat16 logits of chats, where ties are common: as many tokens as transformers keeps, in top-k exactly k."""
    model = type(smol[0]).from_pretrained(saved_in("bfloat16"), dtype=torch.bfloat16)
    logits = torch.cat([model(torch.tensor([prompt])).logits[0] for prompt in prompts])

    def kept(**options):
        params = SamplingParams(**options)
        return SamplingBatch.of([params] * len(logits), [0] * len(logits), logits.device).truncate(logits) > -torch.inf

    for p in (0.5, 0.9, 0.95):
        theirs = TopPLogitsWarper(p)(None, logits.float()) > -torch.inf
        assert (kept(top_p=p).sum(-1) - theirs.sum(-1)).abs().max() <= 1  # their sums round otherwise
    for p in (0.05, 0.3):
        assert torch.equal(kept(min_p=p), MinPLogitsWarper(p)(None, logits.float()) > -torch.inf)
    for k in (1, 50):
        ours, theirs = kept(top_k=k), TopKLogitsWarper(k)(None, logits.float()) > -torch.inf
        assert (ours.sum(-1) == k).all() and not (ours & ~theirs).any() and (theirs.sum(-1) > k).any()


def test_stop_strings_are_never_shown(llm):
    """The stream once showed "3\\n4" of this stop string, and took it back."""
    (free,) = llm.generate([CHATS[16]], replace(GREEDY, max_tokens=60))
    lines = free.text.split("\n")
    stop = "\n".join(["", *lines[2:4]])
    assert len(lines) > 4 and stop in free.text
    shown = ""
    for sample in llm.stream([CHATS[16]], replace(GREEDY, max_tokens=60, stop=(stop,))):
        assert sample.text.startswith(shown)
        shown = sample.text
    assert shown == free.text[: free.text.index(stop)] and sample.sequence.finish_reason == "stop"


def test_the_last_token_completes_a_stop_string(llm):
    (free,) = llm.generate([CHATS[16]], replace(GREEDY, max_tokens=8))
    stop = free.text[-3:]
    (cut,) = llm.generate([CHATS[16]], replace(GREEDY, max_tokens=8, stop=(stop,)))
    assert cut.text == free.text[: free.text.index(stop)] and cut.sequence.finish_reason == "stop"


def test_texts_have_no_special_tokens(smol, prompts):
    """Not those of a model that is made to go on after its end of turn, either."""
    llm = LLM(*smol, max_model_len=256)
    samples = llm.generate(CHATS[:2], replace(GREEDY, ignore_eos=True, max_tokens=60))
    for sample in samples:
        assert sample.text == llm.decode(sample.sequence.token_ids) and "<|" not in sample.text
    assert any(smol[1].eos_token_id in sample.sequence.token_ids for sample in samples)
