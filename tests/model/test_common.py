"""What transformers' common tests (ModelTesterMixin, GenerationTesterMixin) check of a causal LM, in our own words.

Checked elsewhere: gradient checkpointing, attention implementations, beams, static caches, compiled training, sharded
checkpoints, device maps (test_huggingface.py); padding (test_padding.py); continuing, copying and cropping caches,
assisted decoding, offloaded caches (test_caches.py); decoding in pieces and packing (test_modeling.py).

What doesn't apply, and why:
    sequence classification, question answering: there are no such heads
    4D masks, assisted and contrastive decoding: refused, as in transformers' other models with a recurrent state
    quantized caches, continuous batching: transformers refuses caches with linear_attention layers
    head pruning, relative positions, feed-forward chunking, encoders, torchscript: Llama doesn't have them, either
    tensor-parallel and FSDP plans: there are none; FSDP2 shards by decoder layer (`_no_split_modules`)
    flash attention kernels: need a GPU
"""

import copy

import pytest
import torch
from checkpoints import scramble
from transformers import AutoModel, AutoModelForCausalLM, CompileConfig

from m1.model import M1ForCausalLM, M1Model
from m1.model.configuration import ATTENTION

pytestmark = pytest.mark.parametrize("variant_dir", ["qwen2-mamba", "qwen3-mamba2"], indirect=True)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def test_initialization(hybrid):
    """Weights are normal with the configured spread, norms are 1, biases 0; a seed makes the same model."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(M1ForCausalLM(hybrid.config))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, weight in first.items():
        assert weight.isfinite().all(), name
        kind = name.split(".")[-2:]
        if "norm" in kind[0]:
            assert (weight == 1).all(), name
        elif kind[0] in ("in_proj", "out_proj", "q_proj", "o_proj", "gate_proj", "embed_tokens"):
            spread = hybrid.config.initializer_range
            expected = 0 if kind[1] == "bias" else spread
            assert abs(weight.std().item() - expected) < 0.1 * spread, name
            assert abs(weight.mean().item()) < 0.1 * spread, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_save_and_load(variant_dir, tokens, tmp_path, dtype):
    """Every weight in its dtype, tied weights once; `AutoModel` loads the same decoder."""
    hybrid = scramble(M1ForCausalLM.from_pretrained(variant_dir, dtype=dtype))
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, M1ForCausalLM) and isinstance(base, M1Model)
    assert loaded.dtype == base.dtype == dtype
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in hybrid.state_dict().items())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    logits = hybrid(tokens).logits
    assert logits.isfinite().all() and logits.dtype == dtype
    assert torch.equal(loaded(tokens).logits, logits)
    assert torch.equal(loaded.lm_head(base(tokens).last_hidden_state), logits)


@torch.no_grad()
def test_low_precision_is_close(hybrid, tokens):
    expected = hybrid(tokens).logits
    spread = expected.std()
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.1)):
        logits = copy.deepcopy(hybrid).to(dtype)(tokens).logits
        assert (logits.float() - expected).square().mean().sqrt() < tolerance * spread, dtype


@pytest.mark.parametrize("size", [300, 200])
@torch.no_grad()
def test_resize_embeddings(hybrid, tokens, tmp_path, size):
    """Tied weights stay tied, and old tokens keep their logits."""
    tokens = tokens % 200
    expected = hybrid(tokens).logits
    hybrid.resize_token_embeddings(size)
    assert hybrid.config.vocab_size == hybrid.lm_head.out_features == size
    assert hybrid.lm_head.weight is hybrid.model.embed_tokens.weight
    kept = min(size, expected.shape[-1])
    torch.testing.assert_close(hybrid(tokens).logits[..., :kept], expected[..., :kept])
    hybrid.generation_config.pad_token_id = hybrid.config.pad_token_id = None
    hybrid.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, hybrid(tokens).logits)
    assert hybrid.generate(tokens[:1], **GREEDY).max() < size


def test_hidden_states_and_attentions(hybrid, tokens):
    """One hidden state per layer and the embeddings; attention of the kept layers only. Both have gradients."""
    hybrid.set_attn_implementation("eager")
    outputs = hybrid(tokens, output_hidden_states=True, output_attentions=True)
    hidden, attentions = outputs.hidden_states, outputs.attentions
    assert len(hidden) == hybrid.config.num_hidden_layers + 1
    assert torch.equal(hidden[0], hybrid.model.embed_tokens(tokens))
    torch.testing.assert_close(hybrid.lm_head(hidden[-1]), outputs.logits)
    assert len(attentions) == hybrid.config.layer_types.count(ATTENTION)
    for weights in attentions:
        assert weights.shape == (2, hybrid.config.num_attention_heads, 37, 37)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, hybrid.config.num_attention_heads, 37))
        assert weights.triu(1).eq(0).all()
    for tensor in (hidden[0], attentions[0]):
        tensor.retain_grad()
    outputs.logits.square().sum().backward()
    assert hidden[0].grad.abs().sum() > 0 and attentions[0].grad.abs().sum() > 0


@torch.no_grad()
def test_tuples_and_kept_logits(hybrid, tokens):
    outputs = hybrid(tokens, labels=tokens, use_cache=False)
    as_tuple = hybrid(tokens, labels=tokens, use_cache=False, return_dict=False)
    for value, expected in zip(as_tuple, outputs.to_tuple(), strict=True):
        assert torch.equal(value, expected)
    torch.testing.assert_close(hybrid(tokens, logits_to_keep=3).logits, outputs.logits[:, -3:])
    places = torch.tensor([0, 7, 36])
    torch.testing.assert_close(hybrid(tokens, logits_to_keep=places).logits, outputs.logits[:, places])


@torch.no_grad()
def test_rows_dont_depend_on_their_batch(hybrid, tokens):
    together = hybrid(tokens).logits
    for row in range(2):
        torch.testing.assert_close(together[row], hybrid(tokens[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)


def test_training_overfits(hybrid, tokens):
    optimizer = torch.optim.AdamW(hybrid.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = hybrid(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.isfinite().all() for parameter in hybrid.parameters())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_generate_from_embeddings(hybrid, tokens):
    expected = hybrid.generate(tokens[:1], **GREEDY)[:, 37:]
    embeds = hybrid.model.embed_tokens(tokens[:1])
    assert torch.equal(hybrid.generate(inputs_embeds=embeds, **GREEDY), expected)
    assert torch.equal(hybrid.generate(tokens[:1], prefill_chunk_size=10, **GREEDY)[:, 37:], expected)


@torch.no_grad()
def test_returned_samples_and_scores(hybrid, tokens):
    """Several samples of a prompt; the scores of generated tokens are the full forward's logits."""
    samples = hybrid.generate(tokens[:1], num_return_sequences=3, **GREEDY | {"do_sample": True})
    assert len({tuple(sample) for sample in samples.tolist()}) == 3
    out = hybrid.generate(tokens, return_dict_in_generate=True, output_logits=True, **GREEDY)
    expected = hybrid(out.sequences[:, :-1]).logits[:, 36:]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiled_decoding(hybrid, tokens):
    """A static cache's decode step in one graph, with padding on the left of a row."""
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    expected = hybrid.generate(tokens, attention_mask=mask, **GREEDY)
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    options = {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(hybrid.generate(tokens, attention_mask=mask, **GREEDY, **options), expected)
    assert hasattr(hybrid, "_compiled_call")


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, True])
def test_export(hybrid, tokens, strict):
    """One graph for every length from 2, with padding; the parameters need gradients, as they do after loading."""
    length = torch.export.Dim("T", min=2, max=500)
    mask = torch.ones_like(tokens)
    arguments = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    exported = torch.export.export(hybrid, (), arguments, dynamic_shapes=shapes, strict=strict).module()
    for T in (2, 3, 16, 17, 64, 65, 130):
        arguments["input_ids"] = torch.arange(2 * T).view(2, T) % 256
        arguments["attention_mask"] = torch.ones(2, T, dtype=torch.long)
        arguments["attention_mask"][0, 0] = 0
        real = arguments["attention_mask"].bool()
        expected = hybrid(**arguments).logits[real]
        torch.testing.assert_close(exported(**arguments).logits[real], expected, rtol=1e-4, atol=1e-4)


def test_feature_flags(hybrid):
    """What transformers may use, and what it must refuse."""
    supported = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
    for flag in (*supported, "_can_compile_fullgraph", "_is_stateful", "supports_gradient_checkpointing"):
        assert getattr(hybrid, flag) is True, flag
    assert hybrid.base_model is hybrid.model
    assert hybrid.get_input_embeddings() is hybrid.model.embed_tokens
    assert hybrid.get_output_embeddings() is hybrid.lm_head
