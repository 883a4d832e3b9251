"""A row's rotary frequencies depend on that row alone, with every rope type that transformers knows."""

import pytest
import torch
from checkpoints import FAMILIES, LLAMA3_ROPE, save_checkpoint, scramble, tiny_teacher
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from m1.engine import Engine, Request, SamplingParams
from m1.engine.graphs import Graphs
from m1.model.convert import convert

SWITCH = 32  # tokens beyond which longrope takes its long factors
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "proportional": {"partial_rotary_factor": 0.5},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SWITCH},
    "llama3": LLAMA3_ROPE,
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": SWITCH,
        "short_factor": [1 + 0.05 * i for i in range(16)],
        "long_factor": [1 + 0.5 * i for i in range(16)],
    },
}
GREEDY = SamplingParams(max_tokens=8, temperature=0)
# Stays short; crosses the switch while it decodes; the same beginning in a long prompt.
BEGINNING = [5 + 7 * i % 200 for i in range(16)]
PROMPTS = [[*BEGINNING, 3], [*BEGINNING, *range(30, 42)], [*BEGINNING, *range(50, 120)]]


def teacher(family, rope_type):
    rope = {"rope_theta": 10000.0, **ROPES[rope_type], "rope_type": rope_type}
    return tiny_teacher(family, rope_parameters=rope, max_position_embeddings=128)


def make(kind, rope_type, folder):
    if kind in FAMILIES:
        return teacher(kind, rope_type)
    saved = save_checkpoint(teacher("llama", rope_type), folder / "teacher")
    return scramble(convert(saved, folder / kind, [1, 3], mixer=kind).eval())


@torch.no_grad()
def generated(model, prompt):
    """Tokens and log-probabilities of transformers' `generate`, on the prompt alone."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    tokens = out.sequences[0, len(prompt) :]
    logprobs = torch.cat(out.logits).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    if not len(prompt) <= SWITCH < len(prompt) + 8:  # then the full forward says the same
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0], logprobs)
    return tokens.tolist(), logprobs


def assert_generated(model, sequences, prompts=PROMPTS):
    for sequence, prompt in zip(sequences, prompts, strict=True):
        tokens, logprobs = generated(model, prompt)
        assert sequence.token_ids == tokens
        torch.testing.assert_close(torch.tensor(sequence.logprobs), logprobs, rtol=1e-5, atol=2e-5)


def test_every_rope_type_is_here():
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("kind", [*FAMILIES, "mamba", "mamba2"])
def test_a_row_is_what_generate_gives_it_alone(kind, rope_type, tmp_path):
    model = make(kind, rope_type, tmp_path)
    together = Engine(model, [], max_model_len=128).generate(PROMPTS, GREEDY)
    assert_generated(model, together)
    for prompt, sequence in zip(PROMPTS, together, strict=True):
        (alone,) = Engine(model, [], max_model_len=128).generate([prompt], GREEDY)
        assert (alone.token_ids, alone.logprobs) == (sequence.token_ids, sequence.logprobs)


@pytest.mark.parametrize("order", [PROMPTS, PROMPTS[::-1]])
def test_chunks_forks_and_the_prefix_cache_keep_longropes_frequencies(order):
    """A prompt's chunks and prefix all have the frequencies of the whole prompt, whatever came before."""
    model = teacher("llama", "longrope")
    engine = Engine(model, [], max_model_len=128, prefill_chunk=8, prefix_cache=32)
    for prompt in [*order, *order]:
        forks = engine.generate([prompt], SamplingParams(n=2, max_tokens=8, temperature=0))
        assert_generated(model, forks, [prompt, prompt])
    # again: 16 of 17, 24 of 28, or all tokens; the long prompt shares nothing with the short ones
    assert engine.stats.prefix_hits == sum(map(len, PROMPTS)) + 16


def test_padded_graph_batches_keep_longropes_frequencies():
    model = teacher("llama", "longrope")
    engine = Engine(model, [], max_model_len=128)
    engine.executor.use(lambda step: Graphs(step, engine.executor.slots.spare, model.device))
    requests = [Request(prompt, GREEDY, i) for i, prompt in enumerate(PROMPTS)]
    for _ in engine.run(requests):
        pass
    assert_generated(model, [request.sequences[0] for request in requests])


@torch.no_grad()
def test_what_the_model_has_seen_before_leaves_no_trace():
    """transformers' module keeps the frequencies of the longest row it has seen."""
    model = teacher("llama", "dynamic")
    fresh = Engine(model, [], max_model_len=128).generate(PROMPTS, GREEDY)
    model(torch.ones(1, 300, dtype=torch.long))
    after = Engine(model, [], max_model_len=128).generate(PROMPTS, GREEDY)
    assert [s.logprobs for s in after] == [s.logprobs for s in fresh]
