"""Shards a model over processes with FSDP2 (torch's `fully_shard`), one decoder layer at a time.

Each process keeps a part of every weight, of its gradient and of what the optimizer knows of it. A layer's weights are
gathered before its forward and backward passes and freed after them. The embedding, the last norm and the head are one
unit, which stays whole from the forward pass to the end of the backward pass: a tied head is one parameter, and a loss
may multiply with the head itself, as distillation does.

Weights are gathered in their own dtype, and gradients are averaged in it. Mixed precision is autocast's, as on one
device: rounding whole layers before they are gathered, as FSDP2's own policy does, would round A_log and D, too.
"""

from collections.abc import Iterator

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
def whole_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields a sharded model's weights by name, gathered one after another, a tied one once. All processes must."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, whole(tensor.detach())
