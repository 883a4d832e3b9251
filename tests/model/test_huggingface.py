"""M1 as a citizen of the Hugging Face house: what its users' tools do with a model works, and is exact."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import is_flash_attn_2_available

from m1.model import M1ForCausalLM

GENERATION = {
    "greedy": {"do_sample": False},
    "greedy-static": {"do_sample": False, "cache_implementation": "static"},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams-static": {"do_sample": False, "num_beams": 3, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "sampling-static": {"do_sample": True, "top_k": 20, "cache_implementation": "static"},
    "sampled-beams": {"do_sample": True, "num_beams": 2},
    "no-cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generate_with_left_padding(hybrid, tokens, options):
    arguments = {"max_new_tokens": 12, "eos_token_id": None} | options
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), tokens[:1, :10]], dim=1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 10, dtype=torch.long)], dim=1)
    torch.manual_seed(0)
    alone = hybrid.generate(tokens[:1, :10], attention_mask=torch.ones(1, 10, dtype=torch.long), **arguments)
    torch.manual_seed(0)
    together = hybrid.generate(padded, attention_mask=mask, **arguments)
    assert torch.equal(together[:, 16:], alone[:, 10:])


@torch.no_grad()
def test_greedy_generate_follows_the_full_forward(hybrid, tokens):
    out = hybrid.generate(tokens[:1, :5], max_new_tokens=15, do_sample=False, eos_token_id=None)
    assert torch.equal(hybrid(out[:, :-1]).logits[0, 4:].argmax(-1), out[0, 5:])


@torch.no_grad()
def test_beam_search_finds_what_it_scores(hybrid, tokens):
    """The score of the best beam is the model's own log-probability of its tokens: states followed their beams."""
    out = hybrid.generate(
        tokens[:1, :5], max_new_tokens=10, do_sample=False, num_beams=4, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    sequence = out.sequences
    log_probs = hybrid(sequence[:, :-1]).logits.log_softmax(-1)[0, 4:]
    expected = log_probs.gather(1, sequence[0, 5:, None]).sum()
    torch.testing.assert_close(out.sequences_scores[0], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_implementations_agree(variant_dir, tokens):
    implementations = ["eager", "sdpa"] + (["flash_attention_2"] if is_flash_attn_2_available() else [])
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    logits = []
    for name in implementations:
        model = AutoModelForCausalLM.from_pretrained(variant_dir, attn_implementation=name)
        assert model.config._attn_implementation == name
        logits.append(model(tokens, attention_mask=mask).logits[mask.bool()])
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(hybrid, tokens):
    hybrid.train()
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            hybrid.gradient_checkpointing_enable()
        hybrid.zero_grad()
        loss = hybrid(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in hybrid.parameters()])
    assert losses[0] == losses[1]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_mixer_compiles_without_graph_breaks(hybrid, packed):
    """fullgraph=True raises at a graph break; forward and gradients are those of the eager mixer."""
    mixer = hybrid.train().model.layers[0].mamba
    hidden = torch.randn(2, 37, hybrid.config.hidden_size, generator=torch.Generator().manual_seed(0))
    seq_idx = (torch.arange(37) > 10).int().expand(2, -1) if packed else None
    torch._dynamo.reset()
    results = []
    for run in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        mixer.zero_grad()
        y = run(hidden, seq_idx)
        y.square().mean().backward()
        results.append([y, *(p.grad.clone() for p in mixer.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("positions", [None, "plain", "packed"])
def test_every_whole_model_compiles(hybrid, tokens, positions):
    check_whole_model_compiles(hybrid, tokens, positions)


@pytest.mark.parametrize("variant_dir", ["qwen3-mamba2"], indirect=True)
def test_a_whole_model_compiles(hybrid, tokens):
    check_whole_model_compiles(hybrid, tokens, "packed")


def check_whole_model_compiles(hybrid, tokens, positions):
    """Without a graph break, and to the same logits."""
    arguments = {"labels": tokens, "use_cache": False}
    if positions:
        cut = 20 if positions == "packed" else 37
        arguments["position_ids"] = torch.cat([torch.arange(cut), torch.arange(37 - cut)])[None]
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(hybrid)(tokens, **arguments)
    assert explanation.graph_break_count == 0, explanation.break_reasons
    torch._dynamo.reset()
    compiled = torch.compile(hybrid, backend="eager")(tokens, **arguments).logits
    torch.testing.assert_close(compiled, hybrid(tokens, **arguments).logits)


@torch.no_grad()
def test_compiled_to_machine_code(hybrid_dir, tokens):
    """The default backend, which makes C++ of everything but the scan."""
    torch._dynamo.reset()
    mixer = M1ForCausalLM.from_pretrained(hybrid_dir).model.layers[0].mamba
    hidden = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(mixer)(hidden), mixer(hidden))


def test_sharded_round_trip(hybrid, tokens, tmp_path):
    hybrid.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, M1ForCausalLM)
    assert torch.equal(loaded(tokens).logits, hybrid(tokens).logits)


@torch.no_grad()
def test_device_map(hybrid, tokens, tmp_path):
    """ "auto", and layers left on the disk: their weights are fetched where they are used."""
    hybrid.save_pretrained(tmp_path)
    expected = hybrid(tokens).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")(tokens).logits, expected)
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {f"model.layers.{i}": "disk" if i < 3 else "cpu" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(model(tokens).logits, expected)


def test_a_partly_filled_checkpoint_keeps_what_it_has(hybrid, tmp_path):
    """Initialising what is missing must not touch what was loaded, in the same mixer."""
    from safetensors.torch import load_file, save_file

    hybrid.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mamba.A_log"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = M1ForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_text_generation_pipeline(variant_dir):
    generator = pipeline("text-generation", model=str(variant_dir), device="cpu")
    out = generator([{"role": "user", "content": "1+1"}], max_new_tokens=4, do_sample=False)
    assert out[0]["generated_text"][-1]["role"] == "assistant"


def test_lora_on_mixers_and_attention(hybrid, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    projections = ["in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
    hybrid.save_pretrained(tmp_path / "base")
    expected = hybrid(tokens).logits.detach()
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=projections, task_type="CAUSAL_LM")
    model = peft.get_peft_model(hybrid, lora)
    torch.testing.assert_close(model(tokens).logits, expected)  # B starts at zero
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].split(".")[-1] for name in adapters} == set(projections)
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad.abs().sum() > 0 for p in adapters.values())
    tuned = model(tokens).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    base = M1ForCausalLM.from_pretrained(tmp_path / "base")
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(reloaded(tokens).logits, tuned)
    merged = model.merge_and_unload()
    assert isinstance(merged, M1ForCausalLM)
    torch.testing.assert_close(merged(tokens).logits, tuned, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(tuned, expected, atol=1e-2)


@pytest.mark.long
@torch.no_grad()
def test_lm_evaluation_harness(hybrid_dir, tmp_path, monkeypatch):
    """Its `hf` class scores a local task; the log-likelihoods are those of the model's own forward."""
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"question": f"{i}+1=", "choices": [str(i + 1), str(i + 22)], "answer": 0} for i in range(5)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "question",
    }
    choice = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    exact = choice | {"metric": "exact_match"}
    tasks = [
        common | {"task": "choice", "output_type": "multiple_choice", "doc_to_choice": "choices",
                  "doc_to_target": "answer", "metric_list": [choice]},
        common | {"task": "written", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
                  "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"], "do_sample": False},
                  "metric_list": [exact]},
    ]  # fmt: skip
    result = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(hybrid_dir), "dtype": "float32"}, tasks=tasks, device="cpu",
        batch_size=4, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hybrid_dir), AutoTokenizer.from_pretrained(hybrid_dir)
    for sample in result["samples"]["choice"]:
        for (question, answer), (score, _) in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            prompt, continuation = tokenizer.encode(question), tokenizer.encode(answer)
            ids = torch.tensor([prompt + continuation])
            log_probs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected = sum(log_probs[i, token].item() for i, token in enumerate(continuation))
            assert score == pytest.approx(expected, abs=1e-3)
    assert "exact_match,none" in result["results"]["written"]


def test_conversion_carries_the_tokenizer(variant_dir):
    tokenizer = AutoTokenizer.from_pretrained(variant_dir)
    text = "7+5*3 mod 10 · π ≈ 3.14159 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).endswith("<|assistant|>b<|end|>")
