"""The result of solving one problem: the vote, its samples and what they cost."""

from dataclasses import asdict, dataclass, field
from typing import Any

from m1.engine import Sequence
from m1.reasoning.voting import Vote


@dataclass
class VotedSample:
    """A finished sample of `solve`, with its vote. Aborted samples have none.

    Attributes:
        text: the generated text.
        answer: the final answer; None if the text has none.
        tokens: number of generated tokens.
        logprob: mean log-probability of these tokens.
        finish_reason: why generation stopped, as in `Sequence`.
        seconds: time from the start of `solve` to the end of this sample.
        weight: the weight of its vote.
    """

    text: str
    answer: str | None
    tokens: int
    logprob: float
    finish_reason: str
    seconds: float
    weight: float = 0.0


@dataclass
class Solution:
    """The result of `solve`: the winning answer, the vote, its samples and their cost. It grows during sampling.

    Attributes:
        vote: the vote over all finished samples.
        samples: the finished samples, in the order in which they finished.
        sequences: all samples that an engine here started or queued, including aborted ones.
        seconds: wall-clock time since the start, including grading and weighing.
        reason: why sampling stopped: "all" (n samples finished), "decided", "confident" or "seconds". None before.
        asked: number of samples that servers were asked for.
    """

    vote: Vote = field(default_factory=lambda: Vote({}, {}))
    samples: list[VotedSample] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    reason: str | None = None
    asked: int = 0

    @property
    def answer(self) -> str | None:
        """The winner of the vote; None if no sample gave an answer."""
        return self.vote.answer

    @property
    def tokens(self) -> int:
        """Number of generated tokens, including those of aborted samples, except for servers'."""
        if self.asked:
            return sum(sample.tokens for sample in self.samples)
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def aborted(self) -> int:
        """Number of unfinished samples: aborted, or still open while sampling continues."""
        return len(self.sequences) + self.asked - len(self.samples)

    def as_json(self) -> dict[str, Any]:
        """The content of `m1 solve --json`."""
        tally = [
            {"answer": answer, "votes": votes, "weight": self.vote.weights[answer]}
            for answer, votes in self.vote.counts.items()
        ]
        spent = {"seconds": self.seconds, "tokens": self.tokens, "finished": len(self.samples), "aborted": self.aborted}
        votes = {"tally": tally, "abstained": self.vote.abstained}
        samples = [asdict(sample) for sample in self.samples]
        return {"answer": self.answer, "reason": self.reason, **spent, **votes, "samples": samples}
