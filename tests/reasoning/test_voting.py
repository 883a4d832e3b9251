"""Invariant 8's first half: votes don't depend on the samples' order; early stopping never changes the winner."""

from hypothesis import given, settings
from hypothesis import strategies as st

from m1.engine import Completion, SamplingParams
from m1.model.tokenizer import byte_tokenizer
from m1.reasoning.answers import Grader
from m1.reasoning.solve import solve
from m1.reasoning.voting import Vote, vote

SAMPLES = st.lists(st.sampled_from(["1", "01", "2", "3", None]), max_size=12)
GRADER = Grader()
GRADER.start = lambda: None  # these answers are all decided without a worker


@given(SAMPLES, st.randoms())
def test_order_does_not_matter(samples, rng):
    shuffled = samples.copy()
    rng.shuffle(shuffled)
    assert vote(samples, GRADER) == vote(shuffled, GRADER)


@given(SAMPLES, SAMPLES)
def test_decided_is_final(seen, rest):
    early = vote(seen, GRADER)
    if early.decided(remaining=len(rest)):
        assert vote(seen + rest, GRADER).answer == early.answer


def test_by_hand():
    assert vote(["2", "7", None, "07", "2", "7"], GRADER) == Vote({"7": 3, "2": 2}, abstained=1)
    assert vote(["9", "12", "9", "12"], GRADER).answer == "9"  # a tie goes to the shorter answer
    assert vote([None], GRADER).answer is None
    assert Vote({"7": 3, "2": 1}, 0).decided(1) and not Vote({"7": 3, "2": 1}, 0).decided(2)


class ScriptedEngine:
    """Finishes the given answers one a step; every step takes a second of the injected clock."""

    def __init__(self, answers, tokenizer):
        self.answers, self.tokenizer, self.now = answers, tokenizer, 0.0

    def generate(self, prompts, params, n, should_stop, on_finish):
        completions = [Completion(prompt=0) for _ in range(n)]
        for completion, answer in zip(completions, self.answers, strict=True):
            if should_stop():
                break
            self.now += 1
            completion.token_ids = self.tokenizer.encode(rf"\boxed{{{answer}}}")
            completion.finish_reason = "stop"
            on_finish(completion)
        return completions


def run(answers, **options):
    tokenizer = byte_tokenizer()
    engine = ScriptedEngine(answers, tokenizer)
    return solve("?", engine, tokenizer, GRADER, SamplingParams(), len(answers), clock=lambda: engine.now, **options)


@settings(max_examples=30)
@given(st.lists(st.sampled_from("123"), min_size=1, max_size=9))
def test_stopping_when_decided_is_lossless(answers):
    assert run(answers).vote.answer == run(answers, stop_when_decided=False).vote.answer


def test_stops_when_decided():
    solution = run(list("777737"))
    assert (solution.vote.answer, solution.reason, len(solution.answers)) == ("7", "decided", 4)


def test_budget_is_overrun_by_one_step_at_most():
    solution = run(list("123456789"), seconds=3.5)
    assert (solution.reason, solution.seconds, len(solution.answers)) == ("seconds", 4.0, 4)
