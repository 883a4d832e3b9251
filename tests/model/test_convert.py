"""What conversion does to weights: which rows go where, under both head alignments."""

import pytest
import torch
from conftest import save_checkpoint, tiny_llama

from m1.model.convert import convert, group_permutation

N, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 2, 32


def mixer_rows(model, layer):
    mamba = model.model.layers[layer].mamba
    return dict(zip(["z", "x", "B", "C", "dt"], mamba.in_proj.weight.split(mamba.widths), strict=True)), mamba


@pytest.mark.parametrize("alignment", ["attention", "official"])
def test_projections_are_the_teachers(tmp_path, teacher_dir, alignment):
    model = convert(teacher_dir, tmp_path, [1, 3], alignment)
    rows, mamba = mixer_rows(model, 2)
    attention = tiny_llama().model.layers[2].self_attn
    order = group_permutation(HEADS, KV_HEADS, HEAD_DIM, N) if alignment == "attention" else torch.arange(128)
    assert torch.equal(rows["x"], attention.v_proj.weight)
    assert torch.equal(rows["B"], attention.k_proj.weight)
    assert torch.equal(rows["C"], attention.q_proj.weight[order])
    assert torch.equal(mamba.out_proj.weight, attention.o_proj.weight[:, order])


def test_attention_alignment_pairs_every_group_with_its_own_kv_part():
    """Group p of the mixer reads x/B group p // rep. It must be part j of the KV head its query head h attended to."""
    rep, parts = HEADS // KV_HEADS, HEAD_DIM // N
    order = group_permutation(HEADS, KV_HEADS, HEAD_DIM, N)
    assert sorted(order.tolist()) == list(range(HEADS * HEAD_DIM))
    for p in range(HEADS * parts):
        query_group = order[p * N].item() // N
        h, j = divmod(query_group, parts)
        assert p // rep == (h // rep) * parts + j


def test_alignments_agree_where_head_dim_is_the_state_size():
    assert torch.equal(group_permutation(8, 2, 16, 16), torch.arange(128))


def test_biases_are_carried_over(tmp_path):
    teacher = tiny_llama(attention_bias=True)
    attention = teacher.model.layers[0].self_attn
    for part in (attention.v_proj, attention.o_proj):
        torch.nn.init.normal_(part.bias)
    save_checkpoint(teacher, tmp_path / "teacher")
    mamba = convert(tmp_path / "teacher", tmp_path / "out", [1]).model.layers[0].mamba
    assert torch.equal(mamba.in_proj.bias.split(mamba.widths)[1], attention.v_proj.bias)
    assert torch.equal(mamba.out_proj.bias, attention.o_proj.bias)


def test_same_seed_same_model(tmp_path, teacher_dir):
    models = [convert(teacher_dir, tmp_path / str(i), [1, 3], seed=seed) for i, seed in enumerate([5, 5, 6])]
    states = [m.state_dict() for m in models]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])
