"""Shards a model over processes with FSDP2 (torch's `fully_shard`), one decoder layer at a time.

Each process keeps a part of every weight, of its gradient and of what the optimizer knows of it. A layer's weights are
gathered before its forward and backward passes and freed after them. The embedding, the last norm and the head are one
unit, which stays whole from the forward pass to the end of the backward pass: a tied head is one parameter, and a loss
may multiply with the head itself, as distillation does.

Weights are gathered in their own dtype, and gradients are averaged in it. Mixed precision is autocast's, as on one
device: rounding whole layers before they are gathered, as FSDP2's own policy does, would round A_log and D, too.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Shards a model in place over all processes of torch.distributed.

    Args:
        model: a causal LM of M1 or transformers, the same in each process.
        device: where this process keeps its part and computes.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` was called on this model."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its sharding. For a sharded one all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered_weights(model: PreTrainedModel, keep: bool) -> dict[str, Tensor]:
    """A sharded model's whole weights by name, on the CPU, gathered one after another. All processes must call this.

    Args:
        keep: whether this process wants them. The others get an empty dictionary.
    """
    kept: dict[int, Tensor] = {}  # by parameter: a tied one has two names
    names = model.state_dict(keep_vars=True)
    for tensor in names.values():
        if id(tensor) not in kept:
            full = whole(tensor.detach())
            kept[id(tensor)] = full.cpu() if keep else torch.empty(0)
    return {name: kept[id(tensor)] for name, tensor in names.items()} if keep else {}
