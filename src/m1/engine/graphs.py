"""Decoding under CUDA graphs: one launch per step instead of one per kernel.

A graph is captured when its batch size is first needed, for each of a few sizes. Other batches are padded to the next
size with rows of the spare slot. The logits of these rows are dropped.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from m1.engine.runner import DecodeBatch, Runner
from m1.engine.slots import Slots

SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
WARMUPS = 2  # runs before a capture, which compile kernels and allocate memory


@dataclass
class Graph:
    """A decode step captured for one batch size.

    Attributes:
        rows: the input tensors that the graph reads, each [size].
        replay: runs the step and returns its logits [size, V].
        filled: views of `rows` that the last batch filled; the other rows are padding.
    """

    rows: DecodeBatch
    replay: Callable[[], Tensor]
    filled: tuple[Tensor, ...] = ()


class GraphRunner(Runner):
    """A `Runner` that decodes under CUDA graphs.

    Takes the arguments of `Runner`. On a CPU, which has no graphs, it pads batches and runs the steps directly.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots, int8: bool = False):
        super().__init__(model, slots, int8)
        self.graphs: dict[int, Graph] = {}
        self.idle = (0, slots.spare, 0)  # a padding row: token 0 at position 0 of the spare slot

    def decode(self, rows: DecodeBatch) -> Tensor:
        """Runs one decode step, padded to a captured batch size. Returns the logits [b, V]."""
        count = len(rows.tokens)
        size = SIZES[bisect_left(SIZES, count)] if count <= SIZES[-1] else count
        if size not in self.graphs:
            self.graphs[size] = self._capture(size)
        graph = self.graphs[size]
        if not graph.filled or len(graph.filled[0]) != count:  # the batch has changed
            for own, idle in zip(graph.rows, self.idle, strict=True):
                own[count:] = idle
            graph.filled = tuple(own[:count] for own in graph.rows)
        torch._foreach_copy_(graph.filled, rows)  # one launch
        return graph.replay()[:count]

    def _capture(self, size: int) -> Graph:
        rows = DecodeBatch(*(torch.full((size,), value, device=self.device) for value in self.idle))
        run = partial(super().decode, rows)
        if self.device.type != "cuda":
            return Graph(rows, run)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cuda_graph):
            logits = run()

        def replay() -> Tensor:
            cuda_graph.replay()
            return logits

        return Graph(rows, replay)
