"""Makes a timed call visit several layers, as a decode step does, so that their tensors come from memory.

In a model, a layer's states have left the processor's caches before the layer's next turn. So each layer has tensors of
its own here, and all of them together don't fit into the caches.
"""

import math
from collections.abc import Callable

import torch

from m1.bench.contest import Contender, Results, Work, nbytes
from m1.bench.layer_inputs import Inputs
from m1.bench.peers import Step
from m1.bench.roofline import beyond_caches

MOST_LAYERS = 64  # few models have more: tensors that stay in the caches then also do so in decoding


def make_layers(make: Callable[[torch.Generator], Inputs], device: torch.device) -> list[Inputs]:
    """Makes enough layers to exceed the caches, each with fresh random numbers."""
    generator = torch.Generator(device).manual_seed(0)
    first = make(generator)
    count = min(MOST_LAYERS, math.ceil(beyond_caches(device) / nbytes(*first.values())))
    return [first, *(make(generator) for _ in range(count - 1))]


def visiting(
    layers: list[Inputs], name: str, start: Callable[[Inputs], Step], work: Work, expected: Results
) -> Contender:
    """A contender whose call runs one step of each layer. Its result is the first layer's."""
    first, *others = [start(layer) for layer in layers]

    def run() -> Results:
        result = first()
        for step in others:
            step()
        return result

    # The reference reads tensors' values in Python, which a CUDA graph can't capture.
    return Contender(name, run, work, expected, capturable=name != "reference")
