"""The engine against transformers' own generate and against full forwards; stopping, forking, refusing."""

import pytest
import torch

from m1.engine import Engine, SamplingParams
from m1.errors import UserError

GREEDY = SamplingParams(max_tokens=16, temperature=0)
PROMPTS = [[5, 6, 7], [8] * 11, [1, 2]]


def test_greedy_equals_transformers_generate(model):
    for completion, prompt in zip(Engine(model, []).generate(PROMPTS, GREEDY), PROMPTS, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        assert completion.token_ids == out[0, len(prompt) :].tolist()
        assert completion.finish_reason == "length"


@torch.no_grad()
def test_logprobs_are_the_full_forwards(model):
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=3)
    for completion in Engine(model, []).generate(PROMPTS, params, n=2):
        prompt = PROMPTS[completion.prompt]
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_forked_samples_equal_fresh_prefills(model):
    """Greedy samples of one prompt, forked from one prefill, are all what a prompt of its own gives."""
    forked = Engine(model, []).generate(PROMPTS, GREEDY, n=3)
    fresh = Engine(model, []).generate(PROMPTS, GREEDY)
    assert [c.prompt for c in forked] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for completion in forked:
        assert completion.token_ids == fresh[completion.prompt].token_ids


@pytest.mark.parametrize("max_batch", [1, 2, 4, 100])
def test_batch_size_changes_no_greedy_token(model, max_batch):
    tokens = [c.token_ids for c in Engine(model, [], max_batch).generate(PROMPTS, GREEDY, n=3)]
    assert tokens == [c.token_ids for c in Engine(model, [], 9).generate(PROMPTS, GREEDY, n=3)]


def test_stop_tokens_end_a_row_and_leave_the_others_alone(model):
    free = [c.token_ids for c in Engine(model, []).generate(PROMPTS, GREEDY)]
    stop = free[1][4]
    for completion, tokens in zip(Engine(model, [stop]).generate(PROMPTS, GREEDY), free, strict=True):
        if stop in tokens:
            assert completion.token_ids == tokens[: tokens.index(stop) + 1]
            assert completion.finish_reason == "stop"
        else:
            assert completion.token_ids == tokens


def test_same_seed_same_samples(model):
    runs = [
        [c.token_ids for c in Engine(model).generate(PROMPTS, SamplingParams(max_tokens=8, seed=seed), n=4)]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(t) for t in runs[0][:4]}) > 1


def test_abort_keeps_what_was_made(model):
    steps = iter([False] * 5 + [True])
    completions = Engine(model, []).generate(PROMPTS, GREEDY, should_stop=lambda: next(steps))
    assert {c.finish_reason for c in completions} == {"abort"}
    assert {len(c.token_ids) for c in completions} == {6}  # the first step gives two: the prompt's, and a decoded one


def test_on_finish_comes_once_for_each_sample(model):
    seen = []
    completions = Engine(model, []).generate(PROMPTS, GREEDY, n=2, on_finish=seen.append)
    assert sorted(map(id, seen)) == sorted(map(id, completions))


def test_bad_requests_are_refused(model):
    engine = Engine(model)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        engine.generate([[1], []], GREEDY)
    with pytest.raises(UserError, match="model's context of 512"):
        engine.generate([[1] * 500], GREEDY)
    with pytest.raises(UserError, match=r"max_len of 20: .* or raise max_len up to 512"):
        Engine(model, max_len=20).generate([[1] * 10], GREEDY)
    with pytest.raises(UserError, match="top_p=0"):
        SamplingParams(top_p=0)


def test_int8_weights_are_near_the_models(hybrid):
    params = SamplingParams(max_tokens=12, temperature=0)
    plain, rounded = (
        Engine(hybrid, [], max_len=64, quantize=q).generate([[3, 1, 4, 1, 5]], params)[0] for q in (None, "int8")
    )
    assert rounded.token_ids[0] == plain.token_ids[0] and rounded.logprobs != plain.logprobs
    assert abs(rounded.logprobs[0] - plain.logprobs[0]) < 0.1
    with pytest.raises(UserError, match="int4"):
        Engine(hybrid, quantize="int4")
