"""Training in several processes, which torchrun or `accelerate launch` starts: what they agree on, and what they store.

Rank 0 is the only one that writes, except for its part of a sharded checkpoint. A sharded checkpoint is a folder of
torch.distributed.checkpoint, with weights and optimizer by name, so that any number of processes can resume from it.
"""

import functools
import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from transformers import TrainingArguments

from m1.errors import UserError
from m1.model.checkpoint import reason
from m1.recipe import TrainedStage

SHARDS = "shards"  # the folder in a checkpoint
DESCRIPTIONS = {  # what a checkpoint's metadata is pickled from
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath"},
}  # fmt: skip
T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is rank 0, the process that writes."""
    return os.environ.get("RANK", "0") == "0"


def is_distributed() -> bool:
    """Whether several processes can exchange tensors."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@functools.cache
def _cpu_group() -> Any:
    """A group for numbers and objects on CPUs: a GPU's would wait for the GPU."""
    return dist.new_group(backend="gloo")


def from_first(make: Callable[[], T]) -> T:
    """What rank 0's `make` returns, in every process. Only rank 0 calls it. If it fails, all do."""
    if not is_distributed():
        return make()
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if is_first():
        try:
            answer[0] = make()
        except Exception as error:
            failure, answer[1] = error, str(error)
    dist.broadcast_object_list(answer, src=0, group=_cpu_group())
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All must call this. It doesn't wait for a GPU."""
    if not is_distributed():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=_cpu_group())
    return bool(flags)


def split_batch(global_batch: int, most: int, processes: int) -> tuple[int, int]:
    """Splits the rows of an optimizer step. Returns rows per pass of one process, and number of passes.

    Args:
        global_batch: rows per optimizer step, over all processes.
        most: maximum number of rows per pass.
        processes: how many there are.

    Raises:
        UserError: they can't have equal parts.
    """
    share, left = divmod(global_batch, processes)
    rows = min(most, share)
    if left or not share or share % rows:
        raise UserError(
            f"global_batch={global_batch} can't be split over {processes} processes in passes of {most} rows "
            "(per_device_train_batch_size): make it a multiple of both"
        )
    return rows, share // rows


def with_batch(cls: type[TrainingArguments], stage: TrainedStage) -> dict[str, Any]:
    """The stage's `[trainer]` table, with what makes its `global_batch` with as many processes as there are.

    Raises:
        UserError: it can't be split over them, or the table has one of the arguments that follow from it.
    """
    given = stage.trainer
    if stage.global_batch is None:
        return given
    for key in ("gradient_accumulation_steps", "steps_per_generation"):
        if key in given:
            instead = "; set generation_batch_size, of all processes" if key == "steps_per_generation" else ""
            raise UserError(f"[trainer]: {key} follows from global_batch: remove the key{instead}")
    most = given.get("per_device_train_batch_size", cls.per_device_train_batch_size)
    if not isinstance(most, int) or most < 1:
        return given  # refused with all other arguments
    rows, passes = split_batch(stage.global_batch, most, world_size())
    return given | {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}


def refuse_other_sharding(stage: TrainedStage, arguments: TrainingArguments) -> None:
    """Raises UserError for arguments that don't go with sharding here.

    That is: the FSDP of accelerate or transformers; float16, whose overflows aren't shared; and checkpoints without the
    optimizer, as the shards hold both.
    """
    if arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError("FSDP of accelerate or transformers isn't used: remove it, and set the stage's shard = true")
    if stage.shard and arguments.save_only_model:
        raise UserError(
            "[trainer]: save_only_model = true: sharded checkpoints hold the optimizer, too; remove the key"
        )
    if stage.shard and arguments.fp16:
        raise UserError("[trainer]: fp16 can't be sharded: set bf16 = true instead, or shard = false")


def save_shards(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Saves weights and optimizer into CHECKPOINT/shards, each process its part. All processes must call this."""
    weights, states = get_state_dict(model, optimizer)
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is one process only
            dcp.save({"model": weights, "optimizer": states}, checkpoint_id=checkpoint / SHARDS)
    except CheckpointException as error:
        raise _first(error) from error


def _first(error: CheckpointException) -> BaseException:
    """What failed in the first of the processes in which something did."""
    return next(iter(error.failures.values()))[0]


class _Unpickler(pickle.Unpickler):
    """Reads what describes tensors, and nothing else: a pickle could name any function, to be called."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, function or dtype of a name in the pickle."""
        if name not in DESCRIPTIONS.get(module, ()):
            raise UserError(f"a checkpoint's shards/.metadata names {module}.{name}: it isn't one that M1 saved")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, which would unpickle any metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, once it is known to be harmless."""
        with open(Path(self.path, ".metadata"), "rb") as file:
            _Unpickler(file).load()
        return super().read_metadata(*args, **kwargs)


class _Planner(dcp.DefaultLoadPlanner):
    """torch's planner, which would unpickle any setting of the optimizer."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Loads a setting, once it is known to be harmless."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def load_shards(checkpoint: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Loads what `save_shards` saved with any number of processes. All processes must call this.

    Args:
        checkpoint: its folder.
        model: sharded or not.
        optimizer: the model's; None to load the weights alone.

    Raises:
        UserError: it can't be read, or holds anything but tensors and plain settings.
    """
    if optimizer is None:
        state: dict[str, Any] = {"model": get_model_state_dict(model)}
    else:
        weights, states = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": states}
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(state, storage_reader=_Reader(Path(checkpoint) / SHARDS), planner=_Planner())
    except CheckpointException as error:
        raise UserError(f"{checkpoint} can't be resumed from: {reason(_first(error))}") from error
    if optimizer is None:
        set_model_state_dict(model, state["model"])
    else:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
