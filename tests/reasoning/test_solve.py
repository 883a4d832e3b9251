"""Invariant 8: early stopping is lossless, a budget is overrun by one step at most, and nothing runs on after it."""

import itertools
import json
import math
from collections import deque

import pytest
from checkpoints import scramble
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.engine import LLM, Engine, SamplingParams
from m1.errors import UserError
from m1.grading import Grader
from m1.grading.reading import leaf
from m1.model import M1ForCausalLM
from m1.model.tokenizer import byte_tokenizer
from m1.reasoning.budget import Budget
from m1.reasoning.solve import solve
from m1.tasks.prompts import MATH_PROMPT, PLAIN

GRADER = Grader()
GRADER.start = lambda within: None  # the answers here are decided without a worker
TOKENIZER = byte_tokenizer()
RULES = ["none", "decided", "confident"]


class ScriptedEngine:
    """Stands in for Engine, and for the LLM around it: sample i gives answers[i] after lengths[i] steps, each of which
    takes one of `durations`.

    Answer None is a sample without one. The scripts start again when they end. A token has log-probability -cost[i].
    """

    run = Engine.run

    def __init__(self, answers, lengths=(1,), durations=(1.0,), costs=(0.0,), slots=3):
        scripts = zip(itertools.cycle(answers), itertools.cycle(lengths), itertools.cycle(costs), strict=False)
        self.scripts, self.durations, self.costs = scripts, itertools.cycle(durations), itertools.cycle(costs)
        self.num_slots, self.scheduler, self.waiting = slots, self, deque()
        self.running, self.waves, self.steps, self.now, self.last = [], [], 0, 0.0, 0.0

    def clock(self):
        return self.now

    def encode(self, prompt):
        assert prompt == [{"role": "user", "content": MATH_PROMPT.replace("{problem}", "?")}]
        return [1]

    def decode(self, token_ids):
        return TOKENIZER.decode(token_ids)

    def engine_for(self, prompts, max_tokens):
        return self

    @property
    def free_slots(self):
        return 0 if self.waiting else self.num_slots - len(self.running)

    def check(self, request):
        pass

    def _add(self, request):
        self.waves.append(request.params.n)
        self.waiting.extend((sequence, *next(self.scripts)) for sequence in request.sequences)

    def step(self):
        while self.waiting and len(self.running) < self.num_slots:
            self.running.append([0, *self.waiting.popleft()])
        self.last = next(self.durations)
        self.now, self.steps = self.now + self.last, self.steps + 1
        ended = []
        for sample in list(self.running):
            sample[0] += 1
            age, sequence, answer, length, cost = sample
            sequence.token_ids.append(97)
            sequence.logprobs.append(-cost)
            if age == length:
                sequence.token_ids[:] = TOKENIZER.encode("none" if answer is None else rf"\boxed{{{answer}}}")
                sequence.logprobs[:] = [-cost] * len(sequence.token_ids)
                sequence.finish_reason, sequence.done = "stop", True
                self.running.remove(sample)
                ended.append(sequence)
        return ended

    def abort(self, request):
        self.running = [sample for sample in self.running if sample[1].request is not request]
        self.waiting.clear()
        for sequence in request.sequences:
            sequence.done = True


def run(engine, n=None, seconds=None, rule="decided", **options):
    budget = Budget(n, seconds, rule)
    solution = solve("?", engine, GRADER, SamplingParams(), budget, clock=engine.clock, **options)
    assert not engine.running and not engine.waiting
    assert len(solution.samples) + solution.aborted == len(solution.sequences)
    return solution


def verifier(problem, texts):
    """Any scores will do, as long as a text's is always the same."""
    assert problem == "?"
    return [(sum(text.encode()) * 37 % 11) / 10 for text in texts]


verifier.bound = 1.0
ANSWERS = st.lists(st.sampled_from(["1", "2", "2", "3", None]), min_size=1, max_size=10)
LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=4)
COSTS = st.lists(st.floats(0, 3), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(ANSWERS, LENGTHS, COSTS, st.sampled_from(["uniform", "logprob", verifier]))
def test_stopping_when_decided_is_lossless(answers, lengths, costs, weights):
    early, full = (
        run(ScriptedEngine(answers, lengths, costs=costs), len(answers), rule=rule, weights=weights)
        for rule in ("decided", "none")
    )
    assert early.answer == full.answer
    assert full.reason == "all" and full.aborted == 0 and len(full.samples) == len(answers)
    assert early.reason in ("all", "decided") and (early.reason == "all") == (early.aborted == 0)


def test_stops_at_once_when_decided_or_confident():
    engine = ScriptedEngine("7777377777", slots=1)
    solution = run(engine, 10)
    assert (solution.answer, solution.reason, len(solution.samples), solution.aborted) == ("7", "decided", 7, 3)
    assert engine.steps == 7
    solution = run(ScriptedEngine("7777377777", slots=1), 10, rule="confident")
    assert (solution.answer, solution.reason, len(solution.samples), solution.aborted) == ("7", "confident", 4, 6)
    assert run(ScriptedEngine("7777377777", slots=1), 10, rule="none").reason == "all"


@settings(max_examples=60, deadline=None)
@given(
    ANSWERS,
    LENGTHS,
    st.lists(st.floats(0.1, 3), min_size=1, max_size=5),
    st.none() | st.integers(1, 12),
    st.floats(0.01, 10),
    st.sampled_from(RULES),
    st.sampled_from(["uniform", "logprob", verifier]),
)
def test_a_budget_is_overrun_by_one_step_at_most(answers, lengths, durations, n, seconds, rule, weights):
    engine = ScriptedEngine(answers, lengths, durations)
    solution = run(engine, n, seconds, rule, weights=weights)
    assert solution.seconds == engine.now <= seconds + engine.last  # below it, but for rounding
    assert solution.reason != "seconds" or solution.seconds >= seconds
    assert n is None or len(solution.sequences) == n


def test_as_many_as_fit_into_the_seconds():
    engine = ScriptedEngine("1", lengths=[2, 3, 2], slots=3)
    solution = run(engine, seconds=7.0)
    # slots are filled as they come free: behind steps 2 (two of them), 3, 4, ...
    assert engine.waves[:3] == [3, 2, 1] and solution.reason == "seconds" and engine.steps == 7
    assert (len(solution.samples), solution.aborted) == (8, 2)
    assert (
        solution.tokens == sum(len(s.token_ids) for s in solution.sequences) > sum(s.tokens for s in solution.samples)
    )


def test_samples_of_different_waves_are_different():
    streams = []
    engine = ScriptedEngine("1")
    add = engine._add
    engine._add = lambda request: streams.append((request.params.seed, request.indices)) or add(request)
    solution = run(engine, seconds=3.0)
    seed = streams[0][0]
    assert streams == [(seed, (0, 1, 2)), (seed, (3, 4, 5)), (seed, (6, 7, 8))] and len(solution.sequences) == 9


def test_a_thought_that_the_prompt_opened():
    """The template wrote <think>, so the text has only the end of it. A cut-off thought has no announced answer."""

    class Thinking(ScriptedEngine):
        def encode(self, prompt):
            return TOKENIZER.encode("?<think>\n")

    engine = Thinking(["7"])
    solution = run(engine, 1)
    assert solution.samples[0].text == r"<think>\boxed{7}" and solution.answer == "7"
    engine.decode = lambda ids: "?<think>" if TOKENIZER.decode(ids).startswith("?") else "the answer is 5. Wait"
    assert run(engine, 1).answer is None
    assert run(ScriptedEngine(["7"]), 1).samples[0].text == r"\boxed{7}"


def test_grading_is_on_the_clock():
    """An answer takes the worker 3 seconds, or as long as is left."""

    class Slow(Grader):
        def start(self, within):
            engine.now += 1

        def _ask_worker(self, answer, within):
            engine.now += max(0, min(3, within))
            return [leaf("1")] if within >= 3 else None

    x, y, z = r"\sqrt{2}", r"\sqrt{3}", r"\sqrt{5}"
    engine = ScriptedEngine([x, y, z], slots=1)
    budget = Budget(3, 9.5, "none")
    solution = solve("?", engine, Slow(), SamplingParams(), budget, clock=engine.clock)
    # the start, a step and x until 5, a step and y until 9, and z comes after half a second that is left
    assert (solution.seconds, solution.vote.counts, solution.reason) == (10.0, {x: 2, z: 1}, "all")


def test_a_verifier_is_on_the_clock_and_does_not_begin_too_late():
    def slow(problem, texts):
        engine.now += 2
        return [1.0] * len(texts)

    engine = ScriptedEngine("123", slots=1)
    solution = run(engine, 3, 3.5, "none", weights=slow)
    assert (solution.seconds, len(solution.samples), solution.reason) == (4.0, 2, "seconds")
    assert [sample.weight for sample in solution.samples] == [1.0, 0.0]


def test_weights():
    engine = ScriptedEngine(["1", "1", "2", None], costs=[2.0, 2.0, 0.1, 0.0])
    solution = run(engine, 4, rule="none", weights="logprob")
    assert solution.answer == "2"
    assert [s.weight for s in solution.samples] == pytest.approx([math.exp(-2)] * 2 + [math.exp(-0.1), 0.0])
    asked = []

    def likes_three(problem, texts):
        asked.extend(texts)
        return [0.9 if "3" in text else 0.2 for text in texts]

    solution = run(ScriptedEngine(["1", "3", None, "1"]), 4, rule="none", weights=likes_three)
    assert solution.answer == "3" and solution.vote.weights == {"3": 0.9, "1": 0.4}
    assert asked == [r"\boxed{1}", r"\boxed{3}", r"\boxed{1}"]  # what gave no answer isn't scored


@pytest.mark.parametrize(
    "scores, bound, words",
    [
        ([], None, "0 scores for 1 texts"),
        ([-0.5], None, "the score -0.5"),
        ([math.nan], None, "the score nan"),
        ([math.inf], None, "the score inf"),
        ([1.5], 1.0, "the score 1.5: a weight must be finite and from 0 to its bound 1.0"),
    ],
)
def test_impossible_scores(scores, bound, words):
    def broken(problem, texts):
        return scores

    if bound:
        broken.bound = bound
    engine = ScriptedEngine("1", slots=1)
    with pytest.raises(UserError, match=words):
        run(engine, 4, rule="none", weights=broken)
    assert not engine.running  # its siblings were aborted


def test_decided_refuses_weights_without_a_bound():
    engine = ScriptedEngine("1")
    with pytest.raises(UserError, match="attribute `bound`, or choose the rule none or confident"):
        run(engine, 4, weights=lambda problem, texts: [1.0] * len(texts))
    assert engine.steps == 0


def test_it_can_be_watched_and_saved():
    seen = []
    engine = ScriptedEngine(["1", None, "2"], lengths=[2], slots=1)

    def on_step(solution):
        seen.append((solution.seconds, len(solution.samples)))
        engine.now += 0.5  # drawing takes time, too

    watched = run(engine, 3, on_step=on_step)
    assert seen == [(1, 0), (2.5, 1), (4, 1), (5.5, 2), (7, 2), (8.5, 3)]
    saved = json.loads(json.dumps(watched.as_json()))
    assert saved["tally"] == [{"answer": a, "votes": 1, "weight": 1.0} for a in "12"]
    assert (saved["answer"], saved["abstained"], saved["finished"], saved["aborted"]) == ("1", 1, 3, 0)
    assert (saved["reason"], saved["seconds"], saved["samples"][1]["text"]) == ("all", 9.0, "none")


class TimedEngine(Engine):
    """The real one; its steps take the given seconds of a clock of its own."""

    def schedule(self, durations):
        self.durations, self.now, self.last = itertools.cycle(durations), 0.0, 0.0

    def step(self):
        self.last = next(self.durations)
        self.now += self.last
        return super().step()


@pytest.fixture(scope="module")
def real(hybrid_dir):
    """A tiny model's LLM of 3 slots; a tokenizer that reads one of three answers out of any tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.decode = lambda tokens, **options: rf"\boxed{{{sum(tokens) % 3}}}"
    model = scramble(M1ForCausalLM.from_pretrained(hybrid_dir).eval())
    stop = [token for token in range(model.config.vocab_size) if token % 5 == 0]  # so that lengths differ
    llm = LLM(model, tokenizer, stop, max_model_len=48)
    llm.engine = TimedEngine(model, stop, max_num_seqs=3, max_model_len=48)
    return llm


def solve_really(real, seed, budget, durations=(1.0,), weights="uniform"):
    engine = real.engine
    engine.schedule(durations)
    params = SamplingParams(max_tokens=6, seed=seed)
    solution = solve("1+1", real, GRADER, params, budget, weights, PLAIN, clock=lambda: engine.now)
    assert real.engine is engine and not engine.busy and engine.free_slots == engine.num_slots
    return solution


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    st.none() | st.integers(1, 7),
    st.floats(0.5, 12),
    st.lists(st.floats(0.3, 3), min_size=1, max_size=4),
    st.sampled_from(RULES),
)
def test_the_real_engine_never_overruns_by_more_than_one_step(real, seed, n, seconds, durations, rule):
    solution = solve_really(real, seed, Budget(n, seconds, rule), durations)
    assert solution.seconds < seconds + real.engine.last
    assert solution.reason != "seconds" or solution.seconds >= seconds


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from(["uniform", "logprob"]))
def test_the_real_engine_loses_nothing_when_decided(real, seed, n, weights):
    early, full = (solve_really(real, seed, Budget(n, rule=rule), weights=weights) for rule in ("decided", "none"))
    assert early.answer == full.answer and full.reason == "all"
    assert early.samples == full.samples[: len(early.samples)]  # the same samples, fewer of them
    assert (early.reason == "decided") == (early.aborted > 0)
