"""A step's plan, on integers: scheduler.py makes it, executor.py carries it out. Also counters of all steps' work."""

from dataclasses import dataclass, field
from typing import NamedTuple

from m1.engine.sampling import SamplingParams


class Copy(NamedTuple):
    """Part of a `Plan`: copy a state from one slot to another. Full pages are shared and not copied.

    Attributes:
        source: the slot to read.
        target: the slot to fill.
        pages: the last page of the source, which isn't full, and the page that takes its copy; None if all are full.
    """

    source: int
    target: int
    pages: tuple[int, int] | None


class Chunk(NamedTuple):
    """Part of a `Plan`: prefill a prompt's next tokens, then keep the state in the prefix cache.

    Attributes:
        slot: the prompt's slot.
        start: number of prompt tokens that the slot has seen. The slot is cleared first when 0.
        tokens: the token ids to prefill.
        total: number of tokens in the prompt.
        keep: copies the state into the prefix cache; None to keep nothing.
        scored: the token ids that follow the first of `tokens`, the second and so on, if their log-probabilities are
            wanted.
        likeliest: number of likeliest tokens to score at each of them.
    """

    slot: int
    start: int
    tokens: list[int]
    total: int
    keep: Copy | None
    scored: tuple[int, ...] = ()
    likeliest: int = 0


class Fork(NamedTuple):
    """Part of a `Plan`: start a sequence from its prompt's state and draw its first token.

    Attributes:
        sequence: id of the sequence.
        copy: copies the prompt's slot to the sequence's. If they are equal, the sequence takes the prompt's slot over.
        prompt: the prompt's tokens.
        params: how to sample.
        stop: tokens after which the sequence ends.
        stream: the sequence's random stream, a seed from `fold_in`.
    """

    sequence: int
    copy: Copy
    prompt: list[int]
    params: SamplingParams
    stop: frozenset[int]
    stream: int


class Decode(NamedTuple):
    """Part of a `Plan`: decode one token of each of b sequences.

    Attributes:
        sequences: ids of the sequences.
        slots: their slots.
    """

    sequences: list[int]
    slots: list[int]


class Swap(NamedTuple):
    """Part of a `Plan`: move a sequence's state and pages out of the slots, or back into them.

    Attributes:
        sequence: id of the sequence.
        slot: its slot.
        pages: its pages.
    """

    sequence: int
    slot: int
    pages: list[int]


class Placed(NamedTuple):
    """Part of a `Plan`: a new page of a slot.

    Attributes:
        slot: the slot.
        place: the page's place among those of the slot.
        page: the page.
    """

    slot: int
    place: int
    page: int


@dataclass
class Plan:
    """The work of one step, decided by the `Scheduler` and executed by the `Executor` in the order of the fields.

    Attributes:
        drop: ids of swapped-out sequences that have ended.
        swap_out: sequences to save, whose slots and pages others take.
        place: new pages of slots.
        swap_in: saved sequences to bring back.
        restore: states to copy from the prefix cache, which earlier plans have filled.
        prefill: chunks of prompts to run. Chunks of one prompt are in order.
        fork: sequences to start. Each draws its first token.
        decode: sequences to decode. Each draws its next token.
    """

    drop: list[int] = field(default_factory=list)
    swap_out: list[Swap] = field(default_factory=list)
    place: list[Placed] = field(default_factory=list)
    swap_in: list[Swap] = field(default_factory=list)
    restore: list[Copy] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    fork: list[Fork] = field(default_factory=list)
    decode: Decode = field(default_factory=lambda: Decode([], []))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to execute."""
        return self == Plan()


@dataclass
class Stats:
    """Counters of an engine's work since it was made.

    Attributes:
        steps: decode steps.
        decoded: tokens drawn.
        prefilled: prompt tokens computed.
        prefix_queries: prompt tokens looked for in the prefix cache.
        prefix_hits: prompt tokens found in the prefix cache.
        forks: sequences that started with a copy of their prompt's slot.
        swaps: times that a sequence was swapped out for want of pages.
    """

    steps: int = 0
    decoded: int = 0
    prefilled: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    forks: int = 0
    swaps: int = 0
