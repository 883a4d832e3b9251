"""`m1 bench attention`: one decode step of an attention layer for many sequences with long contexts."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from m1.bench.contest import Work, begin, contest, nbytes
from m1.bench.layers import make_layers, visiting
from m1.bench.options import DTYPES, Options
from m1.bench.peers import Inputs, Step, attention_peers
from m1.ops import decode_attention
from m1.ops.backend import Backend


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(Options):
    """`batch` sequences with `keys` keys each in `kv_heads` heads of `head_dim`, each read by `group` query heads."""

    name = "attention"

    batch: int
    kv_heads: int
    group: int
    keys: int
    head_dim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_for_kernels(self.head_dim % 16 == 0, "head_dim", "must be a multiple of 16")


def run(options: AttentionOptions) -> dict[str, Any]:
    """Measures; returns what is printed and written."""
    limits, result = begin(options)
    peers, result["skipped"] = attention_peers(options.device, options.dtype)
    layers = make_layers(partial(make_layer, options), torch.device(options.device))
    starts = {str(backend): partial(start_own, backend=backend) for backend in options.chosen_backends()} | peers
    expected = start_own(layers[0], "reference")()

    # Keys, values and queries are read, y is written; a number of a key costs a multiply-add, and so does a value's.
    moved, operations = nbytes(*layers[0].values(), expected["y"]), 4 * layers[0]["q"].numel() * options.keys
    work = Work(moved, operations, options.batch, len(layers))
    contenders = [visiting(layers, name, start, work, expected) for name, start in starts.items()]
    return result | {"layers": len(layers), "rows": contest(contenders, limits, options)}


def make_layer(options: AttentionOptions, generator: torch.Generator) -> Inputs:
    """The arguments of `decode_attention`, random, all caches full."""
    dtype, device = DTYPES[options.dtype], generator.device
    normal = partial(torch.randn, generator=generator, dtype=dtype, device=device)
    cache = (options.batch, options.kv_heads, options.keys, options.head_dim)
    return {
        "q": normal(options.batch, options.kv_heads * options.group, options.head_dim),
        "k_cache": normal(*cache),
        "v_cache": normal(*cache),
        "lengths": torch.full((options.batch,), options.keys, device=device),
    }


def start_own(layer: Inputs, backend: Backend) -> Step:
    q, keys, values, lengths = layer.values()
    return lambda: {"y": decode_attention(q, keys, values, lengths, backend=backend)}
