"""Recorded steps: a replay is the step on its inputs' new values, and what can't be repeated isn't recorded."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from m1.ops import PackedLinear, add_rms_norm, embedding, swiglu
from m1.ops.calls import Arena, Block, Recording, _plan, record


@pytest.fixture
def network():
    g = torch.Generator().manual_seed(0)
    table, weight, up, down = (torch.randn(*shape, generator=g) for shape in [(9, 32), (32,), (96, 32), (32, 48)])
    first, second, head = PackedLinear(up), PackedLinear(down), PackedLinear(table)

    def step(tokens):
        hidden = embedding(tokens, table)
        for _ in range(3):
            hidden = add_rms_norm(hidden, second(swiglu(first(hidden))), weight, 1e-5)
        return head(hidden), hidden[:, :16]

    return step


@pytest.mark.usefixtures("poisoned_memory")
def test_a_replay_is_the_step(network):
    arena, recordings = Arena(), {}
    for rows in (3, 1, 40, 7):  # the third one needs more memory, and moves the others
        tokens = torch.randint(9, (rows,))
        results, recording = record(network, tokens)
        assert isinstance(recording, Recording), recording
        arena.add(recording)
        recordings[rows] = tokens, recording
        for actual, expected in zip(results, network(tokens), strict=True):
            assert torch.equal(actual, expected)
    for tokens, recording in [*recordings.values(), *recordings.values()]:
        tokens.copy_(torch.randint(9, (len(tokens),)))
        for actual, expected in zip(recording.replay(), network(tokens), strict=True):
            assert torch.equal(actual, expected)


def test_intermediate_results_share_memory(network):
    _, recording = record(network, torch.randint(9, (64,)))
    alive = 64 * 4 * (96 + 48 + 32 + 32)  # the most at a time; all together are nearly three times as much
    assert alive / 2 < recording.size <= alive + 1024


def test_a_row_out_of_range_stops_the_replay(network):
    tokens = torch.tensor([1, 2, 3])
    _, recording = record(network, tokens)
    Arena().add(recording)
    tokens[1] = 9
    with pytest.raises(IndexError, match="row 1 of a decode step has a slot, a token or a page that doesn't exist"):
        recording.replay()


@pytest.mark.parametrize(
    ("operator", "step"),
    [
        ("aten::add", lambda x: (swiglu(x) + 1,)),
        ("aten::add_", lambda x: (swiglu(x.add_(1)),)),
        ("aten::contiguous", lambda x: (swiglu(x.T.contiguous().T.contiguous()),)),
        ("aten::embedding", lambda x: (F.embedding(torch.tensor([0]), x),)),
        ("aten::_local_scalar_dense", lambda x: (swiglu(x) if x[0, 0].item() else x,)),
    ],
)
def test_other_operators_are_not_recorded(operator, step):
    x = torch.randn(4, 32)
    with torch.inference_mode():
        expected = step(x.clone())
        results, found = record(step, x)
    assert torch.equal(results[0], expected[0])
    assert found == operator or (operator.split("::")[1].split("_")[0] in str(found) and isinstance(found, str))


def test_what_a_kernels_own_code_computes_is_seen(monkeypatch):
    """A copy that a wrapper makes would stay the first step's."""
    x = torch.randn(4, 64)[:, ::2]
    layer = PackedLinear(torch.randn(8, 32))
    assert "contiguous" in record(lambda t: (layer(t),), x)[1] or "clone" in record(lambda t: (layer(t),), x)[1]


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 20), st.integers(0, 6)), max_size=20))
def test_blocks_alive_at_the_same_time_do_not_overlap(sizes):
    blocks = {i: Block(size, first, first + length) for i, (size, first, length) in enumerate(sizes)}
    offsets, total = _plan(blocks)
    for i, a in blocks.items():
        assert offsets[i] % 64 == 0 and offsets[i] + a.size <= total
        for j, b in blocks.items():
            if i < j and a.first <= b.last and b.first <= a.last:
                assert offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]
