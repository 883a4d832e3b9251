"""RL's scores in packed rows equal those of padded ones, with their gradients, and training computes no padding."""

import copy

import pytest
import torch
from checkpoints import save_checkpoint, scramble, tiny_teacher
from test_grpo import rows, stage  # noqa: F401 (a fixture)
from tolerance import assert_rms_close
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from m1.model.convert import convert
from m1.model.modeling import M1Model
from m1.model.packed_attention import attend_without_mask
from m1.train.grpo_trainer import Trainer
from m1.train.packed_scores import can_pack, packed_scores

PROMPT, COMPLETION = 9, 13  # tokens of the longest
LENGTHS = ((9, 13), (1, 13), (4, 1), (9, 6), (2, 2), (3, 0))  # of each row's prompt and completion


def model_of(kind, folder):
    source = save_checkpoint(tiny_teacher("qwen3" if kind == "qwen3" else "llama"), folder / "teacher")
    if kind.startswith("mamba"):
        convert(source, folder / "hybrid", [1, 3], mixer=kind)
        source = folder / "hybrid"
    model = AutoModelForCausalLM.from_pretrained(source).train()
    if kind.startswith("mamba"):
        scramble(model)
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    return model


def batch():
    """As TRL makes it: prompts padded on the left, completions on the right."""
    mask = torch.zeros(len(LENGTHS), PROMPT + COMPLETION, dtype=torch.long)
    for row, (prompt, completion) in zip(mask, LENGTHS, strict=True):
        row[PROMPT - prompt : PROMPT + completion] = 1
    tokens = torch.randint(0, 256, mask.shape, generator=torch.Generator().manual_seed(3))
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "fused_lm_head": True}


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "llama", "qwen3"])
def test_equals_padded_rows(kind, tmp_path):
    model = model_of(kind, tmp_path)
    plain = copy.deepcopy(model)
    add_fused_lm_head(plain, temperature=0.8, outputs=("log_probs", "entropy"))  # a copy's would call the original
    assert not can_pack(model, torch.float32)
    attend_without_mask(model)
    assert can_pack(model, torch.float32)
    packed, padded = packed_scores(model, **batch()), plain(**batch())
    weight = torch.rand(padded.log_probs.shape, generator=torch.Generator().manual_seed(4))
    for scores in (packed, padded):
        assert scores.log_probs.shape == (len(LENGTHS), PROMPT + COMPLETION - 1)
        ((scores.log_probs + 0.3 * scores.entropy) * weight).sum().backward()
    torch.testing.assert_close(packed.log_probs, padded.log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.entropy, padded.entropy, rtol=1e-4, atol=1e-5)
    assert_rms_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], 1e-4)


@pytest.fixture
def seen(monkeypatch):
    """What the models' passes are called with: shapes of tokens, and attention masks."""
    seen, forward = [], M1Model.forward

    def noted(self, input_ids=None, attention_mask=None, **options):
        seen.append((tuple(input_ids.shape), attention_mask))
        return forward(self, input_ids, attention_mask, **options)

    monkeypatch.setattr(M1Model, "forward", noted)
    return seen


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_training_computes_no_padding(stage, seen, options):  # noqa: F811
    """Two passes per step: one compares with the engine, one trains."""
    made = stage({"max_steps": 2} | options)
    made.run()
    first, both = (row["num_tokens"] for row in rows(made))
    assert seen == [((1, first), None)] * 2 + [((1, both - first), None)] * 2


def test_the_reference_of_a_kl_term_is_packed_too(stage, seen):  # noqa: F811
    """So that it rounds as the model does: at the first step, nothing is between them."""
    made = stage({"max_steps": 1, "beta": 0.1, "bf16": True})
    made.run()
    (row,) = rows(made)
    assert seen == [((1, row["num_tokens"]), None)] * 3
    assert row["kl"] == 0


@pytest.mark.long
def test_compiled_layers_take_packed_rows(stage, seen):  # noqa: F811
    made = stage({"max_steps": 3, "bf16": True}, compile=True)
    made.run()
    assert len(rows(made)) == 3 and all(shape[0] == 1 and mask is None for shape, mask in seen)


def test_models_that_cannot_pack():
    """A sliding window needs a mask of all pairs, and so does eager attention."""
    model = tiny_teacher("qwen3")
    attend_without_mask(model)
    assert can_pack(model, torch.bfloat16)
    model.config.layer_types = ["sliding_attention", *model.config.layer_types[1:]]
    assert not can_pack(model, torch.bfloat16)
    assert not can_pack(tiny_teacher("qwen3"), torch.bfloat16)


def test_attention_behind_a_mask_is_not_cudnns(stage, monkeypatch):  # noqa: F811
    """Its gradients aren't finite at some lengths. Training alone goes without it."""
    enabled, training_step = [], Trainer.training_step

    def noted(self, *arguments, **options):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return training_step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", noted)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    stage({"max_steps": 1}).run()
    assert before and enabled == [False] and torch.backends.cuda.cudnn_sdp_enabled()
