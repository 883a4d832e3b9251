"""Rows of a table by number: token embeddings, and the angles of positions. For inference only."""

import torch.nn.functional as F
from torch import Tensor

from m1.ops.backend import Backend, choose, inference_operator, own_backend
from m1.ops.shapes import Shapes

RULES = {"table must have rows": lambda V: V > 0}
CHECK = Shapes("embedding", where=RULES, tokens="rows: int", table="V H: float")


def embedding(tokens: Tensor, table: Tensor, backend: Backend = "auto") -> Tensor:
    """table[tokens]. Not differentiable. On a GPU it is torch's.

    Args:
        tokens: [rows] integers, 0 to V - 1.
        table: [V, H].

    Returns:
        [rows, H] in the table's dtype.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
        IndexError: on a CPU, a token that isn't in the table.
    """
    CHECK(tokens, table)
    own = own_backend(table.device.type) if backend == "auto" else backend
    limits = {"a Triton kernel, and there is none": own != "triton", "contiguous rows": table.is_contiguous()}
    backend = choose("embedding", backend, table, limits)
    tokens = tokens.long().contiguous()
    if backend != "reference":
        return _embedding(tokens, table, backend)
    if table.device.type == "cpu":  # a GPU would have to be waited for
        for row, token in enumerate(tokens.tolist()):
            if not 0 <= token < len(table):
                raise IndexError(f"row {row} has token {token}, but there are {len(table)}")
    return F.embedding(tokens, table)


def _new_rows(tokens: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(len(tokens), table.shape[1])


_embedding = inference_operator("embedding", "embedding", "Tensor tokens, Tensor table", _new_rows)
