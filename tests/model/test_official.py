"""Invariant 9: the released layout. Import -> an independent evaluation's logits; -> export -> the same tensors."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from m1.errors import UserError
from m1.model.official import export_official, import_official

H, HEADS, KV, HD, N, R, FFN, V, LAYERS, KEPT = 64, 4, 2, 32, 16, 4, 96, 40, 3, [1]
D, X = HEADS * HD, KV * HD
THETA, EPS = 5000.0, 1e-5


@pytest.fixture
def released(tmp_path):
    """A folder in the released layout, made by hand from docs/model.md, with random weights everywhere."""
    folder = tmp_path / "released"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": H,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "head_dim": HD, "rms_norm_eps": EPS, "rope_theta": THETA,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 16},
        "max_position_embeddings": 256, "tie_word_embeddings": True, "torch_dtype": "float32", "hidden_act": "silu",
    }  # fmt: skip
    mamba = {
        "d_model": H, "ssm_cfg": {"expand": 1}, "rms_norm_eps": EPS, "vocab_size": V, "d_inner": D, "d_xb": X,
        "intermediate_size": FFN, "hidden_act": "silu", "n_layer": LAYERS, "attn_layers": KEPT,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mamba_config.json").write_text(json.dumps(mamba))
    g = torch.Generator().manual_seed(0)

    def random(*shape, scale=0.2):
        return torch.randn(*shape, generator=g) * scale

    w = {"model.embed_tokens.weight": random(V, H, scale=1.0), "model.norm.weight": 1 + random(H)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        w |= {p + f"{n}.weight": 1 + random(H) for n in ("input_layernorm", "post_attention_layernorm")}
        w |= {p + f"mlp.{n}_proj.weight": random(FFN, H) for n in ("gate", "up")}
        w[p + "mlp.down_proj.weight"] = random(H, FFN)
        if i in KEPT:
            w |= {p + "mha.in_proj.weight": random(D + 2 * X, H), p + "mha.out_proj.weight": random(H, D)}
            continue
        w |= {
            p + "mamba.in_proj.weight": random(2 * D + 2 * X + R, H),
            p + "mamba.dt_proj.weight": random(D, R),
            p + "mamba.dt_proj.bias": random(D),
            p + "mamba.conv1d.weight": random(D, 1, 4, scale=0.5),
            p + "mamba.conv1d.bias": random(D),
            p + "mamba.A_log": random(D, N, scale=0.5),
            p + "mamba.D": random(D),
            p + "mamba.out_proj.weight": random(H, D),
        }
    save_file(w, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dense_evaluation(w, tokens):
    """Logits [T, V] of one sequence in plain loops over tokens, channels and heads: none of the package's code."""
    T = len(tokens)
    h = w["model.embed_tokens.weight"][tokens]

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight

    def silu(x):
        return x * torch.sigmoid(x)

    def mamba(p, u):
        rows = (u @ w[p + "in_proj.weight"].T).split([D, X, X, D, R], dim=-1)
        z, x, B, C, dt = rows
        rep = D // X
        # groups of 16 channels, each repeated `rep` times in a row
        spread = [((c // N) // rep) * N + c % N for c in range(D)]
        x, B = x[:, spread], B[:, spread]
        conv = torch.zeros(T, D)
        for t in range(T):
            for k in range(4):
                if t - 3 + k >= 0:
                    conv[t] += w[p + "conv1d.weight"][:, 0, k] * x[t - 3 + k]
        x = silu(conv + w[p + "conv1d.bias"])
        # the bias stands once in the linear map and once more as the scan's own
        dt = dt @ w[p + "dt_proj.weight"].T + w[p + "dt_proj.bias"] + w[p + "dt_proj.bias"]
        dt = torch.log1p(torch.exp(dt))
        A, y = -torch.exp(w[p + "A_log"]), torch.zeros(T, D)
        for c in range(D):
            group = slice(c // N * N, c // N * N + N)
            state = torch.zeros(N)
            for t in range(T):
                state = torch.exp(dt[t, c] * A[c]) * state + dt[t, c] * B[t, group] * x[t, c]
                y[t, c] = (C[t, group] * state).sum() + w[p + "D"][c] * x[t, c]
        return (y * silu(z)) @ w[p + "out_proj.weight"].T

    def attention(p, u):
        q, k, v = (u @ w[p + "in_proj.weight"].T).split([D, X, X], dim=-1)
        out = torch.zeros(T, D)
        frequencies = torch.tensor([THETA ** (-2 * i / HD) for i in range(HD // 2)])

        def rotate(vector, t):
            a, b = vector[: HD // 2], vector[HD // 2 :]
            cos, sin = torch.cos(t * frequencies), torch.sin(t * frequencies)
            return torch.cat([a * cos - b * sin, b * cos + a * sin])

        for head in range(HEADS):
            own, kv = (
                slice(head * HD, head * HD + HD),
                slice(head // (HEADS // KV) * HD, head // (HEADS // KV) * HD + HD),
            )
            for t in range(T):
                scores = torch.stack([rotate(q[t, own], t) @ rotate(k[s, kv], s) / math.sqrt(HD) for s in range(t + 1)])
                out[t, own] = scores.softmax(0) @ v[: t + 1, kv]
        return out @ w[p + "out_proj.weight"].T

    for i in range(LAYERS):
        p = f"model.layers.{i}."
        u = norm(h, w[p + "input_layernorm.weight"])
        h = h + (attention(p + "mha.", u) if i in KEPT else mamba(p + "mamba.", u))
        u = norm(h, w[p + "post_attention_layernorm.weight"])
        gate, up = u @ w[p + "mlp.gate_proj.weight"].T, u @ w[p + "mlp.up_proj.weight"].T
        h = h + (silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    return norm(h, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


@torch.no_grad()
def test_import_gives_the_layouts_own_logits(released, tmp_path):
    model = import_official(released, tmp_path / "m1").eval()
    tokens = torch.randint(0, V, (9,), generator=torch.Generator().manual_seed(3))
    expected = dense_evaluation(load_file(released / "model.safetensors"), tokens)
    torch.testing.assert_close(model(tokens[None]).logits[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_export_gives_the_same_bytes(released, tmp_path, dtype):
    weights = {k: v.to(dtype) for k, v in load_file(released / "model.safetensors").items()}
    save_file(weights, released / "model.safetensors", metadata={"format": "pt"})
    import_official(released, tmp_path / "m1")
    export_official(tmp_path / "m1", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(weights)
    for name, tensor in weights.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor), name
    stored = json.loads((released / "mamba_config.json").read_text())
    written = json.loads((tmp_path / "back" / "mamba_config.json").read_text())
    assert {**written, "ssm_cfg": None} == {**stored, "ssm_cfg": None}


def test_pytorch_bin_with_a_tied_head_is_read(released, tmp_path):
    weights = load_file(released / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (released / "model.safetensors").unlink()
    torch.save(weights, released / "pytorch_model.bin")
    model = import_official(released, tmp_path / "m1")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_mamba_config_that_contradicts_config_is_refused(released, tmp_path):
    path = released / "mamba_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_xb": 999}))
    with pytest.raises(UserError, match=r"d_xb is 999, but config\.json implies 64"):
        import_official(released, tmp_path / "m1")
