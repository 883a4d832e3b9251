"""The local samplers: what they sample, that both sample alike, and what they leave as it was."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from m1.engine import LLM, SamplingParams, fold_in
from m1.errors import M1Warning, UserError
from m1.evaluation import samplers
from m1.evaluation.samplers import EngineSampler, SampleRequest, TransformersSampler
from m1.model.checkpoint import load_tokenizer
from m1.model.tokenizer import byte_tokenizer, encode_chat

LOCAL = [EngineSampler, TransformersSampler]
PARAMS = SamplingParams(max_tokens=6, temperature=1.0)


def request(problem, text, rounds=(0,), seed=0):
    return SampleRequest(problem, [{"role": "user", "content": text}], rounds, seed)


def requests(count, rounds=(0,), seed=0):
    return [request(f"p{i}", "x" * (3 * i + 1), rounds, seed + 1000 * i) for i in range(count)]


@pytest.fixture
def tokenizer(hybrid_dir):
    return load_tokenizer(hybrid_dir)


@pytest.mark.parametrize("kind", LOCAL)
def test_every_round_of_every_ask(hybrid, tokenizer, kind):
    samples = list(kind(hybrid, tokenizer, 4).generate(requests(3, (2, 5)), PARAMS))
    assert sorted((s.problem, s.round) for s in samples) == [(f"p{i}", r) for i in range(3) for r in (2, 5)]
    assert all(1 <= s.tokens <= 6 and (s.finish_reason == "length") <= (s.tokens == 6) for s in samples)
    assert all(s.seconds > 0 for s in samples)
    assert all(s.logprob < 0 for s in samples)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_greedy_samples_of_both_are_the_same(hybrid, tokenizer, batch):
    """Batches of prompts of different lengths: padding leaves no trace."""
    params = SamplingParams(max_tokens=6, temperature=0)
    samples = [{s.problem: s for s in kind(hybrid, tokenizer, batch).generate(requests(5), params)} for kind in LOCAL]
    for own, other in ((samples[0][name], samples[1][name]) for name in samples[0]):
        assert (own.text, own.tokens) == (other.text, other.tokens)
        assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert len({sample.text for sample in samples[0].values()}) > 1


def test_transformers_logprobs_are_of_the_sampling_temperature(hybrid, tokenizer):
    config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=0.5, top_k=0, pad_token_id=0)
    prompts = [[5, 6, 7], [8]]
    sampler = TransformersSampler(hybrid, tokenizer)
    for prompt, tokens, logprobs in zip(prompts, *sampler._sample(prompts, config, seed=0), strict=True):
        with torch.no_grad():
            logits = hybrid(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.5).log_softmax(-1)[range(5), tokens]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", LOCAL)
def test_seeds(hybrid, tokenizer, kind):
    def texts(seed):
        return {s.problem: s.text for s in kind(hybrid, tokenizer, 4).generate(requests(4, seed=seed), PARAMS)}

    assert texts(1) == texts(1) != texts(2)


def test_an_engine_sample_depends_on_its_prompt_and_seed_alone(hybrid, tokenizer):
    """Whatever else is asked for, of the same problem or of others; and a prompt is prefilled once."""
    sampler = EngineSampler(hybrid, tokenizer, 2)
    together = {(s.problem, s.round): s.text for s in sampler.generate(requests(5, (0, 1, 2)), PARAMS)}
    assert sampler.llm.engine.stats.prefilled == sum(len(encode_chat(tokenizer, r.messages)) for r in requests(5))
    alone = {
        (s.problem, s.round): s.text
        for round_ in (2, 0, 1)
        for one in requests(5, (round_,))
        for s in sampler.generate([one], PARAMS)
    }
    assert together == alone and len(set(together.values())) > 10


def test_the_engine_does_the_work_of_m1_generate(hybrid, tokenizer):
    """The same samples in as many steps: the batch is as full."""
    llm = LLM(hybrid, tokenizer, max_num_seqs=4)
    texts = [s.text for s in llm.generate([r.messages for r in requests(5)], replace(PARAMS, n=3))]
    sampler = EngineSampler(hybrid, tokenizer, 4)
    asked = [replace(r, seed=fold_in(PARAMS.seed, i)) for i, r in enumerate(requests(5, (0, 1, 2)))]
    samples = sorted(sampler.generate(asked, PARAMS), key=lambda s: (s.problem, s.round))
    assert [s.text for s in samples] == texts and sampler.llm.engine.stats == llm.engine.stats


@pytest.mark.parametrize("kind", LOCAL)
@pytest.mark.parametrize("one", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_filters_of_tokens(hybrid, tokenizer, kind, one):
    """Each of them alone leaves the likeliest token."""
    greedy, filtered = (
        [s.text for s in kind(hybrid, tokenizer, 4).generate(requests(3), params)]
        for params in (replace(PARAMS, temperature=0), replace(PARAMS, **one))
    )
    assert sorted(greedy) == sorted(filtered)


@pytest.mark.parametrize("kind", LOCAL)
def test_a_sample_ends_behind_a_stop_token(hybrid, tokenizer, kind):
    """Every token is a stop token: one is sampled, and it isn't text."""
    hybrid.generation_config.eos_token_id = list(range(hybrid.config.vocab_size))
    samples = list(kind(hybrid, tokenizer, 4).generate(requests(3), PARAMS))
    assert {(s.tokens, s.finish_reason) for s in samples} == {(1, "stop")}


def test_the_checkpoints_own_sampling_settings_are_not_used(hybrid, tokenizer):
    """Each of its settings alone would make every sample the greedy one."""
    hybrid.generation_config.update(top_k=1, top_p=1e-6, min_p=1.0, do_sample=True)
    before = hybrid.generation_config
    sampler = TransformersSampler(hybrid, tokenizer, 4)
    samples = {s.text for s in sampler.generate(requests(1, tuple(range(8))), PARAMS)}
    assert len(samples) > 4
    assert hybrid.generation_config is before and before.top_k == 1


@pytest.mark.parametrize("kind", LOCAL)
def test_time_the_caller_takes_is_not_on_the_clock(hybrid, tokenizer, kind, monkeypatch):
    """A clock that moves by 1 each time it is read, and by 1000 while the caller holds a sample."""
    clock = itertools.count()
    held = 0
    monkeypatch.setattr(samplers.time, "monotonic", lambda: next(clock) + held)
    seconds = []
    for sample in kind(hybrid, tokenizer, 1).generate(requests(4), PARAMS):
        seconds.append(sample.seconds)
        held += 1000
    assert 0 < max(seconds) < 100


@pytest.mark.parametrize("kind", LOCAL)
def test_prompts_that_do_not_fit(hybrid, tokenizer, kind):
    """The context is 512 tokens."""
    with pytest.raises(UserError, match=r"prompt .*has \d+ tokens, .* context"):
        list(kind(hybrid, tokenizer, 4).generate([request("p", "x" * 512)], PARAMS))
    with pytest.raises(UserError, match="max_num_seqs=0"):
        list(kind(hybrid, tokenizer, 0).generate(requests(1), PARAMS))
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        list(kind(hybrid, bare, 4).generate(requests(1), PARAMS))


@pytest.mark.parametrize("kind", LOCAL)
def test_samples_end_with_the_context(hybrid, tokenizer, kind):
    hybrid.generation_config.eos_token_id = tokenizer.eos_token_id = None
    long = request("long", "x" * 500)
    with pytest.warns(M1Warning, match="max_tokens is 40, more than the model's context of 512 tokens leaves"):
        sample = next(kind(hybrid, tokenizer, 4).generate([long], replace(PARAMS, max_tokens=40)))
    prompt = len(encode_chat(tokenizer, long.messages))
    assert sample.tokens == 512 - prompt > 1 and sample.finish_reason == "length"


@pytest.mark.parametrize("kind", LOCAL)
def test_a_long_prompt_does_not_cut_the_others(hybrid, tokenizer, kind):
    """It leaves a few tokens of the context; each sample is as long as its own prompt allows."""
    hybrid.generation_config.eos_token_id = tokenizer.eos_token_id = None
    asked = [request("short", "x", (0, 1)), request("long", "x" * 500, seed=1), *requests(3)]
    with pytest.warns(M1Warning, match="max_tokens is 40"):
        samples = list(kind(hybrid, tokenizer, 8).generate(asked, replace(PARAMS, max_tokens=40)))
    room = 512 - len(encode_chat(tokenizer, "x" * 500))
    assert 0 < room < 40 and len(samples) == 6
    assert {(s.problem == "long", s.tokens) for s in samples} == {(True, room), (False, 40)}


def test_an_iterator_that_is_closed_frees_the_engine(hybrid, tokenizer):
    sampler = EngineSampler(hybrid, tokenizer, 2)
    samples = sampler.generate(requests(5), PARAMS)
    next(samples)
    assert sampler.llm.engine.busy
    samples.close()
    assert not sampler.llm.engine.busy
    assert len(list(sampler.generate(requests(5), PARAMS))) == 5


def test_identities(hybrid, tokenizer):
    same, other = (kind(hybrid, tokenizer).identity() for kind in LOCAL)
    assert same["model"] == other["model"] and same["sampler"] != other["sampler"]
    with torch.no_grad():
        next(hybrid.parameters())[0, 0] += 1
    assert EngineSampler(hybrid, tokenizer).identity()["model"] != same["model"]
    facts = EngineSampler(hybrid, tokenizer).facts()
    assert facts["dtype"] == "float32"
    assert facts["parameters"] == sum(math.prod(p.shape) for p in hybrid.parameters())
    assert facts["cache_bytes_per_sequence_at_4k"] > 0


@pytest.mark.parametrize("kind", LOCAL)
def test_a_thought_that_the_prompt_opened_is_in_the_text(hybrid, tokenizer, kind):
    before = [s.text for s in kind(hybrid, tokenizer, 4).generate(requests(2), PARAMS)]
    assert not any("<think>" in text for text in before)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>{% endif", "<|assistant|><think>\n{% endif")
    texts = [s.text for s in kind(hybrid, tokenizer, 4).generate(requests(2), PARAMS)]
    assert all(text.startswith("<think>") for text in texts)
