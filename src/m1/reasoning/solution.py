"""What came out of solving one problem."""

from dataclasses import asdict, dataclass, field
from typing import Any

from m1.engine import Sequence
from m1.reasoning.voting import Vote


@dataclass
class Sample:
    """One that ended by itself: the number and the mean log-probability of its tokens, the second since the start in
    which it ended, and its vote's weight."""

    text: str
    answer: str | None
    tokens: int
    logprob: float
    finish_reason: str
    seconds: float
    weight: float = 0.0


@dataclass
class Solution:
    """The vote, the samples behind it in the order they ended, and what they cost. It grows while it is being found.

    Attributes:
        sequences: of all samples that were begun or queued, aborted ones too.
        seconds: of wall-clock time since the start, with grading and weighing.
        reason: why it stopped: "all" (n samples ended), "decided", "confident" or "seconds"; None until then.
    """

    vote: Vote = field(default_factory=lambda: Vote({}, {}))
    samples: list[Sample] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    reason: str | None = None

    @property
    def answer(self) -> str | None:
        return self.vote.answer

    @property
    def tokens(self) -> int:
        """Generated, those of aborted samples too."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def aborted(self) -> int:
        """Samples without an end of their own; until it stopped, those still open."""
        return len(self.sequences) - len(self.samples)

    def as_json(self) -> dict[str, Any]:
        tally = [
            {"answer": answer, "votes": votes, "weight": self.vote.weights[answer]}
            for answer, votes in self.vote.counts.items()
        ]
        spent = {"seconds": self.seconds, "tokens": self.tokens, "finished": len(self.samples), "aborted": self.aborted}
        votes = {"tally": tally, "abstained": self.vote.abstained}
        samples = [asdict(sample) for sample in self.samples]
        return {"answer": self.answer, "reason": self.reason, **spent, **votes, "samples": samples}
