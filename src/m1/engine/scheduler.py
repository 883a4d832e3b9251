"""Who has a slot. Requests are admitted as they came; a prompt is prefilled once and forked for its samples."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from m1.engine.runner import Runner
from m1.engine.sequence import Request, Running
from m1.engine.state import Slots, Snapshot


@dataclass
class Stats:
    """What the engine has done so far."""

    steps: int = 0  # decode steps
    decoded: int = 0  # tokens sampled
    prefilled: int = 0  # prompt tokens computed
    restored: int = 0  # prompt tokens that a snapshot spared
    forks: int = 0


class Scheduler:
    """Waiting and running samples.

    Args:
        chunk: prompt tokens prefilled between two decode steps at most, and the tokens of one forward.
        snapshots: prompts and prompt beginnings (at multiples of `chunk`) whose states are kept for the next that
            begins so. They are used only where a fresh prefill would have passed through the same state.
    """

    def __init__(self, runner: Runner, slots: Slots, chunk: int, snapshots: int):
        self.runner, self.slots, self.chunk = runner, slots, chunk
        self.kept: OrderedDict[tuple[int, ...], tuple[Snapshot, Tensor]] = OrderedDict()
        self.max_kept = snapshots
        self.waiting: deque[Request] = deque()
        self.running: list[Running] = []
        self.stats = Stats()

    def admit(self) -> Iterator[Running]:
        """Samples that have a slot now and no token yet; prefills up to `chunk` tokens for them."""
        budget = self.chunk
        while self.waiting:
            request = self.waiting[0]
            if request.slot is None:
                if not self.slots.free:
                    return
                self._open(request)
            while request.seen < len(request.tokens):
                if budget <= 0:
                    return
                budget -= self._prefill_chunk(request)
            while request.started < len(request.completions):
                slot = self._slot_for_sample(request)
                if slot is None:
                    break
                self.running.append(Running.start(request, slot))
                yield self.running[-1]
            if request.started < len(request.completions):
                if request.slot is not None:  # the prompt waits in its slot until others leave theirs
                    return
            else:
                self.waiting.popleft()

    def _slot_for_sample(self, request: Request) -> int | None:
        """The prompt's own slot for the last sample, a fork for the others; None if that has to wait."""
        slot = request.slot
        if slot is None:
            return None
        last = request.started + 1 == len(request.completions)
        if not last and self.slots.free:
            self.stats.forks += 1
            return self.slots.fork(slot, request.seen)
        if (
            last or not self.running
        ):  # nobody will leave a slot: this sample takes the prompt's, the next prefills again
            request.slot, request.seen = None, request.seen if last else 0
            return slot
        return None

    def _open(self, request: Request) -> None:
        """A slot for the prompt, as far along as a snapshot goes."""
        request.slot, request.seen = self.slots.take(), 0
        size = len(request.tokens)
        for length in [size, *range((size - 1) // self.chunk * self.chunk, 0, -self.chunk)]:
            key = tuple(request.tokens[:length])
            if key in self.kept:
                snapshot, request.logits = self.kept[key]
                self.kept.move_to_end(key)
                self.slots.restore(request.slot, length, snapshot)
                self.stats.restored += length
                request.seen = length
                return

    def _prefill_chunk(self, request: Request) -> int:
        """Sees the prompt's next tokens, up to a multiple of `chunk` whatever else is going on; says how many."""
        assert request.slot is not None
        tokens = torch.tensor(request.tokens[request.seen : request.seen + self.chunk], device=self.runner.device)
        request.logits = self.runner.prefill(tokens, request.slot, request.seen)
        request.seen += len(tokens)
        self.stats.prefilled += len(tokens)
        if self.max_kept:
            saved = self.slots.snapshot(request.slot, request.seen), request.logits
            self.kept[tuple(request.tokens[: request.seen])] = saved
            if len(self.kept) > self.max_kept:
                self.kept.popitem(last=False)
        return len(tokens)

    def leave(self, samples: list[Running]) -> None:
        """Their slots are free again."""
        for sample in samples:
            self.running.remove(sample)
            self.slots.give_back(sample.slot)

    def drop(self, request: Request) -> None:
        """Forgets a request, waiting or running."""
        if request in self.waiting:
            self.waiting.remove(request)
            if request.slot is not None:
                self.slots.give_back(request.slot)
                request.slot = None
        self.leave([sample for sample in self.running if sample.request is request])
