"""Calls embedding.cpp. Tensors, their shapes and dtypes are those of the operator in ops/embedding.py."""

from torch import Tensor

from m1.ops.calls import call


def embedding(tokens: Tensor, table: Tensor, out: Tensor) -> None:
    """Fills out. Raises IndexError if a token isn't in the table."""
    count, width = table.shape
    bad_row = call("m1_embedding", len(tokens), count, width * table.element_size(), table, tokens, out)
    if bad_row >= 0:
        raise IndexError(f"row {bad_row} has token {int(tokens[bad_row])}, but there are {count}")
