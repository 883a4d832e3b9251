"""Rows of a table by number: token embeddings, and the angles of positions. For inference only."""

import torch.nn.functional as F
from torch import Tensor

from m1.ops.backend import Backend, choose, inference_operator, own_backend
from m1.ops.shapes import Shapes

CHECK = Shapes("embedding", table="V H: float", tokens="rows: int64")


def embedding(table: Tensor, tokens: Tensor, backend: Backend = "auto") -> Tensor:
    """table[tokens]. Not differentiable. On a GPU it is torch's.

    Args:
        table: [V, H].
        tokens: [rows] int64, 0 to V - 1.

    Returns:
        [rows, H] in the table's dtype.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
        IndexError: on a CPU, a token that isn't in the table.
    """
    CHECK(table, tokens)
    own = own_backend(table.device.type) if backend == "auto" else backend
    limits = {"a Triton kernel, and there is none": own != "triton", "contiguous rows": table.is_contiguous()}
    backend = choose("embedding", backend, table, limits)
    return F.embedding(tokens, table) if backend == "reference" else _embedding(table, tokens.contiguous(), backend)


def _new_rows(table: Tensor, tokens: Tensor) -> Tensor:
    return table.new_empty(len(tokens), table.shape[1])


_embedding = inference_operator("embedding", "embedding", "Tensor table, Tensor tokens", _new_rows)
