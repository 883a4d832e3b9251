"""Decoding under CUDA graphs: a step is launched at once, not kernel by kernel.

A graph is captured for each of a few batch sizes, when first needed. Smaller batches are padded with rows of the spare
slot, whose logits are dropped.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from m1.engine.runner import DecodeBatch, Runner
from m1.engine.state import Slots

SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
WARMUPS = 2  # runs before a capture: they compile kernels and allocate


@dataclass
class Graph:
    """A captured step: the rows it reads, what runs it and returns their logits, and the rows that were filled last."""

    rows: DecodeBatch
    replay: Callable[[], Tensor]
    filled: tuple[Tensor, ...] = ()


class GraphRunner(Runner):
    """A Runner whose decode steps are graphs. On a CPU, where there are none, it pads and runs the same way."""

    def __init__(self, model: PreTrainedModel, slots: Slots, int8: bool = False):
        super().__init__(model, slots, int8)
        self.graphs: dict[int, Graph] = {}
        self.idle = (0, slots.spare, 0)  # a row that decodes a first token in the spare slot

    def decode(self, rows: DecodeBatch) -> Tensor:
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
