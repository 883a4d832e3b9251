"""Steps under CUDA graphs: one launch per step instead of one per kernel.

A graph is captured when its batch size is first needed, for each of a few sizes. Other batches are padded to the next
size with the spare slot. Their results are dropped.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
WARMUPS = 2  # runs before a capture, which compile kernels and allocate memory

Step = Callable[[Tensor], tuple[Tensor, ...]]


class Graph(NamedTuple):
    """A step captured for one batch size.

    Attributes:
        slots: [size], the input that the graph reads.
        replay: runs the step and returns its results [size, ...].
    """

    slots: Tensor
    replay: Callable[[], tuple[Tensor, ...]]


class Graphs:
    """Runs a step under CUDA graphs. On a CPU, which has no graphs, it pads batches and runs the step directly.

    Args:
        step: takes the slots [b] int64 and returns tensors [b, ...]. It must not wait for the device.
        spare: the slot that pads a batch. A step must leave it as it was.
        device: of the slots.

    Attributes:
        captured: the graphs by batch size.
    """

    def __init__(self, step: Step, spare: int, device: torch.device):
        self.step, self.spare, self.device = step, spare, device
        self.captured: dict[int, Graph] = {}
        self._filled: tuple[Tensor, Tensor] | None = None  # the slots that a graph's input was last filled with
        self._pool: Any = None  # memory that all graphs share, since they run one after another

    def __call__(self, slots: Tensor) -> tuple[Tensor, ...]:
        """Runs the step on slots [b]. The results [b, ...] are overwritten by the next call."""
        count = len(slots)
        size = SIZES[bisect_left(SIZES, count)] if count <= SIZES[-1] else count
        graph = self.captured.get(size) or self._capture(size)
        if self._filled is None or self._filled[0] is not slots or self._filled[1] is not graph.slots:
            graph.slots[count:] = self.spare
            graph.slots[:count] = slots
            self._filled = slots, graph.slots
        return tuple(result[:count] for result in graph.replay())

    def _capture(self, size: int) -> Graph:
        slots = torch.full((size,), self.spare, device=self.device)
        graph = Graph(slots, lambda: self.step(slots))
        if self.device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    self.step(slots)
            torch.cuda.current_stream().wait_stream(stream)
            cuda_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(cuda_graph, pool=self._pool):
                results = self.step(slots)
            self._pool = self._pool or cuda_graph.pool()

            def replay() -> tuple[Tensor, ...]:
                cuda_graph.replay()
                return results

            graph = Graph(slots, replay)
        self.captured[size] = graph
        return graph
