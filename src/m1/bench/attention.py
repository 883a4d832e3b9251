"""`m1 bench attention`: one decode step of an attention layer for many sequences with long contexts."""

from functools import partial
from typing import Any

import torch

from m1.bench.contest import Work, begin, contest, nbytes
from m1.bench.layer_inputs import Inputs
from m1.bench.layers import make_layers, visiting
from m1.bench.options import AttentionOptions
from m1.bench.peers import Step, attention_peers
from m1.ops import decode_attention
from m1.ops.backend import Backend


def run(options: AttentionOptions) -> dict[str, Any]:
    """Measures all backends and peers. Returns the result that is printed and written."""
    limits, result = begin(options)
    peers, result["skipped"] = attention_peers(options.device, options.dtype)
    layers = make_layers(partial(make_layer, options), torch.device(options.device))
    starts = {str(backend): partial(start_own, backend=backend) for backend in options.chosen_backends()} | peers
    expected = start_own(layers[0], "reference")()

    # Keys, values and queries are read, y is written. Each number of a key or value costs each query a multiply-add.
    moved, operations = nbytes(*layers[0].values(), expected["y"]), 4 * layers[0]["q"].numel() * options.keys
    work = Work(moved, operations, options.batch, len(layers))
    contenders = [visiting(layers, name, start, work, expected) for name, start in starts.items()]
    return result | {"layers": len(layers), "rows": contest(contenders, limits, options)}


def make_layer(options: AttentionOptions, generator: torch.Generator) -> Inputs:
    """Random arguments of `decode_attention`, with full caches of one page per sequence."""
    device = generator.device
    normal = partial(torch.randn, generator=generator, dtype=options.torch_dtype, device=device)
    cache = (options.batch, options.kv_heads, options.keys, options.head_dim)
    return {
        "q": normal(options.batch, options.kv_heads * options.group, options.head_dim),
        "k_cache": normal(*cache),
        "v_cache": normal(*cache),
        "lengths": torch.full((options.batch,), options.keys, device=device),
        "page_table": torch.arange(options.batch, dtype=torch.int32, device=device)[:, None],
    }


def start_own(layer: Inputs, backend: Backend) -> Step:
    """This package's decode step with one backend."""
    q, keys, values, lengths, page_table = layer.values()
    return lambda: {"y": decode_attention(q, keys, values, lengths, page_table, backend=backend)}
