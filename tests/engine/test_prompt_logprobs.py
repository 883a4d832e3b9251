"""Log-probabilities of prompts are those of the model itself, however prompts are cut, shared or computed again."""

import pytest
import torch

from m1.engine import Engine, Request, SamplingParams

PROMPTS = [[7] * 40, list(range(1, 34)), [3], [5, 9], [(i * 7) % 200 for i in range(70)]]


def expected(model, prompt):
    """[len - 1, V]"""
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)


def scored(engine, prompts, **options):
    requests = [Request(prompt, SamplingParams(max_tokens=3, **options), prompt_logprobs=True) for prompt in prompts]
    for _ in engine.run(requests):
        pass
    return requests


@pytest.mark.parametrize(("chunk", "budget"), [(512, 512), (16, 20), (7, 1), (16, 500)])
@pytest.mark.parametrize(("slots", "n"), [(4, 1), (4, 6), (1, 2)])
def test_they_are_the_models(hybrid, chunk, budget, slots, n):
    """With one slot prompts are prefilled for each sample. Some begin as those before them."""
    engine = Engine(hybrid, [], slots, 128, prefill_chunk=chunk, prefill_budget=budget)
    prompts = [*PROMPTS, PROMPTS[4], PROMPTS[4][:50]]
    for request in scored(engine, prompts, n=n, logprobs=3):
        of_all = expected(hybrid, request.tokens)
        own = of_all.gather(1, torch.tensor(request.tokens[1:], dtype=torch.long)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(request.logprobs), own, rtol=1e-4, atol=1e-4)
        likeliest = [[token for token, _ in row] for row in request.top_logprobs]
        assert likeliest == of_all.topk(3).indices.tolist()
        values = torch.tensor([[value for _, value in row] for row in request.top_logprobs]).reshape(-1, 3)
        torch.testing.assert_close(values, of_all.topk(3).values, rtol=1e-4, atol=1e-4)
    assert engine.stats.prefix_hits == 0


def test_the_samples_stay_the_same(hybrid):
    """Who asks for them, and who doesn't, gets the same tokens. Nothing is kept of the temperature."""
    engine = Engine(hybrid, [], 4, 128, prefill_chunk=16)
    plain = engine.generate(PROMPTS[:2], SamplingParams(max_tokens=3, seed=1))
    asking, other = (scored(engine, PROMPTS[:2], seed=1, temperature=t) for t in (1.0, 0.5))
    assert [r.logprobs for r in asking] == [r.logprobs for r in other] and not plain[0].request.logprobs
    again = engine.generate(PROMPTS[:2], SamplingParams(max_tokens=3, seed=1))
    assert [s.token_ids for s in again] == [s.token_ids for s in plain] and engine.stats.prefix_hits > 0


def test_an_abort_leaves_no_scores_to_others(hybrid):
    engine = Engine(hybrid, [], 2, 128, prefill_chunk=16, prefill_budget=16)
    gone, stays = (Request(PROMPTS[4], SamplingParams(max_tokens=2), prompt_logprobs=True) for _ in range(2))
    engine.submit(gone)
    engine.submit(stays)
    engine.step()
    engine.abort(gone)
    while engine.busy:
        engine.step()
    assert len(gone.logprobs) == 16 and len(stays.logprobs) == len(PROMPTS[4]) - 1
