"""Decoding in batches filled up to a graph's size is decoding; on a GPU the graphs themselves are compared."""

import pytest
import torch

from m1.engine import Engine, Request, SamplingParams
from m1.engine.graphs import Graphs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def model(model):
    return model.to(DEVICE)


def generate(model, graphs, count, **options):
    engine = Engine(model, [], max_num_seqs=11, max_model_len=64)
    spare = engine.executor.slots.spare
    engine.executor.use(lambda step: Graphs(step, spare, model.device) if graphs else step)
    prompts = [[1 + i] * (1 + 3 * i) for i in range(count)]
    requests = [Request(p, SamplingParams(max_tokens=5 + i, **options), i) for i, p in enumerate(prompts)]
    for _ in engine.run(requests):
        pass
    return [r.sequences[0] for r in requests], engine.executor


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "top_k": 9}, {"seed": 3, "presence_penalty": 1.0}]
)
def test_graphs_equal_eager_steps(model, options):
    """Samples end one after another, so that sizes 16, 8, 4, 2 and 1 all come about."""
    expected, _ = generate(model, False, 11, **options)
    actual, executor = generate(model, True, 11, **options)
    used = executor.network if options.keys() & {"top_k", "presence_penalty"} else executor.step
    assert set(used.captured) == {1, 2, 4, 8, 16}
    for a, b in zip(actual, expected, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="compares a GPU with transformers' generate")
def test_greedy_equals_transformers_generate(model):
    prompts = [[5, 6, 7], [8] * 11, [1, 2]]
    for sequence in Engine(model, [], max_model_len=64).generate(prompts, SamplingParams(max_tokens=16, temperature=0)):
        prompt = prompts[sequence.request.id]
        out = model.generate(torch.tensor([prompt], device=DEVICE), max_new_tokens=16, do_sample=False)
        assert sequence.token_ids[: out.shape[1] - len(prompt)] == out[0, len(prompt) :].tolist()
