"""Rotary embedding of new tokens, with their keys and values written to the cache. For inference only."""

from torch import Tensor

from m1.ops import reference
from m1.ops.backend import Backend, choose, inference_operator
from m1.ops.shapes import KERNEL_FLOATS, Rule, Shapes

RULES: dict[str, Rule] = {
    "kv_heads must divide the heads of qkv, and be less than half of them": lambda heads, kv_heads: (
        kv_heads and heads % kv_heads == 0 and heads > 2 * kv_heads
    ),
    "head_dim must be even": lambda head_dim: head_dim % 2 == 0,
    "page_table must have an entry": lambda S, M: S * M > 0,
}
CHECK = Shapes(
    "rotate_and_cache", where=RULES,
    qkv="rows heads head_dim", cos="rows head_dim", sin="rows head_dim",
    k_cache="pages kv_heads PAGE head_dim: as qkv", v_cache="pages kv_heads PAGE head_dim: as qkv",
    page_table="S M: int", slots="rows: int", positions="rows: int",
)  # fmt: skip


def rotate_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, slots: Tensor,
    positions: Tensor, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Rotates queries and keys by their positions (Su et al. 2021), and writes keys and values into their pages.

    The halves of a head are rotated against each other, as in Llama: (a, b) -> (a cos - b sin, b cos + a sin). Results
    are batch-invariant. Not differentiable.

    Args:
        qkv: [rows, heads, head_dim], each token's queries, then its keys, then its values.
        cos, sin: [rows, head_dim], of each token's angles.
        k_cache, v_cache: [pages, kv_heads, PAGE, head_dim] in qkv's dtype. Updated in place.
        page_table: [S, M] integers, the pages of each slot.
        slots: [rows] integers, the slot of each token. With a negative slot nothing is written.
        positions: [rows] integers, the position of each token in its sequence, 0 to M * PAGE - 1.

    Returns:
        The rotated queries, [rows, heads - 2 kv_heads, head_dim] in qkv's dtype.

    Raises:
        ValueError: a tensor that doesn't fit, or a backend that can't run this.
        IndexError: on a CPU, a slot, a position or a page that doesn't exist.
    """
    CHECK(qkv, cos, sin, k_cache, v_cache, page_table, slots, positions)
    limits = {
        "float32, bfloat16 or float16": qkv.dtype in KERNEL_FLOATS,
        "contiguous channels": qkv.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1,
    }
    backend = choose("rotate_and_cache", backend, qkv, limits)
    if backend == "reference":
        return reference.rotate_and_cache(qkv, cos, sin, k_cache, v_cache, page_table, slots, positions)
    tensors = (cos.contiguous(), sin.contiguous(), k_cache, v_cache, page_table.int().contiguous())
    return _rotate_and_cache(qkv, *tensors, slots.long().contiguous(), positions.long().contiguous(), backend)


def _new_queries(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, *rest: Tensor) -> Tensor:
    rows, heads, head_dim = qkv.shape
    return qkv.new_empty(rows, heads - 2 * k_cache.shape[1], head_dim)


ARGUMENTS = (
    "Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor slots, "
    "Tensor positions"
)
_rotate_and_cache = inference_operator("rotate_and_cache", "rotary", ARGUMENTS, _new_queries)
