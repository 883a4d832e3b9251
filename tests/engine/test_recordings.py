"""Decoding from recordings is decoding step by step, in any mix of batch sizes and after new weights."""

import pytest
import torch

from m1.engine import Engine, Request, SamplingParams


def generate(engine):
    """Sequences that begin and end one after another, so that many sizes come about."""
    prompts = [[1 + i] * (1 + 3 * i) for i in range(11)]
    settings = [{"temperature": 0}, {"seed": 3}, {"seed": 3, "top_k": 9}]
    params = [SamplingParams(max_tokens=4 + i, **settings[i % 3]) for i in range(11)]
    requests = [Request(p, q, i) for i, (p, q) in enumerate(zip(prompts, params, strict=True))]
    for _ in engine.run(requests):
        pass
    return [(s.token_ids, s.logprobs) for r in requests for s in r.sequences]


def as_they_are(model, **options):
    engine = Engine(model, [], max_model_len=64, **options)
    engine.executor.use(lambda step: step)
    return generate(engine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_recorded_steps_equal_plain_ones(hybrid, dtype, quantize):
    options = {"max_num_seqs": 5, "quantize": quantize}
    hybrid = hybrid.to(dtype)
    engine = Engine(hybrid, [], max_model_len=64, **options)
    expected = as_they_are(hybrid, **options)
    for _ in range(2):
        assert generate(engine) == expected
    recorded = engine.executor.step.recorded
    assert recorded and not [found for found in recorded.values() if isinstance(found, str)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_company_changes_no_bit(hybrid, dtype, quantize):
    """Prompts of several lengths, in chunks, alone and together."""
    engine = Engine(hybrid.to(dtype), [], max_model_len=64, prefill_chunk=16, prefix_cache=0, quantize=quantize)
    prompts = [[1 + i] * length for i, length in enumerate((1, 3, 16, 17, 40))]
    params = SamplingParams(max_tokens=6, seed=5)
    together = engine.generate(prompts, params)
    for prompt, sequence in zip(prompts, together, strict=True):
        request = Request(prompt, sequence.request.params, sequence.request.id)
        for _ in engine.run([request]):
            pass
        assert request.sequences[0].logprobs == sequence.logprobs
