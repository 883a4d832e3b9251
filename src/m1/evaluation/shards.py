"""Shares of an evaluation's problems, so that several machines can take one each."""

import re
from dataclasses import dataclass

from m1.errors import UserError


@dataclass(frozen=True)
class Shard:
    """One of `count` shares of the problems: every count-th, from number `index` on. Both are written as "1/4".

    Attributes:
        index: from 1.
        count: number of shares.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, number: int) -> bool:
        """Whether a problem is in it, by its number from 0."""
        return number % self.count == self.index - 1


WHOLE = Shard(1, 1)


def read_shard(text: str) -> Shard:
    """Parses a text such as "1/4". Raises UserError if it is none."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    shard = Shard(*map(int, found.groups())) if found else Shard(0, 0)
    if not 1 <= shard.index <= shard.count:
        raise UserError(f"shard {text[:40]!r}: give its number and how many there are, from 1/4 to 4/4")
    return shard
