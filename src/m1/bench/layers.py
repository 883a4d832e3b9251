"""Decode steps visit all layers of a model: a layer's states have left the caches when their turn comes again.

So a timed call visits several layers, each with tensors of its own, that together don't fit into the caches.
"""

import math
from collections.abc import Callable

import torch

from m1.bench.contest import Contender, Results, Work, nbytes
from m1.bench.peers import Inputs, Step
from m1.bench.roofline import beyond_caches

MOST_LAYERS = 64  # few models have more; what of so many fits into the caches does so in decoding, too


def make_layers(make: Callable[[torch.Generator], Inputs], device: torch.device) -> list[Inputs]:
    """Layers, each made with fresh random numbers."""
    generator = torch.Generator(device).manual_seed(0)
    first = make(generator)
    count = min(MOST_LAYERS, math.ceil(beyond_caches(device) / nbytes(*first.values())))
    return [first, *(make(generator) for _ in range(count - 1))]


def visiting(
    layers: list[Inputs], name: str, start: Callable[[Inputs], Step], work: Work, expected: Results
) -> Contender:
    """A call is one step of each layer; its result is the first layer's."""
    first, *others = [start(layer) for layer in layers]

    def run() -> Results:
        result = first()
        for step in others:
            step()
        return result

    # The reference asks tensors for their values, which a CUDA graph can't.
    return Contender(name, run, work, expected, capturable=name != "reference")
