"""`m1 bench state`: one decode step of a Mamba layer for many sequences."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from m1.bench.contest import Work, begin, contest, nbytes
from m1.bench.layer_inputs import TAPS, Inputs, mamba_inputs
from m1.bench.layers import make_layers, visiting
from m1.bench.options import STATE, StateOptions
from m1.bench.peers import Step, mamba2_step, mamba_libraries, mamba_step
from m1.ops import ssd_update, state_update
from m1.ops.backend import Backend


def run(options: StateOptions) -> dict[str, Any]:
    """Measures all backends and peers. Returns the result that is printed and written."""
    limits, result = begin(options)
    libraries, result["skipped"] = mamba_libraries(options.device)
    make, start_peer = (mamba_layer, mamba_step) if options.mixer == "mamba" else (mamba2_layer, mamba2_step)
    layers = make_layers(partial(make, options), torch.device(options.device))
    starts = {str(backend): partial(start_own, backend=backend) for backend in options.chosen_backends()}
    starts |= {library.name: partial(start_peer, library) for library in libraries}
    expected = start_own(layers[0], "reference")()
    work = least_work(options, layers, expected["y"])
    contenders = [visiting(layers, name, start, work, expected) for name, start in starts.items()]
    return result | {"layers": len(layers), "rows": contest(contenders, limits, options)}


def least_work(options: StateOptions, layers: list[Inputs], y: Tensor) -> Work:
    """The minimum work of one step. It reads all tensors, and writes the states and y.

    A state needs five operations in Mamba-2: decay, dt x B, addition, C h, addition. Mamba-1 needs two more, dt A and
    exp, because each state has its own decay. A tap of the convolution is one multiply-add.
    """
    layer = layers[0]
    written = nbytes(layer["conv_state"], layer["ssm_state"], y)
    operations = (7 if options.mixer == "mamba" else 5) * layer["ssm_state"][: options.slots].numel()
    operations += 2 * options.slots * layer["conv_weight"].numel()
    return Work(nbytes(*layer.values()) + written, operations, options.slots, len(layers))


def mamba_layer(options: StateOptions, generator: torch.Generator) -> Inputs:
    """Random arguments of `state_update`."""
    slots, inner, kv, dtype = options.slots, options.inner, options.kv, options.torch_dtype
    normal = partial(torch.randn, generator=generator, device=generator.device)
    return mamba_inputs(generator, (slots,), inner, kv, STATE, dtype) | {
        "conv_state": normal(slots, kv, TAPS - 1, dtype=dtype),
        "ssm_state": normal(slots, inner, STATE),
        "slots": torch.arange(slots, device=generator.device),
    }


def mamba2_layer(options: StateOptions, generator: torch.Generator) -> Inputs:
    """Random arguments of `ssd_update`."""
    slots, heads = options.slots, options.inner // options.head_dim
    device, dtype = generator.device, options.torch_dtype
    channels = 2 * options.kv + options.inner
    normal = partial(torch.randn, generator=generator, device=device)
    return {
        "xBC": normal(slots, channels, dtype=dtype),
        "dt": normal(slots, heads, dtype=dtype) - 3,
        "A": -torch.linspace(1.0, 16.0, heads, device=device),
        "D": torch.ones(heads, device=device),
        "conv_weight": normal(channels, TAPS),
        "conv_bias": normal(channels),
        "conv_state": normal(slots, channels, TAPS - 1, dtype=dtype),
        "ssm_state": normal(slots, heads, options.head_dim, options.head_dim),
        "slots": torch.arange(slots, device=device),
    }


def start_own(layer: Inputs, backend: Backend) -> Step:
    """This package's step with one backend, on copies of the states."""
    own = dict(layer) | {name: layer[name].clone() for name in ("conv_state", "ssm_state")}
    update = state_update if "z" in layer else ssd_update
    return lambda: {"y": update(**own, backend=backend), "ssm_state": own["ssm_state"]}
