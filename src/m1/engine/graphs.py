"""Decoding under CUDA graphs: a step is launched at once, not kernel by kernel.

A graph is captured for each of a few batch sizes, when first needed. Smaller batches are filled up with rows of the
spare slot, which is nobody's; their logits are dropped.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from m1.engine.runner import Runner
from m1.engine.state import Slots

SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
WARMUPS = 2  # runs before a capture: they compile kernels and allocate


@dataclass
class Graph:
    """A captured step and what it reads."""

    inputs: Tensor  # [3, size], as `Runner.decode`'s rows
    replay: Callable[[], Tensor]  # the logits


class GraphRunner(Runner):
    """A Runner whose decode steps are graphs. On a CPU, where there are none, it pads and runs the same way."""

    def __init__(self, model: PreTrainedModel, slots: Slots, int8: bool = False):
        super().__init__(model, slots, int8)
        self.graphs: dict[int, Graph] = {}

    def decode(self, rows: Tensor) -> Tensor:
        count = rows.shape[1]
        size = SIZES[bisect_left(SIZES, count)] if count <= SIZES[-1] else count
        if size not in self.graphs:
            self.graphs[size] = self._capture(size)
        graph = self.graphs[size]
        graph.inputs[:, :count] = rows
        if count < size:
            graph.inputs[:, count:] = self._idle(size - count)
        return graph.replay()[:count]

    def _idle(self, count: int) -> Tensor:
        """Inputs of rows that decode a first token in the spare slot."""
        inputs = torch.zeros(3, count, dtype=torch.long, device=self.device)
        inputs[1] = self.slots.spare
        return inputs

    def _capture(self, size: int) -> Graph:
        inputs = self._idle(size)
        run = partial(super().decode, inputs)
        if self.device.type != "cuda":
            return Graph(inputs, run)
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

        return Graph(inputs, replay)
