"""Self-consistency: the answer most samples agree on."""

from collections.abc import Sequence
from dataclasses import dataclass

from m1.reasoning.answers import Grader


@dataclass(frozen=True)
class Vote:
    """A tally: `counts` maps each cluster's answer to its votes, the winner first."""

    counts: dict[str, int]
    abstained: int

    @property
    def answer(self) -> str | None:
        """The winner; None where no sample gave an answer."""
        return next(iter(self.counts), None)

    def decided(self, remaining: int) -> bool:
        """Whether no `remaining` further votes, however they fall, can change the winner."""
        votes = [*self.counts.values(), 0, 0]
        return votes[0] - votes[1] > remaining


def vote(answers: Sequence[str | None], grader: Grader) -> Vote:
    """Majority over clusters of equal answers.

    Ties go to the shorter, then the alphabetically first answer: never to whichever sample came first.
    """
    clusters = grader.cluster(answers)
    order = sorted(clusters, key=lambda answer: (-len(clusters[answer]), len(answer), answer))
    counts = {answer: len(clusters[answer]) for answer in order}
    return Vote(counts, abstained=len(answers) - sum(counts.values()))
