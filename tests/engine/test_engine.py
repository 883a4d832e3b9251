"""The engine against transformers' own generate and against full forwards; stopping, forking, refusing."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch

from m1.engine import Engine, Request, SamplingParams
from m1.errors import M1Warning, UserError

GREEDY = SamplingParams(max_tokens=16, temperature=0)
PROMPTS = [[5, 6, 7], [8] * 11, [1, 2]]


def test_greedy_equals_transformers_generate(model):
    for sequence, prompt in zip(Engine(model, []).generate(PROMPTS, GREEDY), PROMPTS, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        assert sequence.token_ids == out[0, len(prompt) :].tolist()
        assert sequence.finish_reason == "length"


@torch.no_grad()
def test_logprobs_are_the_full_forwards(model):
    params = SamplingParams(n=2, max_tokens=20, temperature=0.8, seed=3)
    for sequence in Engine(model, []).generate(PROMPTS, params):
        prompt = PROMPTS[sequence.request.id]
        logits = model(torch.tensor([prompt + sequence.token_ids])).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(sequence.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_forked_samples_equal_fresh_prefills(model):
    """Greedy samples of one prompt, forked from one prefill, are all what a prompt of its own gives."""
    forked = Engine(model, []).generate(PROMPTS, replace(GREEDY, n=3))
    fresh = Engine(model, []).generate(PROMPTS, GREEDY)
    assert [s.request.id for s in forked] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for sequence in forked:
        assert sequence.token_ids == fresh[sequence.request.id].token_ids


@pytest.mark.parametrize("max_num_seqs", [1, 2, 4, 100])
def test_batch_size_changes_no_greedy_token(model, max_num_seqs):
    params = replace(GREEDY, n=3)
    tokens = [s.token_ids for s in Engine(model, [], max_num_seqs).generate(PROMPTS, params)]
    assert tokens == [s.token_ids for s in Engine(model, [], 9).generate(PROMPTS, params)]


def test_stop_tokens_end_a_row_and_leave_the_others_alone(model):
    free = [c.token_ids for c in Engine(model, []).generate(PROMPTS, GREEDY)]
    stop = free[1][4]
    for sequence, tokens in zip(Engine(model, [stop]).generate(PROMPTS, GREEDY), free, strict=True):
        if stop in tokens:
            assert sequence.token_ids == tokens[: tokens.index(stop) + 1]
            assert sequence.finish_reason == "stop"
        else:
            assert sequence.token_ids == tokens


def test_same_seed_same_samples(model):
    runs = [
        [s.token_ids for s in Engine(model).generate(PROMPTS, SamplingParams(n=4, max_tokens=8, seed=seed))]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(t) for t in runs[0][:4]}) > 1


def test_prompts_of_one_call_have_streams_of_their_own(model):
    first, second, alone = Engine(model, []).generate([[5, 6]] * 2, SamplingParams(max_tokens=12, seed=3)) + Engine(
        model, []
    ).generate([[5, 6]], SamplingParams(max_tokens=12, seed=3))
    assert first.token_ids == alone.token_ids != second.token_ids


def test_no_slot_is_free_while_requests_wait(model):
    """A prompt whose prefill takes several steps waits for its sequences' slots."""
    engine = Engine(model, [], max_num_seqs=4, prefill_chunk=8, prefill_budget=8)
    assert engine.free_slots == 4
    engine.submit(Request([3] * 20, replace(GREEDY, n=2)))
    engine.step()
    assert engine.scheduler.free and engine.free_slots == 0
    engine.step(), engine.step()
    assert engine.free_slots == 2


def requests(params):
    return [Request(prompt, params, i) for i, prompt in enumerate(PROMPTS)]


def test_abort_keeps_what_was_made(model):
    engine, own = Engine(model, []), requests(GREEDY)
    steps = engine.run(own)
    for _ in range(5):
        next(steps)
    steps.close()
    assert {s.finish_reason for r in own for s in r.sequences} == {"abort"} and all(r.done for r in own)
    # the first step gives two: the prompt's, and a decoded one
    assert {len(s.token_ids) for r in own for s in r.sequences} == {6}
    assert not engine.busy and engine.free_slots == engine.num_slots


def test_run_yields_each_sequence_once_and_no_others(model):
    engine, own, other = Engine(model, []), requests(replace(GREEDY, n=2)), Request([3], replace(GREEDY, max_tokens=4))
    engine.submit(other)
    seen = [sequence for ended in engine.run(own) for sequence in ended]
    assert sorted(map(id, seen)) == sorted(id(s) for r in own for s in r.sequences)
    assert other.done and other.sequences[0].finish_reason == "length"


def test_run_takes_requests_that_are_added_meanwhile(model):
    engine, own = Engine(model, []), requests(GREEDY)[:1]
    for i, _ in enumerate(engine.run(own)):
        if i == 3:
            own += requests(GREEDY)[1:]
    alone = Engine(model, []).run(fresh := requests(GREEDY))
    assert sum(map(len, alone)) == 3
    assert [r.sequences[0].token_ids for r in own] == [r.sequences[0].token_ids for r in fresh]


def test_a_refused_request_ends_the_run_and_aborts_the_others(model):
    engine, own = Engine(model, []), requests(GREEDY)
    steps = engine.run(own)
    next(steps)
    own.append(Request([], GREEDY, 7))
    with pytest.raises(UserError, match="prompt 7 is empty"):
        next(steps)
    assert all(r.done for r in own[:3]) and not engine.busy


def test_bad_requests_are_refused(model):
    engine = Engine(model)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        engine.generate([[1], []], GREEDY)
    with pytest.raises(UserError, match="prompt 0 has 512 tokens, which leaves no room in the model's context of 512"):
        engine.generate([[1] * 512], GREEDY)
    with pytest.raises(UserError, match=r"max_model_len of 20 tokens: shorten it, or raise max_model_len up to 512"):
        Engine(model, max_model_len=20).generate([[1] * 20], GREEDY)
    with pytest.raises(UserError, match="prompt 0 has token -1; the vocabulary is 0 to"):
        engine.generate([[200, -1, 3]], GREEDY)
    for options, words in [({"top_p": 0}, "top_p=0"), ({"n": 0}, "n=0"), ({"stop": ("a", "")}, "empty string")]:
        with pytest.raises(UserError, match=words):
            SamplingParams(**options)


def test_a_sequence_ends_with_the_context_and_says_so_once(model):
    engine, asked = Engine(model, [], max_model_len=20), replace(GREEDY, max_tokens=50)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own: equal messages once
        long, short, whole = engine.generate([[1] * 19, [2] * 12, [3] * 5], asked)
        engine.generate([[1] * 19], replace(asked, max_tokens=1))  # fits exactly
    assert [str(w.message) for w in caught if w.category is M1Warning] == [
        "max_tokens is 50, more than the engine's max_model_len of 20 tokens leaves: samples end there"
    ]
    assert [len(s.token_ids) for s in (long, short, whole)] == [1, 8, 15]
    assert {s.finish_reason for s in (long, short, whole)} == {"length"}
    room = Engine(model, [], max_model_len=100).generate([[3] * 5], asked)[0]
    assert room.token_ids[:15] == whole.token_ids and len(room.token_ids) == 50


@pytest.mark.parametrize(("bits", "distance"), [("int8", 0.1), ("int4", 0.5)])
def test_rounded_weights_are_near_the_models(hybrid, bits, distance):
    params = SamplingParams(max_tokens=12, temperature=0)
    plain, rounded = (
        Engine(hybrid, [], max_model_len=64, quantize=q).generate([[3, 1, 4, 1, 5]], params)[0] for q in (None, bits)
    )
    assert rounded.token_ids[0] == plain.token_ids[0] and rounded.logprobs != plain.logprobs
    assert abs(rounded.logprobs[0] - plain.logprobs[0]) < distance
    with pytest.raises(UserError, match="int3"):
        Engine(hybrid, quantize="int3")


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_an_interrupted_step_leaves_nothing_behind(model, monkeypatch, part):
    """A state that was planned and not computed was taken for a later prompt's that began in the same way."""
    engine = Engine(model, [], max_model_len=64, prefill_chunk=8, prefix_cache=2)
    other = Request([9] * 5, GREEDY)
    engine.submit(other)
    for token in (1, 2):  # fills the prefix cache
        engine.generate([[token] * 20], replace(GREEDY, max_tokens=1))

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.executor.runner, part, interrupt)
        engine.generate([[3] * 20], GREEDY)
    assert other.done and not engine.busy and engine.free_slots == engine.num_slots
    prompts = [[3] * 20, [3] * 21, [1] * 20]
    again, fresh = (e.generate(prompts, GREEDY) for e in (engine, Engine(model, [], max_model_len=64)))
    assert [s.token_ids for s in again] == [s.token_ids for s in fresh]


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_loaded_weights_are_a_new_engines(model, quantize):
    """Into a model of its own, and of the model itself after training in place. Nothing of the old weights is left."""
    prompts, options = [[1, 2, 3], [1, 2, 3, 4, 5]], {"max_model_len": 64, "quantize": quantize}
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    old, new = (Engine(m, [], **options).generate(prompts, GREEDY) for m in (model, trained))
    assert [s.logprobs for s in old] != [s.logprobs for s in new]
    engine = Engine(copy.deepcopy(model), [], **options)
    engine.generate(prompts, GREEDY)
    engine.load_weights(trained)
    assert [s.logprobs for s in engine.generate(prompts, GREEDY)] == [s.logprobs for s in new]
    own = Engine(model, [], **options)
    own.generate(prompts, GREEDY)
    model.load_state_dict(trained.state_dict())
    own.load_weights(model)
    assert [s.logprobs for s in own.generate(prompts, GREEDY)] == [s.logprobs for s in new]
