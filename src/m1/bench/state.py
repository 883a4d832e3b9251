"""`m1 bench state`: one decode step of a Mamba layer for many sequences."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m1.bench.contest import Work, begin, contest, nbytes
from m1.bench.layers import make_layers, visiting
from m1.bench.options import DTYPES, Options
from m1.bench.peers import Inputs, Step, mamba2_step, mamba_libraries, mamba_step
from m1.ops import ssd_update, state_update
from m1.ops.backend import Backend

STATE = 16  # numbers a channel of Mamba-1; a Mamba-2 head has head_dim x head_dim
TAPS = 4


@dataclass(frozen=True, kw_only=True)
class StateOptions(Options):
    """`slots` sequences, `inner` channels D, `kv` channels X of x and B, `head_dim` of Mamba-2's heads."""

    name = "state"

    mixer: str
    slots: int
    inner: int
    kv: int
    head_dim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.mixer in ("mamba", "mamba2"), "mixer", "choose mamba or mamba2")
        self.require(self.inner % self.kv == 0, "kv", f"must divide --inner {self.inner}")
        if self.mixer == "mamba":
            self.require(self.kv % STATE == 0, "kv", f"must be a multiple of {STATE}, the states a channel")
        else:
            self.require(self.kv % self.head_dim == 0, "head_dim", f"must divide --kv {self.kv}")
            self.require_for_kernels(self.head_dim % 16 == 0, "head_dim", "must be a multiple of 16")


def run(options: StateOptions) -> dict[str, Any]:
    """Measures; returns what is printed and written."""
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
    """All tensors are read, states and y written. Operations: multiply by the decay, dt x B and C, and add, a state's
    number (Mamba-1 has a decay each: dt A and its exp too); a tap of a convolution is one multiply-add.
    """
    layer = layers[0]
    written = nbytes(layer["conv_state"], layer["ssm_state"], y)
    operations = (7 if options.mixer == "mamba" else 5) * layer["ssm_state"][: options.slots].numel()
    operations += 2 * options.slots * layer["conv_weight"].numel()
    return Work(nbytes(*layer.values()) + written, operations, options.slots, len(layers))


def mamba_layer(options: StateOptions, generator: torch.Generator) -> Inputs:
    """The arguments of `state_update`: random, but every group has the same B and C."""
    slots, inner, kv, device, dtype = options.slots, options.inner, options.kv, generator.device, DTYPES[options.dtype]
    normal = partial(torch.randn, generator=generator, device=device)
    return {
        "z": normal(slots, inner, dtype=dtype),
        "x": normal(slots, kv, dtype=dtype),
        "B": normal(slots, STATE, dtype=dtype).repeat(1, kv // STATE),
        "C": normal(slots, STATE, dtype=dtype).repeat(1, inner // STATE),
        "dt": normal(slots, inner, dtype=dtype) - 3,  # steps around 0.05 after softplus
        "A": -torch.arange(1.0, STATE + 1, device=device).repeat(inner, 1),
        "D": torch.ones(inner, device=device),
        "conv_weight": normal(inner, TAPS),
        "conv_bias": normal(inner),
        "conv_state": normal(slots, kv, TAPS - 1, dtype=dtype),
        "ssm_state": normal(slots, inner, STATE),
        "slots": torch.arange(slots, device=device),
    }


def mamba2_layer(options: StateOptions, generator: torch.Generator) -> Inputs:
    """The arguments of `ssd_update`, random."""
    slots, heads = options.slots, options.inner // options.head_dim
    device, dtype = generator.device, DTYPES[options.dtype]
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
    """Our step, on copies of the states."""
    own = dict(layer) | {name: layer[name].clone() for name in ("conv_state", "ssm_state")}
    update = state_update if "z" in layer else ssd_update
    return lambda: {"y": update(**own, backend=backend), "ssm_state": own["ssm_state"]}
