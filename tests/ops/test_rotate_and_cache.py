"""Rotary embedding into pages: the kernel equals the reference, which equals transformers' rotation."""

import pytest
import torch
from kernels import BACKENDS, DTYPES, to_backend
from tolerance import assert_rms_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from m1.ops import rotate_and_cache

PAGES, PAGE, S, M = 11, 16, 3, 3


def arguments(rows, heads, kv_heads, head_dim, dtype):
    """Tokens at different places of three slots; the second one has no slot."""
    g = torch.Generator().manual_seed(rows + heads)
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim, generator=g).to(dtype)
    angles = torch.randn(rows, head_dim // 2, generator=g).repeat(1, 2)
    caches = [torch.full((PAGES, kv_heads, PAGE, head_dim), 7.0, dtype=dtype) for _ in range(2)]
    table = torch.randperm(PAGES, generator=g)[: S * M].view(S, M).int()
    places = torch.randperm(S * M * PAGE, generator=g)[:rows]
    slots, positions = places // (M * PAGE), places % (M * PAGE)
    slots[1:2] = -1
    return qkv, angles.cos().to(dtype), angles.sin().to(dtype), *caches, table, slots, positions


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1, 4, 2, 16), (5, 9, 3, 64), (17, 3, 1, 20), (3, 8, 8, 128), (0, 4, 2, 16)])
def test_the_kernels_equal_the_reference(sizes, dtype, backend):
    expected = arguments(*sizes, dtype)
    queries = rotate_and_cache(*expected, backend="reference")
    actual = to_backend(backend, *arguments(*sizes, dtype))
    found = rotate_and_cache(*actual, backend=backend)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    assert_rms_close([t.cpu() for t in (found, *actual[3:5])], [queries, *expected[3:5]], tolerance)


def test_the_reference_equals_transformers():
    qkv, cos, sin, keys, values, table, slots, positions = arguments(9, 4, 2, 16, torch.float32)
    queries = rotate_and_cache(qkv, cos, sin, keys, values, table, slots, positions)
    q, k, v = (t.transpose(0, 1)[None] for t in qkv.split([4, 2, 2], dim=1))
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    torch.testing.assert_close(queries, q[0].transpose(0, 1))
    written = torch.zeros(PAGES, PAGE, dtype=torch.bool)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if slot >= 0:
            page, place = table[slot, position // PAGE], position % PAGE
            written[page, place] = True
            torch.testing.assert_close(keys[page, :, place], k[0, :, row])
            torch.testing.assert_close(values[page, :, place], v[0, :, row])
    assert written.sum() == 8 and (keys.transpose(1, 2)[~written] == 7).all()


@pytest.mark.parametrize(
    ("changed", "value"), [("slots", S), ("positions", -1), ("positions", M * PAGE), ("page", PAGES)]
)
def test_places_that_do_not_exist_are_refused(changed, value):
    *rest, table, slots, positions = arguments(5, 4, 2, 16, torch.float32)
    before = rest[3].clone()
    if changed == "page":
        table[slots[4], positions[4] // PAGE] = value
    else:
        {"slots": slots, "positions": positions}[changed][4] = value
    with pytest.raises(IndexError, match=r"row \d has slot"):
        rotate_and_cache(*rest, table, slots, positions, backend="cpu")
    assert torch.equal(rest[3], before)
