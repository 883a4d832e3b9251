"""Invariant 9: the released layouts. Import -> an independent evaluation's logits; -> export -> the same tensors."""

import json
import math

import pytest
import torch
from checkpoints import LLAMA3_ROPE, save_checkpoint, scramble, tiny_teacher
from safetensors.torch import load_file, save_file

from m1.errors import UserError
from m1.model import M1ForCausalLM
from m1.model.convert import convert
from m1.model.official import export_official, import_official

H, HEADS, KV, HD, N, R, FFN, V, LAYERS, KEPT = 64, 4, 2, 32, 16, 4, 96, 40, 3, [1]
D, X = HEADS * HD, KV * HD
THETA, EPS = 5000.0, 1e-5


ROPE_FACTOR, LOW, HIGH, ORIGINAL = 32.0, 1.0, 4.0, 16


@pytest.fixture(params=["mamba", "mamba2"])
def released(tmp_path, request):
    """A folder in the released layout, made by hand from docs/model.md, with random weights everywhere."""
    mamba2 = request.param == "mamba2"
    folder = tmp_path / "released"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": H,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "head_dim": HD, "rms_norm_eps": EPS, "rope_theta": THETA,
        "rope_scaling": {"rope_type": "llama3", "factor": ROPE_FACTOR, "low_freq_factor": LOW,
                         "high_freq_factor": HIGH, "original_max_position_embeddings": ORIGINAL},
        "max_position_embeddings": 256, "tie_word_embeddings": True, "torch_dtype": "float32", "hidden_act": "silu",
        "_name_or_path": "somebody/llama", "somebodys_own": None, "use_cache": False,
    }  # fmt: skip
    mamba = {
        "d_model": H, "rms_norm_eps": EPS, "vocab_size": V, "d_inner": D, "d_xb": X,
        "intermediate_size": FFN, "hidden_act": "silu", "n_layer": LAYERS, "attn_layers": KEPT,
    }  # fmt: skip
    mamba["ssm_cfg"] = {"expand": 1, "ngroups": HEADS, "d_state": HD} if mamba2 else {"expand": 1}
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
        m = p + "mamba."
        if i in KEPT and mamba2:
            w |= {p + f"self_attn.{n}_proj.weight": random(D if n == "q" else X, H) for n in "qkv"}
            w[p + "self_attn.o_proj.weight"] = random(H, D)
        elif i in KEPT:
            w |= {p + "mha.in_proj.weight": random(D + 2 * X, H), p + "mha.out_proj.weight": random(H, D)}
        else:
            steps, conv = (HEADS, D + 2 * X) if mamba2 else (R, D)
            w |= {
                m + "in_proj.weight": random(2 * D + 2 * X + steps, H),
                m + "conv1d.weight": random(conv, 1, 4, scale=0.5),
                m + "conv1d.bias": random(conv),
                m + "out_proj.weight": random(H, D),
            }
            if mamba2:
                w |= {m + "A_log": random(HEADS, scale=0.5), m + "D": random(HEADS), m + "dt_bias": random(HEADS)}
                w[m + "norm.weight"] = 1 + random(D)
            else:
                w |= {m + "A_log": random(D, N, scale=0.5), m + "D": random(D)}
                w |= {m + "dt_proj.weight": random(D, R), m + "dt_proj.bias": random(D)}
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

    def mamba2(p, u):
        z, xBC, dt = (u @ w[p + "in_proj.weight"].T).split([D, 2 * X + D, HEADS], dim=-1)
        conv = torch.zeros(T, 2 * X + D)
        for t in range(T):
            for k in range(4):
                if t - 3 + k >= 0:
                    conv[t] += w[p + "conv1d.weight"][:, 0, k] * xBC[t - 3 + k]
        x, B, C = silu(conv + w[p + "conv1d.bias"]).split([X, X, D], dim=-1)
        dt = torch.log1p(torch.exp(dt + w[p + "dt_bias"]))
        y = torch.zeros(T, D)
        for head in range(HEADS):
            own, kv = (slice(i * HD, i * HD + HD) for i in (head, head // (HEADS // KV)))
            state = torch.zeros(HD, HD)
            for t in range(T):
                decay = torch.exp(-dt[t, head] * torch.exp(w[p + "A_log"][head]))
                state = decay * state + dt[t, head] * torch.outer(x[t, kv], B[t, kv])
                y[t, own] = state @ C[t, own] + w[p + "D"][head] * x[t, kv]
            gated = y[:, own] * silu(z[:, own])
            y[:, own] = gated / (gated.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[p + "norm.weight"][own]
        return y @ w[p + "out_proj.weight"].T

    def attention(q, k, v, frequencies):
        out = torch.zeros(T, D)

        def rotate(vector, t):
            a, b = vector[: HD // 2], vector[HD // 2 :]
            cos, sin = torch.cos(t * frequencies), torch.sin(t * frequencies)
            return torch.cat([a * cos - b * sin, b * cos + a * sin])

        for head in range(HEADS):
            own, kv = (slice(i * HD, i * HD + HD) for i in (head, head // (HEADS // KV)))
            for t in range(T):
                scores = torch.stack([rotate(q[t, own], t) @ rotate(k[s, kv], s) / math.sqrt(HD) for s in range(t + 1)])
                out[t, own] = scores.softmax(0) @ v[: t + 1, kv]
        return out

    plain = [THETA ** (-2 * i / HD) for i in range(HD // 2)]

    def mixed(p, u):
        if p + "mha.in_proj.weight" in w:  # the code it belongs to ignores rope scaling
            q, k, v = (u @ w[p + "mha.in_proj.weight"].T).split([D, X, X], dim=-1)
            return attention(q, k, v, torch.tensor(plain)) @ w[p + "mha.out_proj.weight"].T
        if p + "self_attn.q_proj.weight" in w:
            q, k, v = (u @ w[p + f"self_attn.{n}_proj.weight"].T for n in "qkv")
            scaled = torch.tensor([llama3_scaled(frequency) for frequency in plain])
            return attention(q, k, v, scaled) @ w[p + "self_attn.o_proj.weight"].T
        return mamba2(p + "mamba.", u) if p + "mamba.dt_bias" in w else mamba(p + "mamba.", u)

    for i in range(LAYERS):
        p = f"model.layers.{i}."
        u = norm(h, w[p + "input_layernorm.weight"])
        h = h + mixed(p, u)
        u = norm(h, w[p + "post_attention_layernorm.weight"])
        gate, up = u @ w[p + "mlp.gate_proj.weight"].T, u @ w[p + "mlp.up_proj.weight"].T
        h = h + (silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    return norm(h, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def llama3_scaled(frequency):
    """Llama 3.1's rope scaling of one frequency, from its definition."""
    wavelength = 2 * math.pi / frequency
    if wavelength < ORIGINAL / HIGH:
        return frequency
    if wavelength > ORIGINAL / LOW:
        return frequency / ROPE_FACTOR
    smooth = (ORIGINAL / wavelength - LOW) / (HIGH - LOW)
    return (1 - smooth) * frequency / ROPE_FACTOR + smooth * frequency


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
    assert written["ssm_cfg"] == {"d_state": N, "d_conv": 4, **stored["ssm_cfg"]}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (released, tmp_path / "back"))
    assert {key: after[key] for key in before} == before | {"torch_dtype": str(dtype).removeprefix("torch.")}


@torch.no_grad()
def test_a_conversion_survives_export_and_import(tmp_path, tokens):
    for mixer, alignment in (("mamba", "official"), ("mamba", "attention"), ("mamba2", "official")):
        folder = tmp_path / f"{mixer}-{alignment}"
        rope = {"rope_parameters": LLAMA3_ROPE} if mixer == "mamba2" else {}
        save_checkpoint(tiny_teacher(**rope), folder / "teacher")
        convert(folder / "teacher", folder / "m1", [1, 3], mixer=mixer, head_alignment=alignment)
        model = scramble(M1ForCausalLM.from_pretrained(folder / "m1"))
        model.save_pretrained(folder / "m1")
        export_official(folder / "m1", folder / "released")
        back = import_official(folder / "released", folder / "back")
        torch.testing.assert_close(back(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen2", {}, "no projection biases"),
        ("llama", {"mlp_bias": True}, "no projection biases"),
        ("qwen3", {}, "no QK-norm"),
        ("llama", {"rope_parameters": LLAMA3_ROPE}, "ignores rope scaling, but this model has 'llama3'"),
    ],
)
def test_what_the_layout_has_no_place_for_is_not_exported(tmp_path, family, options, message):
    save_checkpoint(tiny_teacher(family, **options), tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "m1", [1, 3])
    with pytest.raises(UserError, match=message):
        export_official(tmp_path / "m1", tmp_path / "released")
    assert not (tmp_path / "released").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_xb": 999}, r"d_xb is 999, but config\.json implies 64"),
        ({"rms_norm_eps": 0.1}, r"rms_norm_eps is 0\.1"),
        ({"vocab_size": 7}, "vocab_size is 7"),
        ({"attn_layers": 1}, "attn_layers a list of layer numbers"),
        ({"hidden_act": 1}, "hidden_act is 1"),
        ({"d_model": "64"}, "d_model is '64'"),
        ({"d_inner": 0}, "d_inner is 0"),
        ({"attn_layers": ["a"]}, "attn_layers a list of layer numbers"),
        ({"attn_layers": [7]}, "layer 7, but the teacher has layers 0 to 2"),
        ({"ssm_cfg": "x"}, "ssm_cfg should be an object"),
        ({"ssm_cfg": {"d_conv": "x"}}, "d_conv|conv_kernel"),
        ({"ssm_cfg": {"norm_before_gate": True}}, "norm_before_gate = True"),
        ({"ssm_cfg": {"dt_limit": [0, 1]}}, r"dt_limit = \[0, 1\]"),
        ({"ssm_cfg": {"repeat_kv_before_conv": None}}, "repeat_kv_before_conv = None"),
    ],
    ids=str,
)
def test_settings_that_contradict_or_are_unknown_are_refused(released, tmp_path, changes, message):
    path = released / "mamba_config.json"
    stored = json.loads(path.read_text())
    if isinstance(changes.get("ssm_cfg"), dict):
        changes = {"ssm_cfg": stored["ssm_cfg"] | changes["ssm_cfg"]}
    path.write_text(json.dumps(stored | changes))
    with pytest.raises(UserError, match=message):
        import_official(released, tmp_path / "m1")
    assert not (tmp_path / "m1").exists()


# The keys of the code's own MambaConfig, which takes no others.
KEYS = {
    "d_model", "ssm_cfg", "rms_norm_eps", "vocab_size", "d_inner", "d_xb", "intermediate_size", "hidden_act", "n_layer",
    "attn_layers",
}  # fmt: skip
# What the code's training script leaves out, and so writes as null. Older code has no d_inner.
UNSAID = [{"vocab_size": None, "d_inner": None}, {"vocab_size": None, "d_inner": ...}, {"vocab_size": ...}]


@pytest.mark.parametrize("changes", [*UNSAID, *({key: None} for key in sorted(KEYS - {"ssm_cfg"}))], ids=str)
def test_null_and_absent_values_are_not_said(released, tmp_path, changes):
    path = released / "mamba_config.json"
    stored = json.loads(path.read_text())
    said = {key: value for key, value in (stored | changes).items() if value is not ...}
    complete = import_official(released, tmp_path / "complete").state_dict()
    path.write_text(json.dumps(said))
    model = import_official(released, tmp_path / "m1")
    assert all(torch.equal(tensor, complete[name]) for name, tensor in model.state_dict().items())
    M1ForCausalLM.from_pretrained(tmp_path / "m1").save_pretrained(tmp_path / "trained")  # as a training stage saves it
    export_official(tmp_path / "trained", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "mamba_config.json").read_text())
    assert set(written) == KEYS and {**written, "ssm_cfg": None} == {**stored, "ssm_cfg": None}


MAMBA_1 = pytest.mark.parametrize("released", ["mamba"], indirect=True)


@MAMBA_1
@pytest.mark.parametrize("said", [{}, {"ssm_cfg": None}])
def test_everything_can_be_told_from_the_tensors(released, tmp_path, said):
    expected = import_official(released, tmp_path / "complete").config
    (released / "mamba_config.json").write_text(json.dumps(said))
    config = import_official(released, tmp_path / "m1").config
    assert config.attention_layers == KEPT
    assert config.to_dict() | {"released": None} == expected.to_dict() | {"released": None}


def test_settings_of_the_mixers_survive(released, tmp_path):
    """Those that change nothing here, too."""
    path = released / "mamba_config.json"
    stored = json.loads(path.read_text())
    more = {"chunk_size": 128, "rmsnorm": True} if "ngroups" in stored["ssm_cfg"] else {"dt_rank": "auto"}
    said = stored["ssm_cfg"] | {"expand": 2, "conv_bias": True} | more
    path.write_text(json.dumps(stored | {"ssm_cfg": said}))
    import_official(released, tmp_path / "m1")
    export_official(tmp_path / "m1", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "mamba_config.json").read_text())["ssm_cfg"]
    assert {key: written[key] for key in said} == said


@MAMBA_1
@torch.no_grad()
def test_a_checkpoint_of_the_training_code(released, tmp_path):
    """It holds in_proj's parts and transformers' own attention, and mamba_config.json has nulls."""
    weights = load_file(released / "model.safetensors")
    for name in list(weights):
        if name.endswith("mamba.in_proj.weight"):
            for part, rows in zip(
                ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down"),
                weights.pop(name).split([D, X, X, D, R]),
                strict=True,
            ):
                weights[name.replace("in_proj", part)] = rows.contiguous()
        elif ".mha.in_proj" in name:
            for part, rows in zip("qkv", weights.pop(name).split([D, X, X]), strict=True):
                weights[name.replace("mha.in_proj", f"self_attn.{part}_proj")] = rows.contiguous()
        elif ".mha.out_proj" in name:
            weights[name.replace("mha.out_proj", "self_attn.o_proj")] = weights.pop(name)
    joined = load_file(released / "model.safetensors") | {k: v for k, v in weights.items() if "self_attn" in k}
    joined = {name: tensor for name, tensor in joined.items() if ".mha." not in name}
    save_file(weights, released / "model.safetensors", metadata={"format": "pt"})
    path = released / "mamba_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | UNSAID[0]))
    model = import_official(released, tmp_path / "m1").eval()
    tokens = torch.randint(0, V, (9,), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model(tokens[None]).logits[0], dense_evaluation(joined, tokens), rtol=1e-4, atol=1e-4)
    del weights["model.layers.2.mamba.B_proj.weight"]
    save_file(weights, released / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no 'model\.layers\.2\.mamba\.B_proj\.weight': it is incomplete"):
        import_official(released, tmp_path / "again")


def test_other_kernel_widths_survive(released, tmp_path):
    """ssm_cfg's d_conv: weights of 3 taps are read as such, and written so."""
    weights = load_file(released / "model.safetensors")
    weights = {k: v[..., :3].contiguous() if "conv1d.weight" in k else v for k, v in weights.items()}
    save_file(weights, released / "model.safetensors", metadata={"format": "pt"})
    path = released / "mamba_config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"ssm_cfg": stored["ssm_cfg"] | {"d_conv": 3}}))
    model = import_official(released, tmp_path / "m1")
    export_official(tmp_path / "m1", tmp_path / "back")
    assert import_official(tmp_path / "back", tmp_path / "again").config.conv_kernel == model.config.conv_kernel == 3


def test_pytorch_bin_with_a_tied_head_is_read(released, tmp_path):
    weights = load_file(released / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (released / "model.safetensors").unlink()
    torch.save(weights, released / "pytorch_model.bin")
    model = import_official(released, tmp_path / "m1")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
