"""What conversion does to weights: which rows go where, for every teacher, mixer and head alignment."""

import json

import pytest
import torch
from checkpoints import FAMILIES, save_checkpoint, scramble, tiny_teacher

from m1.errors import UserError
from m1.model.checkpoint import read_weights
from m1.model.convert import convert, group_permutation

N, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 2, 32
IDENTITY = torch.arange(HEADS * HEAD_DIM)


def converted(tmp_path, family="llama", layer=2, **options):
    """The rows of a converted mixer's input projection, the mixer, and the attention layer it was."""
    teacher = tiny_teacher(family)
    save_checkpoint(teacher, tmp_path / "teacher")
    model = convert(tmp_path / "teacher", tmp_path / "out", [1, 3], **options)
    mamba = model.model.layers[layer].mamba
    parts = {}
    for kind in ("weight", "bias"):
        if getattr(mamba.in_proj, kind) is not None:
            rows = getattr(mamba.in_proj, kind).split(mamba.widths)
            parts |= {f"{name}.{kind}": tensor for name, tensor in zip(["z", "x", "B", "C", "dt"], rows, strict=True)}
    return parts, mamba, teacher.model.layers[layer].self_attn


@pytest.mark.parametrize(
    ("mixer", "alignment"), [("mamba", "attention"), ("mamba", "official"), ("mamba2", "attention")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_the_teachers(tmp_path, family, mixer, alignment):
    rows, mamba, attention = converted(tmp_path, family, mixer=mixer, head_alignment=alignment)
    permuted = (mixer, alignment) == ("mamba", "attention")
    order = group_permutation(HEADS, KV_HEADS, HEAD_DIM, N) if permuted else IDENTITY
    assert permuted != torch.equal(order, IDENTITY)
    for kind in ["weight", "bias"] if family == "qwen2" else ["weight"]:
        assert torch.equal(rows[f"x.{kind}"], getattr(attention.v_proj, kind))
        assert torch.equal(rows[f"B.{kind}"], getattr(attention.k_proj, kind))
        assert torch.equal(rows[f"C.{kind}"], getattr(attention.q_proj, kind)[order])
    assert torch.equal(mamba.out_proj.weight, attention.o_proj.weight[:, order])
    assert (mamba.in_proj.bias is None) == (family != "qwen2") and mamba.out_proj.bias is None


@pytest.mark.parametrize(
    ("mixer", "alignment"), [("mamba", "attention"), ("mamba", "official"), ("mamba2", "attention")]
)
@torch.no_grad()
def test_qk_norm_becomes_the_norm_of_B_and_C(tmp_path, mixer, alignment):
    """B and C are the teacher's normalised keys and queries, channel by channel."""
    _, mamba, attention = converted(tmp_path, "qwen3", mixer=mixer, head_alignment=alignment)
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    _, _, B, C, _ = mamba.project(hidden)
    order = (
        group_permutation(HEADS, KV_HEADS, HEAD_DIM, N) if (mixer, alignment) == ("mamba", "attention") else IDENTITY
    )
    keys = attention.k_norm(attention.k_proj(hidden).unflatten(-1, (-1, HEAD_DIM))).flatten(-2)
    queries = attention.q_norm(attention.q_proj(hidden).unflatten(-1, (-1, HEAD_DIM))).flatten(-2)
    torch.testing.assert_close(B, keys)
    torch.testing.assert_close(C, queries[..., order])


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


def test_llama_biases_are_carried_over(tmp_path):
    """Llama's attention_bias covers the output projection too."""
    teacher = tiny_teacher(attention_bias=True)
    save_checkpoint(teacher, tmp_path / "teacher")
    mamba = convert(tmp_path / "teacher", tmp_path / "out", [1]).model.layers[0].mamba
    attention = teacher.model.layers[0].self_attn
    assert torch.equal(mamba.in_proj.bias.split(mamba.widths)[1], attention.v_proj.bias)
    assert torch.equal(mamba.out_proj.bias, attention.o_proj.bias)


def test_same_seed_same_model(tmp_path, teacher_dir):
    models = [convert(teacher_dir, tmp_path / str(i), [1, 3], seed=seed) for i, seed in enumerate([5, 5, 6])]
    states = [m.state_dict() for m in models]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_what_attention_has_no_counterpart_for_starts_as_in_mamba(tmp_path, mixer):
    rows, mamba, _ = converted(tmp_path, "qwen2", mixer=mixer)
    softplus = torch.nn.functional.softplus
    if mixer == "mamba":
        expected = torch.arange(1.0, N + 1).expand(HEADS * HEAD_DIM, N)
        torch.testing.assert_close(mamba.A_log.exp(), expected)
        steps = softplus(mamba.dt_proj.bias)
    else:
        assert (mamba.A_log.exp() >= 1).all() and (mamba.A_log.exp() <= 16).all()
        assert (mamba.norm.weight == 1).all()
        steps = softplus(mamba.dt_bias)
    assert (steps >= 0.999e-3).all() and (steps <= 0.1001).all() and steps.std() > 0
    assert (mamba.D == 1).all()
    assert (rows["z.bias"] == 0).all() and (rows["dt.bias"] == 0).all()
    assert 0.08 < rows["z.weight"].std() < 0.12  # the teacher's initializer_range is 0.1
    for parameter in (mamba.conv1d.weight, mamba.conv1d.bias):
        assert parameter.abs().max() <= 0.5 and parameter.std() > 0.2  # uniform within K ** -0.5


def test_tensors_without_a_place_are_refused(tmp_path):
    """A Llama whose configuration has lost its attention_bias: its biases must not be dropped silently."""
    save_checkpoint(tiny_teacher(attention_bias=True), tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": False}))
    with pytest.raises(UserError, match=r"'model.layers.0.self_attn.k_proj.bias' that a Mamba layer has no place for"):
        convert(tmp_path / "teacher", tmp_path / "out", [1, 3])
    with pytest.raises(UserError, match=r"that this model has no place for \(16 such\)"):
        convert(tmp_path / "teacher", tmp_path / "out", range(4))


def test_qwen2_that_names_its_biases(tmp_path):
    save_checkpoint(tiny_teacher("qwen2"), tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    assert convert(tmp_path / "teacher", tmp_path / "out", [1, 3]).model.layers[0].mamba.in_proj.bias is not None


def test_weights_left_in_the_folder_are_not_read(tmp_path, tokens):
    """Converting into a folder that held a sharded model: its index would be read before the new weights."""
    save_checkpoint(tiny_teacher(), tmp_path / "teacher")
    save_checkpoint(tiny_teacher(initializer_range=0.2), tmp_path / "out", max_shard_size="100KB")
    with pytest.raises(UserError, match=r"out holds .*config\.json.*choose another output"):
        convert(tmp_path / "teacher", tmp_path / "out", [1, 3])
    model = convert(tmp_path / "teacher", tmp_path / "out", [1, 3], force=True)
    assert not list((tmp_path / "out").glob("*index*")) and list((tmp_path / "out.replaced").glob("*index*"))
    weights = read_weights(tmp_path / "out")
    assert torch.equal(weights["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_aligned_mixers_take_the_place_of_new_ones(tmp_path, teacher_dir):
    trained = scramble(convert(teacher_dir, tmp_path / "all", "none"))
    assert trained.config.attention_layers == []
    with torch.no_grad():
        trained.model.norm.weight.fill_(7)  # what isn't a mixer's is the teacher's
    aligned = str(save_checkpoint(trained, tmp_path / "aligned"))
    given, plain = trained.state_dict(), convert(teacher_dir, tmp_path / "plain", [1, 3]).state_dict()
    for name, tensor in convert(teacher_dir, tmp_path / "out", [1, 3], aligned=aligned).state_dict().items():
        assert torch.equal(tensor, given[name] if ".mamba." in name else plain[name]), name


def test_a_model_with_other_mixers_is_refused(tmp_path, teacher_dir):
    aligned = str(save_checkpoint(convert(teacher_dir, tmp_path / "some", [3]), tmp_path / "aligned"))
    for options, message in (
        ({"mixer": "mamba2"}, "has mixer = 'mamba', and this conversion 'mamba2'"),
        ({"head_alignment": "attention"}, "has head_alignment = 'official', and this conversion 'attention'"),
        ({"state_size": 8}, "has state_size = 16, and this conversion 8"),
        ({}, r"no tensor 'model.layers.3.mamba.\w+' .* with a mixer in that layer"),
    ):
        with pytest.raises(UserError, match=message):
            convert(teacher_dir, tmp_path / "out", [0], aligned=aligned, **options)
    assert not (tmp_path / "out").exists()
